"""Archives that lie, are damaged or hostile: what is in them below one folder, or one clear error."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from archives import tar_gz, zipped
from hypothesis import given
from hypothesis import strategies as st
from teachers import folder_bytes

from unet_surgery.data.unpack import DamagedArchiveError, Limits, unpack_tar_gz, unpack_zip
from unet_surgery.errors import DataError

LIMITS = Limits(10_000_000, 100)
FILES = {f"train/{i:04d}.jpg": os.urandom(30_000) for i in range(8)}
ARCHIVE = tar_gz(FILES, level=0)


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"x"
) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        info.size = len(data) if kind == tarfile.REGTYPE else 0
        tar.addfile(info, io.BytesIO(data))

    return add


HOSTILE = {
    "absolute": member("/etc/passwd"),
    "dots": member("a/../../b"),
    "dots at the end": member("a/.."),
    "an absolute folder": member("/tmp/x", tarfile.DIRTYPE),
    "dots in a folder": member("../x", tarfile.DIRTYPE),
    "backslashes": member("..\\x"),
    "a control character": member("a\x1b[2Jb.jpg"),
    "no UTF-8": member("a\udcffb.jpg"),
    "a long name": member("n" * 256 + ".jpg"),
    "deep": member("/".join("abcdefghijk")),
    "a symbolic link": member("a.jpg", tarfile.SYMTYPE, "/etc/passwd"),
    "a link inside": member("a.jpg", tarfile.SYMTYPE, "good.jpg"),
    "a hard link": member("a.jpg", tarfile.LNKTYPE, "good.jpg"),
    "a FIFO": member("a.jpg", tarfile.FIFOTYPE),
    "a device": member("a.jpg", tarfile.CHRTYPE),
    "twice": member("good.jpg"),
    "a file for a folder": member("good.jpg/a.jpg"),
    "much": member("big.jpg", data=bytes(11_000_000)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars(name: str, tmp_path: Path) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        member("good.jpg")(tar)
        HOSTILE[name](tar)
    archive, folder = tmp_path / "x.tar.gz", tmp_path / "in" / "folder"
    archive.write_bytes(data.getvalue())
    folder.mkdir(parents=True)
    with pytest.raises(DataError) as raised:
        unpack_tar_gz(archive, folder, LIMITS, lambda _: None)
    assert "the archive" in str(raised.value)
    assert "\x1b" not in str(raised.value)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != archive]
    assert all(path.is_relative_to(folder) and not path.is_symlink() for path in written)
    assert sum(path.stat().st_size for path in written) <= LIMITS.num_bytes


def huge_header(kind: bytes) -> bytes:
    """A tar whose extended header says that it is 1 GB, and is: of zeros, so that it packs to 1 MB."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 1 << 30
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(1 << 20))
    return packed.getvalue()


DAMAGED = {
    "cut": ARCHIVE[:-100_000],
    "cut in the checksum": ARCHIVE[:-4],
    "a wrong checksum": ARCHIVE[:-8] + bytes(4) + ARCHIVE[-4:],
    "no gzip": b"something else entirely, and longer than a header" * 20,
    "empty": b"",
    "gzip of no tar": gzip.compress(b"something else entirely, and longer than a header" * 20),
    "no end": gzip.compress(gzip.decompress(tar_gz(FILES))[: 512 * 62 + 100]),
    "no end blocks": gzip.compress(gzip.decompress(tar_gz({"a.jpg": b"x"}))[:1024]),
    "a bad header": gzip.compress(gzip.decompress(tar_gz({"a.jpg": b"x"}))[:1024] + b"?" * 512 + bytes(2048)),
    "a huge pax header": huge_header(tarfile.XHDTYPE),
    "a huge long name": huge_header(tarfile.GNUTYPE_LONGNAME),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_tars(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(DAMAGED[name])
    with pytest.raises(DamagedArchiveError):
        unpack_tar_gz(tmp_path / "x.tar.gz", tmp_path, LIMITS, lambda _: None)


def test_many_files(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(tar_gz({f"{i}": b"" for i in range(101)}, top=""))
    with pytest.raises(DataError, match="implausibly many"):
        unpack_tar_gz(tmp_path / "x.tar.gz", tmp_path / "out", LIMITS, lambda _: None)


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    files = {"a.jpg": b"x", "._a.jpg": b"y", ".DS_Store": b"z", "__MACOSX/a.jpg": b"w", "d/.e/f": b"v"}
    (tmp_path / "x.tar.gz").write_bytes(tar_gz(files, top="./t"))
    done = unpack_tar_gz(tmp_path / "x.tar.gz", tmp_path / "out", Limits(1000, 10, top="t"), lambda _: None)
    assert folder_bytes(tmp_path / "out") == {"a.jpg": b"x"}
    assert (done.num_files, done.skipped) == (1, 4)


names = st.lists(st.sampled_from(["a", "b", "c.jpg", "é", "d e"]), min_size=1, max_size=3).map("/".join)


@given(st.dictionaries(names, st.binary(max_size=2000), max_size=6))
def test_both_kinds_give_what_was_packed(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    """A law: unpacked is what was packed, for any names that can stand beside each other."""
    parents = {"/".join(name.split("/")[:i]) for name in files for i in range(1, name.count("/") + 1)}
    files = {name: data for name, data in files.items() if name not in parents}
    root = tmp_path_factory.mktemp("law")
    (root / "x.tar.gz").write_bytes(tar_gz(files, top=""))
    (root / "x.zip").write_bytes(zipped(files))
    read: list[int] = []
    done = unpack_tar_gz(root / "x.tar.gz", root / "tar", LIMITS, read.append)
    assert done.sha256 == hashlib.sha256((root / "x.tar.gz").read_bytes()).hexdigest()
    assert sum(read) == (root / "x.tar.gz").stat().st_size
    unpack_zip(root / "x.zip", root / "zip", LIMITS, read.append)
    for folder in (root / "tar", root / "zip"):
        assert (folder_bytes(folder) if files else {}) == files


def linked() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        info = zipfile.ZipInfo("a.jpg")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return data.getvalue()


def flipped(data: bytes) -> bytes:
    return data[:60] + bytes([data[60] ^ 1]) + data[61:]


ZIPS = {
    "dots": zipped({"../x": b"x"}),
    "absolute": zipped({"/x": b"x"}),
    "a link": linked(),
    "a bomb": zipped({"x": bytes(11_000_000)}),
    "cut": zipped({"x": os.urandom(1000)})[:-40],
    "flipped": flipped(zipped({"x": os.urandom(1000)})),
    "no zip": b"something else",
    "encrypted": zipped({"x": b"x"}).replace(b"\x14\x03\x14\x00\x00", b"\x14\x03\x14\x00\x01"),
}  # fmt: skip


@pytest.mark.parametrize("name", ZIPS)
def test_hostile_zips(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(ZIPS[name])
    with pytest.raises(DataError, match="the archive"):
        unpack_zip(tmp_path / "x.zip", tmp_path / "out", LIMITS, lambda _: None)
    assert not (tmp_path / "x").exists()
