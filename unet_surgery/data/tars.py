"""WebDataset tars as img2dataset writes them: files of one sample stand together and share their name up to a dot.

The headers are read once; a sample is then read where it lies. Of a tar that was cut short, what stands before the cut
is used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unet_surgery.checkpoint.foreign import recognise
from unet_surgery.data.pictures import MAX_PICTURE_BYTES
from unet_surgery.data.reasons import BadSampleError
from unet_surgery.data.sources import CAPTION_COLUMNS, Broken, RawSample, Texts, caption_names
from unet_surgery.errors import DataError, printable

__all__ = ["TarSource", "expand_braces"]

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
MAX_TEXT_BYTES = 1 << 20
BLOCK_BYTES = 512

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")
_NOWHERE = (-1, 0)


@dataclass(slots=True)
class _Sample:
    """Where the files of one sample lie in their tar: suffix → offset and size."""

    key: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)

    def first(self, suffixes: Iterable[str]) -> tuple[int, int]:
        return next((self.files[suffix] for suffix in suffixes if suffix in self.files), _NOWHERE)


def expand_braces(pattern: str) -> list[Path]:
    """Return the paths that a pattern such as ``shards/{00000..00041}.tar`` means.

    Raises:
        DataError: it is no range of numbers, or a file is missing.
    """
    match = _RANGE.search(pattern)
    if match is not None:
        first, last = match.groups()
        if int(last) - int(first) >= 1_000_000:
            raise DataError("this range of tars is implausibly long", where=printable(pattern))
        numbers = range(int(first), int(last) + 1)
        parts = [f"{pattern[: match.start()]}{n:0{len(first)}d}{pattern[match.end() :]}" for n in numbers]
        return [path for part in parts for path in expand_braces(part)]
    if not os.path.isfile(pattern):
        raise DataError("there is no such tar", where=printable(pattern), expected="NAME.tar or {00000..00041}.tar")
    return [Path(pattern)]


class TarSource:
    """The samples of tars, one tar after the other."""

    def __init__(self, tars: Sequence[Path], *, caption: str = CAPTION_COLUMNS[0]) -> None:
        self._tars = list(tars)
        self._caption_keys = caption_names(caption)
        self._broken: dict[int, Broken] = {}
        keys: list[str] = []
        places: list[tuple[int, ...]] = []
        for number, path in enumerate(self._tars):
            for sample in _samples(path):
                if isinstance(sample, Broken):
                    self._broken[len(keys)] = sample
                    keys.append(sample.id)
                    places.append((number, *_NOWHERE, *_NOWHERE, *_NOWHERE))
                    continue
                keys.append(f"{path.name}:{sample.key}")
                found = (sample.first(PICTURES), sample.first(("txt",)), sample.first(("json",)))
                places.append((number, *itertools.chain.from_iterable(found)))
        if not keys:
            raise DataError("the tars hold no samples", where=str(self._tars[0]) if self._tars else None)
        self._keys, self._places = Texts(keys), np.array(places, np.int64)
        digest = hashlib.sha256(repr(self._caption_keys).encode())
        for path in self._tars:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        for index in range(len(keys)):
            digest.update(keys[index].encode("utf-8", "surrogatepass"))
        digest.update(self._places.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._keys)

    def id(self, index: int) -> str:
        return self._keys[index]

    def read(self, index: int) -> RawSample:
        if index in self._broken:
            raise self._broken[index].refuse()
        tar, *places = self._places[index].tolist()
        image, text, data = ((places[i], places[i + 1]) for i in (0, 2, 4))
        if image == _NOWHERE:
            raise BadSampleError("missing", "no picture beside the caption")
        if image[1] > MAX_PICTURE_BYTES:
            raise BadSampleError("bomb", f"{image[1]} bytes")
        try:
            fd = os.open(self._tars[tar], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BadSampleError("missing", error.strerror) from error
        try:
            return RawSample(self._keys[index], self._caption(fd, text, data), _read(fd, image))
        finally:
            os.close(fd)

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, object]] | Broken]:
        """Yield what the JSON beside each picture says; a sample without one has no values."""
        del columns  # all are at hand
        for number, path in enumerate(self._tars):
            with open(path, "rb") as file:
                for index in np.flatnonzero(self._places[:, 0] == number).tolist():
                    yield self._row(file.fileno(), index)

    def _row(self, fd: int, index: int) -> tuple[str, Mapping[str, object]] | Broken:
        if index in self._broken:
            return self._broken[index]
        offset, size = self._places[index, 5:7].tolist()
        try:
            return self._keys[index], {} if (offset, size) == _NOWHERE else _json_object(fd, (offset, size))
        except BadSampleError as error:
            return Broken(self._keys[index], error.reason, error.found or "")

    def _caption(self, fd: int, text: tuple[int, int], data: tuple[int, int]) -> object:
        """Return the text file's content, else the value in the JSON."""
        for place in (text, data):
            _check_size(place)
        if text != _NOWHERE:
            return _read(fd, text).decode("utf-8-sig", "surrogateescape")
        if data == _NOWHERE:
            return None
        values = _json_object(fd, data)
        return next((values[key] for key in self._caption_keys if key in values), None)


def _check_size(place: tuple[int, int]) -> None:
    if place[1] > MAX_TEXT_BYTES:
        raise BadSampleError("caption-huge", f"{place[1]} bytes")


def _json_object(fd: int, place: tuple[int, int]) -> dict[str, object]:
    _check_size(place)
    try:
        values = json.loads(_read(fd, place))
    except (ValueError, RecursionError) as error:
        raise BadSampleError("metadata-broken", printable(str(error))) from error
    if not isinstance(values, dict):
        raise BadSampleError("metadata-broken", "JSON, but not an object")
    return values


def _read(fd: int, place: tuple[int, int]) -> bytes:
    offset, size = place
    parts = []
    while size:
        try:
            part = os.pread(fd, size, offset)
        except OSError as error:
            raise BadSampleError("unreadable", error.strerror) from error
        if not part:
            raise BadSampleError("truncated", "the tar ends within it")
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


def _samples(path: Path) -> Iterator[_Sample | Broken]:
    """Group neighbours of one key; a name without a dot, and what is no regular file, belong to no sample."""
    current: _Sample | None = None
    for member in _members(path):
        if isinstance(member, Broken):
            if current is not None:
                yield current
            yield member
            return
        match = _MEMBER.fullmatch(member.name)
        if not member.isreg() or member.issparse() or match is None:
            continue
        key, suffix = match[1], match[2].lower()
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = _Sample(key)
        current.files.setdefault(suffix, (member.offset_data, member.size))
    if current is not None:
        yield current


def _members(path: Path) -> Iterator[tarfile.TarInfo | Broken]:
    """Yield the members, of which the last may be cut short, and then a Broken if the tar has no end."""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                yield member
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        if size == 0 or not _looks_like_a_tar(path):
            raise DataError(
                "this is not a tar", where=str(path), found=_what(path, size) or printable(str(error))
            ) from error
        yield _cut(path, size)
        return
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(BLOCK_BYTES)
    if len(block) < BLOCK_BYTES or any(block):
        yield _cut(path, end)


def _cut(path: Path, at: int) -> Broken:
    return Broken(f"{path.name}:(from byte {at})", "truncated", "the tar ends, or is damaged, before its end")


def _looks_like_a_tar(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(BLOCK_BYTES)[257:262] == b"ustar"


def _what(path: Path, size: int) -> str | None:
    if size == 0:
        return "an empty file"
    with open(path, "rb") as file:
        return recognise(file.read(64), size)
