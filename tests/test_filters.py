"""Filters: what they say, whom they leave out, and that a cache and a run remember them."""

from __future__ import annotations

import csv
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_cli import tool

from unet_surgery.data.cache import make_cache
from unet_surgery.data.cachefolder import read_facts
from unet_surgery.data.conditions import Condition, parse_filter
from unet_surgery.data.filters import FilteredSource
from unet_surgery.data.latents import LatentCache
from unet_surgery.data.sources import Source, open_source
from unet_surgery.errors import DataError, OutputError, UsageError

SCORES = ["6.5", "6.4999", "7", "", "nan", "-1e3", " 8.25 ", "6.5e0"]
STYLES = ["photo", "anime", "photo", "it's", "", "photo", "anime", "5"]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = texts.filter(bool)
numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
plain_numbers = numbers.map(lambda n: int(n) if n == int(n) else n)
conditions = st.one_of(
    st.builds(Condition, names, st.sampled_from([">=", "<=", ">", "<", "==", "!="]), plain_numbers),
    st.builds(Condition, names, st.sampled_from(["==", "!="]), texts),
)


def png(shade: int = 0, side: int = 16) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight pictures with a score and a style each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    with open(folder / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text", "aesthetic score", "style"])
        for i, (score, style) in enumerate(zip(SCORES, STYLES, strict=True)):
            (folder / f"{i}.png").write_bytes(png(20 * i))
            rows.writerow([f"{i}.png", f"picture {i}", score, style])
    return folder


def kept(source: Source) -> list[int]:
    return [int(source.read(i).caption.split()[-1]) for i in range(len(source))]  # type: ignore[attr-defined]


@given(conditions)
def test_a_condition_is_what_its_text_says(condition: Condition) -> None:
    assert parse_filter(str(condition)) == condition
    assert parse_filter(f"  {condition}\n") == condition


@given(st.text(max_size=40))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    try:
        condition = parse_filter(text)
    except UsageError as error:
        assert "not a filter" in str(error)  # noqa: PT017
    else:
        assert parse_filter(str(condition)) == condition


@pytest.mark.parametrize(
    "text",
    ["", "score", "score>=", ">=6", "score=>6", "score=6", "score>=6 and style=='a'", "a b>=6", "score>='6'",
     "score>6,5", "style==photo", "style=='photo", "score>=nan", "score>=inf", "score>=1e999", "score>=1_000",
     "score>=0x10", "score>=٦", "x" * 600 + ">1"],
)  # fmt: skip
def test_what_is_no_filter(text: str) -> None:
    with pytest.raises(UsageError, match="this is not a filter"):
        parse_filter(text)


@given(st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=6)), numbers)
def test_numbers_are_compared_as_python_compares_them(found: object, value: float) -> None:
    """Over every kind of value: a missing one meets nothing, and of two opposites a number meets just one."""
    try:
        verdicts = {op: Condition("x", op, value).admits(found, "row 1") for op in (">=", "<", "<=", ">", "==", "!=")}
    except DataError as error:
        assert isinstance(found, str)
        assert found.strip()
        assert "row 1" in str(error)  # noqa: PT017
        return
    number = float("nan") if found is None or (isinstance(found, str) and not found.strip()) else float(found)  # type: ignore[arg-type]
    if math.isnan(number):
        assert not any(verdicts.values())
    else:
        assert all(verdicts[a] != verdicts[b] for a, b in [(">=", "<"), ("<=", ">"), ("==", "!=")])
        exact = found if isinstance(found, (int, float)) else number
        assert verdicts[">="] == (exact >= value)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (['"aesthetic score">=6.5'], [0, 2, 6, 7]),
        (['"aesthetic score">6.5'], [2, 6]),
        (['"aesthetic score"!=7'], [0, 1, 5, 6, 7]),
        (['"aesthetic score"<=-1000'], [5]),
        (["style=='photo'"], [0, 2, 5]),
        (["style=='it''s'"], [3]),
        (["style!='photo'"], [1, 3, 6, 7]),
        (["style=='5'"], [7]),
        (["style=='photo'", '"aesthetic score">=7'], [2]),
        (['"aesthetic score">6', '"aesthetic score"<7'], [0, 1, 7]),
    ],
)
def test_a_csv(pictures: Path, filters: list[str], expected: list[int]) -> None:
    source = open_source(pictures, filters=filters)
    assert kept(source) == expected
    assert isinstance(source, FilteredSource)
    assert source.num_left_out == 8 - len(expected)
    assert [source.id(i) for i in range(len(source))] == [f"{i}.png" for i in expected]


