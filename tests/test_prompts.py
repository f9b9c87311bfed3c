"""Prompts from every kind of file, in their order; and for each that cannot be used, one error that says where."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet_surgery.data.prompts import prompt_set, read_prompts
from unet_surgery.errors import DataError, UsageError

PROMPTS = ("a cat, sitting", 'a "dog"', "ein Käfer\nauf zwei Zeilen", "日本", "  spaces  ")
ONE_LINE = tuple(text.replace("\n", " ") for text in PROMPTS)


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_is_one_prompt() -> None:
    for text in ("a cat", "a cat. Or/and a dog", "a cat.txt\nand more", "x" * 5000):
        found = read_prompts(text)
        assert (found.name, found.texts, found.num_before_limit) == ("text", (text,), 1)
    for text in ("", " "):  # an unset variable of the shell
        with pytest.raises(UsageError, match="empty text"):
            read_prompts(text)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines(tmp_path: Path, bom: str, end: str) -> None:
    content = bom + end.join(["a cat", "", "a dog ", "   ", "日本"])
    assert read_prompts(written(tmp_path / "p.txt", content)).texts == ("a cat", "a dog ", "日本")


@pytest.mark.parametrize("header", ["text", "file_name,caption", "id,prompt,other"])
def test_tables(tmp_path: Path, header: str) -> None:
    """BK-SDM's metadata.csv is the second: its pictures' names are not kept, its order is."""
    columns = header.split(",")
    place = next(i for i, name in enumerate(columns) if name in ("text", "caption", "prompt"))
    rows = [",".join(quoted(text) if i == place else "x" for i in range(len(columns))) for text in PROMPTS]
    path = written(tmp_path / "p.csv", "\n".join([header, *rows, ""]))
    assert read_prompts(path).texts == PROMPTS
    assert read_prompts(path, limit=2).texts == PROMPTS[:2]
    assert read_prompts(path, limit=2).num_before_limit == 5
    assert read_prompts(path, column=columns[place]).texts == PROMPTS


def test_json_lines_lists_and_parquet(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"id": 1, "caption": text}) for text in PROMPTS)
    bare = "\n\n".join(json.dumps(text) for text in PROMPTS)
    assert read_prompts(written(tmp_path / "a.jsonl", lines)).texts == PROMPTS
    assert read_prompts(written(tmp_path / "b.jsonl", bare)).texts == PROMPTS
    assert read_prompts(written(tmp_path / "c.json", json.dumps(PROMPTS))).texts == PROMPTS  # as HPSv2 has them
    rows = [{"words": text} for text in PROMPTS]
    assert read_prompts(written(tmp_path / "d.json", json.dumps(rows)), column="words").texts == PROMPTS
    pq.write_table(pa.table({"n": [1] * 5, "prompt": PROMPTS}), tmp_path / "e.parquet")
    assert read_prompts(tmp_path / "e.parquet").texts == PROMPTS


def test_cocos_captions_are_the_first_of_each_image(tmp_path: Path) -> None:
    data = {
        "images": [{"id": 9}, {"id": 4}],
        "annotations": [
            {"image_id": 4, "id": 30, "caption": "four"},
            {"image_id": 9, "id": 20, "caption": "nine"},
            {"image_id": 4, "id": 10, "caption": "another four"},
        ],
    }
    assert read_prompts(written(tmp_path / "c.json", json.dumps(data))).texts == ("nine", "four")
    data["images"].append({"id": 5})
    with pytest.raises(DataError, match="cannot be used.*\n.*image 5"):
        read_prompts(written(tmp_path / "c.json", json.dumps(data)))


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    written(tmp_path / "metadata.csv", "file_name,text\na.png,a cat\n")
    assert read_prompts(tmp_path).texts == ("a cat",)
    with pytest.raises(DataError, match="names no prompts"):
        read_prompts(tmp_path.parent)


def test_a_table_may_end_in_blank_lines(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path / "a.csv", "text\na\nb\n\n\n")).texts == ("a", "b")


BAD = {
    "empty.txt": (b"", "holds no prompts"),
    "blank.txt": (b"\n \n", "holds no prompts"),
    "bytes.txt": (b"a\nb\n\xe9t\xe9\n", r"not UTF-8.*\n.*bytes.txt:3\n.*0xe9"),
    "control.txt": (b"a\nb\x07\n", r"control.txt:2(.*\n)+.*control character"),
    "header.csv": (b"text\n", "holds no prompts"),
    "nothing.csv": (b"", "holds no prompts"),
    "column.csv": (b"file_name,words\na,b\n", r"no column of prompts(.*\n)+.*text or caption(.*\n)+.*--column"),
    "bytes.csv": (b"text\na\nb\n\xff\n", r"bytes.csv:4"),
    "commas.csv": (b"text\na cat\na cat, sitting\n", r"more fields(.*\n)+?.*commas.csv:3(.*\n)+.*quotes"),
    "short.csv": (b"file_name,text\na.png,a\nb.png\n", r"short.csv:3(.*\n)+.*nothing"),
    "gap.csv": (b"text\na\n\nb\n", r"gap.csv:3(.*\n)+.*blank"),
    "blank.csv": (b'text\na\n""\n', r"blank.csv:3(.*\n)+.*blank"),
    "quote.csv": (b'text\n"a\n', r"not a table"),
    "broken.jsonl": (b'"a"\n{"text": \n', r"not valid JSON.*\n.*broken.jsonl:2"),
    "column.jsonl": (b'{"text": "a"}\n{"words": "b"}\n', r"no column of prompts.*\n.*column.jsonl:2"),
    "number.jsonl": (b'"a"\n3\n', r"number.jsonl:2(.*\n)+.*int in place of text"),
    "null.jsonl": (b'{"text": null}\n', r"null.jsonl:1(.*\n)+.*nothing"),
    "object.json": (b'{"a": 1}', "no list of prompts"),
    "list.json": (b'["a", ["b"]]', r"entry 1(.*\n)+.*list in place of text"),
    "half.json": (b'["\\ud800"]', r"entry 0(.*\n)+.*surrogate"),
    "deep.json": (b"[" * 100_000, "not valid JSON"),
    "line.json": (b'[\n"a",\n"b"\n"c"]', r"line.json:4"),
    "coco.json": (b'{"images": [{"id": 1}], "annotations": [{"caption": "a"}]}', "no captions of COCO"),
    "bad.parquet": (b"PAR1 nothing", "not a readable Parquet"),
    "kind.docx": (b"a", r"kind is not known(.*\n)+.*\.txt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_error_that_says_where(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = written(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(path)
    assert name in str(caught.value)


def test_other_columns_and_files_that_are_not_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match="no column of prompts"):
        read_prompts(tmp_path / "e.parquet")
    with pytest.raises(DataError, match="no such file"):
        read_prompts(tmp_path / "nothing.csv")
    with pytest.raises(UsageError, match="limit"):
        read_prompts("a", limit=0)


def test_sets_of_texts() -> None:
    assert prompt_set("mine", ["", "a"]).texts == ("", "a")
    for texts in ([], ["a", "b\0"], ["\udc00"]):
        with pytest.raises(DataError):
            prompt_set("mine", texts)


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip), min_size=1)
)
def test_the_hash_is_of_the_prompts_alone(texts: list[str]) -> None:
    expected = hashlib.sha256("".join(text + "\0" for text in texts).encode()).hexdigest()
    assert prompt_set("x", texts).sha256 == prompt_set("y", texts).sha256 == expected
    assert prompt_set("x", [*texts, "more"]).sha256 != expected
