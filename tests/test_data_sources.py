"""Sources of training data: read as the field's own libraries read them, and what is broken in them is counted."""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_surgery.data.pictures import decode_picture
from unet_surgery.data.reasons import BadSampleError
from unet_surgery.data.sources import Source, Texts, open_source
from unet_surgery.errors import DataError, MissingExtraError


def picture(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def outcomes(source: Source) -> list[str]:
    """Return each sample's caption, or the reason why there is none."""
    result = []
    for index in range(len(source)):
        try:
            sample = source.read(index)
            assert decode_picture(sample.image, 16).shape == (16, 16, 3)
            assert sample.id == source.id(index)
            result.append(str(sample.caption))
        except BadSampleError as error:
            assert source.id(index)
            result.append(f"[{error.reason}]")
    return result


def write_folder(root: Path, names: list[str], metadata: str | bytes, name: str = "metadata.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(names):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(picture(number))
    (root / name).write_bytes(metadata if isinstance(metadata, bytes) else metadata.encode())
    return root


# --- folders --------------------------------------------------------------------------------------------------------

ROWS = {"a.png": "a dog", "deep/b.png": 'two\nlines, a comma and "quotes"', "c.png": "ein Häuschen 🏠"}


def csv_text(rows: dict[str, str], columns: tuple[str, str] = ("file_name", "text")) -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows(rows.items())
    return file.getvalue()


@pytest.mark.parametrize("column", ["text", "caption"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_with_metadata(tmp_path: Path, column: str, bom: str, kind: str) -> None:
    lines = "".join(json.dumps({"file_name": name, column: text}) + "\n" for name, text in ROWS.items())
    text = csv_text(ROWS, ("file_name", column)) if kind == "csv" else lines
    source = open_source(write_folder(tmp_path / "set", list(ROWS), bom + text, f"metadata.{kind}"))
    assert outcomes(source) == list(ROWS.values())
    assert [source.id(i) for i in range(len(source))] == list(ROWS)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # that library leaves a file to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_folder_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    import datasets

    root = write_folder(tmp_path / "set" / "train", list(ROWS), csv_text(ROWS))
    datasets.disable_progress_bars()
    oracle = datasets.load_dataset(
        "imagefolder", data_dir=str(root.parent), split="train", cache_dir=str(tmp_path / "c")
    )
    theirs = {row["text"]: np.asarray(row["image"]) for row in oracle}
    source = open_source(root.parent)
    assert sorted(outcomes(source)) == sorted(theirs)
    for index in range(len(source)):
        sample = source.read(index)
        assert (decode_picture(sample.image, 20) == theirs[str(sample.caption)]).all()
    del oracle
    gc.collect()  # here, not in another test


@pytest.mark.parametrize("below", [".", "train", "a"])
def test_metadata_twice_is_refused(tmp_path: Path, below: str) -> None:
    """Every picture would count twice; which of the two captions is meant, nobody knows."""
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "b"}\n')
    with pytest.raises(DataError, match="its metadata twice") as caught:
        open_source(tmp_path)
    assert caught.value.where == str(folder)


def test_the_column_of_captions(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ["a.png"], "file_name,text,blip\na.png,alt,what it shows\n")
    assert outcomes(open_source(root)) == ["alt"]
    assert outcomes(open_source(root, caption_column="blip")) == ["what it shows"]
    assert open_source(root).fingerprint != open_source(root, caption_column="blip").fingerprint
    with pytest.raises(DataError, match="expected: *bilp\n *found: *file_name, text, blip"):
        open_source(root, caption_column="bilp")


def test_broken_rows_are_samples_with_reasons(tmp_path: Path) -> None:
    """So the length and order of a set do not depend on what is wrong with it."""
    text = (
        b"file_name,text\na.png,fine\nb.png,too, many\nc.png\n,no name\nd.png,caf\xe9\n"
        b"../secret.png,up\n/etc/passwd,absolute\ngone.png,gone\nlink.png,out\nfolder,a folder\nfine.png,fine\n"
        b"empty.png,nothing in it\nz\0.png,NUL\ndangling.png,nowhere\nloop.png,round\n" + b"n" * 300 + b".png,long\n"
    )
    root = write_folder(tmp_path / "set", ["a.png", "b.png", "c.png", "d.png", "fine.png"], text)
    (tmp_path / "secret.png").write_bytes(picture(0))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "dangling.png").symlink_to(root / "nothing.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "folder").mkdir()
    (root / "empty.png").write_bytes(b"")
    source = open_source(root)
    assert outcomes(source) == [
        "fine", "[metadata-broken]", "None", "[metadata-broken]", "caf\udce9",
        "[outside]", "[outside]", "[missing]", "[outside]", "[unreadable]", "fine",
        "[empty]", "[missing]", "[missing]", "[missing]", "[missing]",
    ]  # fmt: skip
    assert source.id(1) == "metadata.csv:3"


def test_a_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ["a.png"], "file_name,text\nlink.png,a\n")
    (root / "link.png").symlink_to("a.png")
    assert outcomes(open_source(root)) == ["a"]


def test_broken_lines_of_json_are_counted_with_their_numbers(tmp_path: Path) -> None:
    lines = [
        '{"file_name": "a.png", "text": "fine"}', '{"file_name": "a.png", "text": ', "", "[]", "null",
        '{"text": "no name"}', '{"file_name": 7, "text": "x"}', '{"file_name": "a.png"}',
        '{"file_name": "a.png", "text": null}', '{"file_name": "a.png", "text": "\\ud800"}', "[" * 100_000,
        '{"file_name": "a.png", "text": "fine"}',
    ]  # fmt: skip
    data = "\n".join(lines).encode() + b'\n{"file_name": "a.png", "text": "caf\xe9"}\n'
    source = open_source(write_folder(tmp_path / "set", ["a.png"], data, "metadata.jsonl"))
    broken = "[metadata-broken]"
    assert outcomes(source) == ["fine", *[broken] * 5, "None", "None", "\ud800", broken, "fine", broken]
    assert source.id(1) == "metadata.jsonl:2"
    assert source.id(2) == "metadata.jsonl:4"


def test_a_field_beyond_any_limit_costs_its_row_only(tmp_path: Path) -> None:
    text = f"file_name,text\na.png,fine\na.png,{'x' * 200_000}\na.png,fine\n"
    source = open_source(write_folder(tmp_path / "set", ["a.png"], text))
    assert outcomes(source) == ["fine", "[metadata-broken]", "fine"]


def test_the_fingerprint_of_a_folder(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ["a.png"], "file_name,text\na.png,a\n")
    before = open_source(root).fingerprint
    assert open_source(root).fingerprint == before
    (root / "a.png").write_bytes(picture(0) + b"more")
    resized = open_source(root).fingerprint
    (root / "metadata.csv").write_text("file_name,text\na.png,b\n")
    assert len({before, resized, open_source(root).fingerprint}) == 3


def test_texts_hold_any_text() -> None:
    texts = ["", "a", "犬🐕", "\udce9", "a" * 1000]
    assert list(Texts(texts)) == texts


# --- tars -----------------------------------------------------------------------------------------------------------


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, first: int, count: int) -> Path:
    """As img2dataset lays them out."""
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            add(tar, f"{number:09d}.jpg", picture(number, "JPEG"))
            add(tar, f"{number:09d}.txt", f"picture {number}".encode())
            add(tar, f"{number:09d}.json", json.dumps({"caption": f"of json {number}", "key": number}).encode())
    return path


def test_tars_are_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as sink:
        for number in range(20):
            sample = {"__key__": f"sub.folder/{number:06d}", "jpg": picture(number, "JPEG"), "txt": f"picture {number}"}
            sink.write(sample | ({"json": {"caption": "json"}} if number % 2 else {"seg.png": b"not the picture"}))
    source = open_source(tmp_path / "00000.tar")
    with open(tmp_path / "00000.tar", "rb") as file:
        members = webdataset.tariterators.tar_file_expander([{"url": "", "stream": file}])
        samples = list(webdataset.tariterators.group_by_keys(members))
    theirs = [(sample["__key__"], sample["txt"].decode(), sample["jpg"]) for sample in samples]
    ours = [source.read(index) for index in range(len(source))]
    assert [(s.id.partition(":")[2], s.caption, s.image) for s in ours] == theirs
    assert len(theirs) == 20


def test_shards_by_folder_and_by_pattern(tmp_path: Path) -> None:
    for shard in range(12):
        write_tar(tmp_path / f"{shard:05d}.tar", shard * 10, 2)
    expected = [f"picture {shard * 10 + i}" for shard in range(12) for i in range(2)]
    assert outcomes(open_source(tmp_path)) == expected
    whole = open_source(f"{tmp_path}/{{00000..00011}}.tar")
    assert outcomes(whole) == expected
    assert whole.fingerprint == open_source(tmp_path).fingerprint
    assert outcomes(open_source(f"{tmp_path}/{{00003..00004}}.tar")) == expected[6:10]
    with pytest.raises(DataError, match=r"no such tar\n *where: *\S*00012\.tar"):
        open_source(f"{tmp_path}/{{00010..00012}}.tar")


def test_the_caption_is_the_text_file_or_in_the_json(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.json", b'{"caption": "of json", "other": "else"}')
        add(tar, "a.JPG", picture(0, "JPEG"))
    assert outcomes(open_source(tmp_path)) == ["of json"]
    assert outcomes(open_source(tmp_path, caption_column="other")) == ["else"]
    assert open_source(tmp_path).fingerprint != open_source(tmp_path, caption_column="other").fingerprint


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_dialect(tmp_path: Path, format_: int) -> None:
    name = f"{'d' * 60}/{'n' * 60}" if format_ == tarfile.USTAR_FORMAT else f"{'d' * 150}/{'ü' * 150}"
    with tarfile.open(tmp_path / "a.tar", "w", format=format_) as tar:
        add(tar, f"{name}.png", picture(0))
        add(tar, f"{name}.txt", b"long")
    source = open_source(tmp_path)
    assert outcomes(source) == ["long"]
    assert source.id(0) == f"a.tar:{name}"


def test_what_is_no_file_of_a_sample_is_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("a.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        add(tar, "README", b"no sample")
        add(tar, "b.txt", b"no picture")
        add(tar, "c.png", picture(0))
        add(tar, "d.png", picture(0))
        add(tar, "d.json", b"{broken")
        add(tar, "e.png", picture(0))
        add(tar, "e.json", b"[]")
        add(tar, "f.png", picture(0))
        add(tar, "f.txt", b"x" * (2 << 20))
    source = open_source(tmp_path)
    broken = "[metadata-broken]"
    assert outcomes(source) == ["[missing]", "None", broken, broken, "[caption-huge]"]


def test_a_tar_cut_short_anywhere(tmp_path: Path) -> None:
    """The samples before the cut are as they were; the cut is one more, with its reason."""
    whole = write_tar(tmp_path / "whole.tar", 0, 6)
    expected = outcomes(open_source(whole))
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in tar if m.name.endswith(".txt")]
    end = len(data.rstrip(b"\0"))
    for size in (*range(1000, end, 1777), *ends, ends[2] + 100, ends[2] + 512):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        seen = outcomes(open_source(tmp_path / "cut.tar"))
        whole_samples = sum(size >= e for e in ends)
        assert seen[:whole_samples] == expected[:whole_samples], size
        assert seen[-1] == "[truncated]", size
        assert whole_samples + 1 <= len(seen) <= whole_samples + 2


def test_a_tar_with_a_damaged_header(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", 0, 6)
    with tarfile.open(whole) as tar:
        offset = [m.offset for m in tar][9]
    data = bytearray(whole.read_bytes())
    data[offset : offset + 512] = b"\xff" * 512
    whole.write_bytes(data)
    assert outcomes(open_source(whole)) == ["picture 0", "picture 1", "picture 2", "[truncated]"]


def test_a_tar_that_shrinks_later(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", 0, 3))
    os.truncate(tmp_path / "a.tar", 3000)
    assert outcomes(source)[1:] == ["[truncated]"] * 2
    (tmp_path / "a.tar").unlink()
    assert outcomes(source) == ["[missing]"] * 3


def gzipped(path: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "a.png", picture(0))


NO_TARS = {
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "a page": (lambda path: path.write_bytes(b"<html>404</html>" * 100), "HTML"),
    "a pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 20), "LFS"),
    "compressed": (gzipped, "gzip"),
}


@pytest.mark.parametrize("case", NO_TARS)
def test_what_is_no_tar(tmp_path: Path, case: str) -> None:
    make, found = NO_TARS[case]
    make(tmp_path / "a.tar")
    with pytest.raises(DataError, match=f"not a tar\n.*\n.*{found}"):
        open_source(tmp_path)


# --- datasets -------------------------------------------------------------------------------------------------------


def make_dataset(count: int = 5) -> Iterator[dict[str, object]]:
    for number in range(count):
        yield {"image": {"bytes": picture(number), "path": None}, "text": f"picture {number}", "n": number}


def test_what_datasets_saved(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "n": datasets.Value("int64")}
    )
    dataset = datasets.Dataset.from_list(list(make_dataset()), features=features)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": dataset.select([0]), "train": dataset}).save_to_disk(str(tmp_path / "many"))
    expected = [f"picture {n}" for n in range(5)]
    for folder in ("one", "many"):
        source = open_source(tmp_path / folder)
        assert outcomes(source) == expected
        assert source.read(3).image == picture(3)
        assert source.fingerprint == open_source(tmp_path / folder).fingerprint
    assert outcomes(open_source(tmp_path / "many", split="test")) == expected[:1]
    with pytest.raises(DataError, match="no such split"):
        open_source(tmp_path / "many", split="validation")
    with pytest.raises(DataError, match="no column of captions"):
        open_source(tmp_path / "one", caption_column="n2")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"unet-surgery\[datasets\]"):
        open_source("nobody/nothing")
    with pytest.raises(MissingExtraError):
        open_source("hub:nobody/nothing")


def test_a_hub_dataset_that_cannot_be_had() -> None:
    """Offline, as all tests are: in one message."""
    with pytest.raises(DataError, match="cannot be had from the Hub"):
        open_source("nobody/nothing")


# --- nothing of the kind --------------------------------------------------------------------------------------------


def test_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training data that is known"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="no such training data"):
        open_source(tmp_path / "nothing")
    with pytest.raises(DataError, match="from this machine's disks"):
        open_source("https://example.com/{000..999}.tar")
    with pytest.raises(DataError, match="no column of captions"):
        open_source(write_folder(tmp_path / "a", ["a.png"], "file_name\na.png\n"))
    with pytest.raises(DataError, match="names no files"):
        open_source(write_folder(tmp_path / "b", ["a.png"], "file,text\na.png,a\n"))
    with pytest.raises(DataError, match="names no pictures"):
        open_source(write_folder(tmp_path / "c", [], "file_name,text\n"))


def test_reading_is_safe_in_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    source = open_source(write_tar(tmp_path / "a.tar", 0, 30))
    with ThreadPoolExecutor(8) as pool:
        seen = Counter(sample.image for sample in pool.map(source.read, list(range(30)) * 10))
    assert seen == Counter({picture(n, "JPEG"): 10 for n in range(30)})