def test_without_filters_nothing_is_wrapped(pictures: Path) -> None:
    assert not isinstance(open_source(pictures), FilteredSource)


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        (["beauty>1"], ["a column that is not there", "file_name, text, aesthetic score, style", "beauty"]),
        (["style>=1"], ["style is compared with a number", "metadata.csv:2", "photo"]),
        (['"aesthetic score">100'], ["no sample meets the filter", "none of 8 samples", "pictures"]),
    ],
)
def test_what_a_filter_cannot_do(pictures: Path, filters: list[str], words: list[str]) -> None:
    with pytest.raises(DataError) as raised:
        open_source(pictures, filters=filters)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_jsonl_with_columns_of_some_rows(tmp_path: Path) -> None:
    rows: list[object] = [
        {"score": 7},
        {"score": 6.5},
        {},
        {"score": None},
        {"score": "7"},
        {"score": 2**70},
        {"ok": True},
    ]
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}", **row}) for i, row in enumerate(rows)]  # type: ignore[dict-item]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]))
    for i in range(len(rows)):
        (tmp_path / f"{i}.png").write_bytes(png())
    assert kept(open_source(tmp_path, filters=["score>=7"])) == [0, 4, 5]
    assert kept(open_source(tmp_path, filters=["ok=='true'"])) == [6]
    with pytest.raises(DataError, match="metadata.jsonl:8"):
        open_source(tmp_path, filters=["ok>0"])


def test_broken_rows_stay_and_are_bad(tmp_path: Path) -> None:
    """Whether a broken row would have met the filter nobody knows, so it is counted as broken, not as left out."""
    good = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}", "score": i}) for i in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*good[:2], "{broken", *good[2:]]))
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png())
    source = open_source(tmp_path, filters=["score>=1"])
    assert len(source) == 4
    assert source.num_left_out == 1  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="metadata-broken"):
        source.read(1)
    assert source.read(0).id == "1.png"


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_tars_filter_by_their_json(tmp_path: Path) -> None:
    samples: list[tuple[str, dict[str, bytes]]] = [
        (f"{i:04d}", {"png": png(), "txt": f"picture {i}".encode(), "json": json.dumps({"punsafe": i / 10}).encode()})
        for i in range(5)
    ]
    samples[1][1].pop("json")
    samples[2][1]["json"] = b"[broken"
    write_tar(tmp_path / "00000.tar", samples[:3])
    write_tar(tmp_path / "00001.tar", samples[3:])
    source = open_source(tmp_path, filters=["punsafe<0.35"])
    assert [source.id(i) for i in range(len(source))] == ["00000.tar:0000", "00000.tar:0002", "00001.tar:0003"]
    with pytest.raises(DataError, match="metadata-broken"):  # its caption is fine, but nobody knows its number
        source.read(1)
    before = source.fingerprint
    samples[4][1]["json"] = b'{"punsafe": 0.1}'  # as many bytes as before
    write_tar(tmp_path / "00001.tar", samples[3:])
    after = open_source(tmp_path, filters=["punsafe<0.35"])
    assert len(after) == 4
    assert after.fingerprint != before


def test_a_saved_dataset(pictures: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(4)], "text": [f"picture {i}" for i in range(4)],
            "score": [6.0, 7.5, None, 6.5]}  # fmt: skip
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "saved")
    assert kept(open_source(tmp_path / "saved", filters=["score>=6.5"])) == [1, 3]
    with pytest.raises(DataError, match="image, text, score"):
        open_source(tmp_path / "saved", filters=["beauty>=6.5"])


