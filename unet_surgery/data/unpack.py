"""Taking archives apart that nobody here has made: plain files only, below one folder, no more than was announced.

A tar is read from its beginning to its end, once, so what is bounded is what comes out, not what a header promises. Of
gzip and zip the checksums are compared. Links, devices and names that lead out, or that no file should have, make the
whole archive refused: a data set has no use for them.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from unet_surgery.checkpoint import disk
from unet_surgery.data.suffixes import SUFFIXES
from unet_surgery.errors import DataError, printable

__all__ = ["DamagedArchiveError", "Limits", "Unpacked", "unpack_tar_gz", "unpack_zip"]

CHUNK_BYTES = 1 << 20
MAX_READ_BYTES = 4 << 20  # of a tar's own words, such as a long name
MAX_TAIL_BYTES = 64 << 20  # what may follow a tar's end
HEADER_BYTES = 4096  # of one file, at most
MAX_NAME_BYTES = 255
MAX_DEPTH = 8
HIDDEN_FOLDERS = ("__MACOSX",)
_DAMAGES = (EOFError, zlib.error, ValueError, RecursionError)  # the last of header upon header
SYMLINK_MODE, MODE_MASK = 0o120000, 0o170000


class DamagedArchiveError(DataError):
    """An archive is not whole, or is no archive; another copy of it may be."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may come out of an archive. ``top`` is a folder left away, ``only`` a pattern of what is taken."""

    num_bytes: int
    num_files: int
    top: str = ""
    only: str | None = None


@dataclass(slots=True)
class Unpacked:
    """What came out. ``skipped`` are hidden files, such as macOS packs. ``sha256`` is that of what it came from."""

    num_files: int = 0
    num_bytes: int = 0
    skipped: int = 0
    num_pictures: int = 0
    sha256: str | None = None

    def add(self, name: str, num_bytes: int = 0) -> None:
        """Count a file; of an archive's the bytes are counted as they come."""
        self.num_files += 1
        self.num_bytes += num_bytes
        self.num_pictures += name.lower().endswith(SUFFIXES)


@dataclass(slots=True)
class _Sink:
    """The folder that files are written to, and what it has taken so far."""

    archive: Path
    folder: Path
    limits: Limits
    done: Unpacked = field(default_factory=Unpacked)
    made: set[str] = field(default_factory=set)

    def wants(self, name: str) -> bool:
        """Check a name; False for what is not taken."""
        parts = self.parts(name)
        if any(part.startswith(".") or part in HIDDEN_FOLDERS for part in parts):
            self.done.skipped += 1
            return False
        return self.limits.only is None or fnmatch.fnmatchcase("/".join(parts), self.limits.only)

    def parts(self, name: str) -> list[str]:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable() or len(parts) > MAX_DEPTH:
            raise self.refuse("a name in it leads out of its folder, or is none that a file should have", name)
        try:
            too_long = any(len(part.encode()) > MAX_NAME_BYTES for part in parts)
        except UnicodeEncodeError:
            too_long = True
        if too_long or not parts:
            raise self.refuse("a name in it is none that a file should have", name)
        return parts

    def write(self, name: str, chunks: Iterator[bytes]) -> None:
        """Write one file; the first that is too much is refused before it is on the disk."""
        parts = self.parts(name)
        if self.limits.top and parts[0] == self.limits.top and len(parts) > 1:
            parts = parts[1:]
        self.done.add(parts[-1])
        if self.done.num_files > self.limits.num_files:
            raise self.refuse("it holds implausibly many files", None, f"at most {self.limits.num_files}")
        parent = "/".join(parts[:-1])
        try:
            if parent not in self.made:
                disk.make_folders(self.folder / parent)
                self.made.add(parent)
            fd = disk.create(self.folder.joinpath(*parts))
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise self.refuse("it holds two files of one name", name) from error
        try:
            for chunk in chunks:
                self.done.num_bytes += len(chunk)
                if self.done.num_bytes > self.limits.num_bytes:
                    limit = f"at most {self.limits.num_bytes:,} bytes"
                    raise self.refuse("more comes out of it than it should hold", name, limit)
                disk.write(fd, chunk)
        finally:
            os.close(fd)

    def refuse(self, what: str, name: str | None, expected: str | None = None) -> DataError:
        return DataError(
            f"the archive cannot be unpacked: {what}",
            where=str(self.archive),
            expected=expected,
            found=None if name is None else printable(name),
        )