def test_a_cache_remembers_its_filter(pictures: Path, tmp_path: Path) -> None:
    options = {"resolution": 16, "model": "tiny-random", "source": pictures, "max_bad": 0.0}
    result = make_cache(**options, out=tmp_path / "cache", filters=['"aesthetic score" >= 6.5'])  # type: ignore[arg-type]
    assert (result.num_samples, result.num_filtered, result.bad) == (4, 4, {})
    facts = read_facts(tmp_path / "cache")
    assert facts.settings.filter == ('"aesthetic score">=6.5',)
    assert facts.settings.num_left_out == 4
    assert [LatentCache(tmp_path / "cache").caption(i) for i in range(4)] == [f"picture {i}" for i in (0, 2, 6, 7)]
    again = make_cache(**options, out=tmp_path / "cache", filters=['"aesthetic score">=6.5'])  # type: ignore[arg-type]
    assert (again.num_encoded, again.num_filtered) == (0, 4)
    for filters in ([], ['"aesthetic score">=6.4'], ['"aesthetic score">=6.5', "style=='photo'"]):
        with pytest.raises(OutputError, match="other settings") as raised:
            make_cache(**options, out=tmp_path / "cache", filters=filters)  # type: ignore[arg-type]
        assert "filter" in (raised.value.expected or "")


def test_a_cache_without_a_filter_is_what_it_was(pictures: Path, tmp_path: Path) -> None:
    """Caches made before there were filters are continued, and read by what made them."""
    make_cache(pictures, "tiny-random", tmp_path / "cache", resolution=16)
    data = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert not {"filter", "num_left_out"} & set(data["settings"])
    with pytest.raises(OutputError, match="filter none"):
        make_cache(pictures, "tiny-random", tmp_path / "cache", resolution=16, filters=["style=='photo'"])


def test_limit_counts_what_is_left(pictures: Path, tmp_path: Path) -> None:
    result = make_cache(pictures, "tiny-random", tmp_path / "c", resolution=16, filters=["style=='photo'"], limit=2)
    assert result.num_samples == 2
    assert [LatentCache(tmp_path / "c").caption(i) for i in range(2)] == ["picture 0", "picture 2"]


def test_the_command(pictures: Path, tmp_path: Path) -> None:
    words = ["cache", str(pictures), "-m", "tiny-random", "--resolution", "16", "-o", str(tmp_path / "c")]
    _, err = tool(*words, "--filter", "style=='photo'", "--filter", '"aesthetic score">=6.5')
    assert "--filter left out 6" in err
    assert "2 samples" in err
    assert "not a filter" in tool(*words, "--filter", "style=photo", code=2)[1]
    assert "file_name, text" in tool(*words[:-1], str(tmp_path / "d"), "--filter", "beauty>1", code=3)[1]


def test_a_run_file_takes_filters_of_pictures_only(pictures: Path, tmp_path: Path) -> None:
    from pydantic import ValidationError

    from unet_surgery.distill.config import DataConfig

    one = DataConfig.model_validate({"images": "p", "filter": "score>=6.5"})
    assert one == DataConfig.model_validate({"images": "p", "filter": ["score>=6.5"]})
    assert DataConfig.model_validate({"images": "p"}).filter == ()
    with pytest.raises(ValidationError, match="data.filter stands beside cache"):
        DataConfig.model_validate({"cache": "c", "filter": "score>=6.5"})
    with pytest.raises(ValidationError, match="this is not a filter: score=6.5"):
        DataConfig.model_validate({"images": "p", "filter": "score=6.5"})


def test_the_card_names_the_filter(pictures: Path, tmp_path: Path) -> None:
    from unet_surgery.distill.config import RunConfig
    from unet_surgery.distill.finish import _data

    make_cache(pictures, "tiny-random", tmp_path / "cache", resolution=16, filters=["style=='photo'"])
    run = {"output": "o", "student": "s", "teacher": "t", "steps": 1}

    def said(data: dict[str, object]) -> str:
        return _data(RunConfig.from_data({**run, "data": data}))

    assert said({"images": "p", "filter": ["a>1", "b<2"]}) == "On p where `a>1` and `b<2`, at 512 pixels"
    assert said({"images": "p"}) == "On p, at 512 pixels"
    assert said({"cache": str(tmp_path / "cache")}) == "On the latents in cache where `style=='photo'`"
    assert said({"cache": str(tmp_path / "gone")}) == "On the latents in gone"