def unpack_tar_gz(archive: Path, folder: Path, limits: Limits, on_bytes: Callable[[int], None]) -> Unpacked:
    """Write the files of a ``.tar.gz`` below ``folder``; ``on_bytes`` is told how many bytes of the archive were read.

    Raises:
        DataError: it is damaged or no such archive, or it holds what it should not.
        OSError: the disk refuses.
    """
    sink = _Sink(archive, folder, limits)
    with archive.open("rb") as raw:
        read = _Hashing(raw, on_bytes)
        most = limits.num_bytes + limits.num_files * HEADER_BYTES
        stream = _Forward(gzip.GzipFile(fileobj=cast("IO[bytes]", read), mode="rb"), most)
        try:
            with tarfile.open(fileobj=stream, mode="r:", errorlevel=2) as tar:  # type: ignore[call-overload]
                while (member := tar.next()) is not None:
                    tar.members = []  # it would keep all of them
                    _take(sink, stream, member)
            stream.finish()
        except (*_DAMAGES, tarfile.TarError, gzip.BadGzipFile, _ImplausibleError) as error:
            raise _damaged(archive, error) from error
    sink.done.sha256 = read.digest.hexdigest()
    return sink.done


def unpack_zip(archive: Path, folder: Path, limits: Limits, on_bytes: Callable[[int], None]) -> Unpacked:
    """Write the files of a ``.zip`` below ``folder``; as :func:`unpack_tar_gz`, which see."""
    sink = _Sink(archive, folder, limits)
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                if (member.external_attr >> 16) & MODE_MASK == SYMLINK_MODE:
                    raise sink.refuse("it holds a link", member.filename)
                if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise sink.refuse("a file in it is encrypted, or packed in an unknown way", member.filename)
                if not member.is_dir() and sink.wants(member.filename):
                    with opened.open(member) as file:
                        sink.write(member.filename, iter(lambda: file.read(CHUNK_BYTES), b""))
                on_bytes(member.compress_size)
    except (*_DAMAGES, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise _damaged(archive, error) from error
    return sink.done


def _take(sink: _Sink, stream: _Forward, member: tarfile.TarInfo) -> None:
    if member.isdir():
        if member.name.strip("./") or member.name.startswith("/"):
            sink.parts(member.name)
        return
    if not member.isreg() or member.issparse():
        raise sink.refuse("it holds a link, a device or the like", member.name)
    if sink.wants(member.name):
        sink.write(member.name, stream.chunks(member.size))


def _damaged(archive: Path, error: Exception) -> DamagedArchiveError:
    return DamagedArchiveError(
        "the archive is damaged, or is none",
        where=str(archive),
        found=printable(str(error)) or type(error).__name__,
        hint="it may have been damaged on the way, or replaced by something else",
    )


class _ImplausibleError(Exception):
    """A header asks for more memory than any has need of."""


class _Hashing:
    """A file that is read once, with its sha256 and a word on every read."""

    def __init__(self, raw: IO[bytes], on_bytes: Callable[[int], None]) -> None:
        self._raw, self._on_bytes = raw, on_bytes
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self.digest.update(data)
        self._on_bytes(len(data))
        return data


class _Forward:
    """What ``tarfile`` needs of a file, over a stream that only goes on, and no further than ``limit``."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream, self._limit = stream, limit
        self._position = 0
        self._recent = b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        while self._position < position:
            if not self.read(min(CHUNK_BYTES, position - self._position)):
                raise EOFError("the archive ends early")
        if self._position > position:
            raise ValueError("the archive's files overlap")
        return position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_READ_BYTES:
            raise _ImplausibleError(f"a header of {size} bytes")
        self._recent = bytes(self._stream.read(size))
        self._position += len(self._recent)
        if self._position > self._limit:
            raise _ImplausibleError("it holds implausibly much")
        return self._recent

    def chunks(self, size: int) -> Iterator[bytes]:
        """Yield the next ``size`` bytes."""
        while size:
            data = self.read(min(size, CHUNK_BYTES))
            if not data:
                raise EOFError("the archive ends early")
            size -= len(data)
            yield data

    def finish(self) -> None:
        """Check that the tar ended where it says so, and read to the stream's end, which compares its checksum."""
        if self._recent != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
            raise EOFError("the archive ends early, or is damaged there")
        left = MAX_TAIL_BYTES
        while data := self._stream.read(CHUNK_BYTES):
            left -= len(data)
            if left < 0:
                raise _ImplausibleError("much follows the end of the archive")
