"""A folder of pictures with ``metadata.csv`` or ``metadata.jsonl``: what ``datasets`` calls an imagefolder."""

from __future__ import annotations

import csv
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.components import check_inside
from unet_surgery.checkpoint.jsonfile import read_regular
from unet_surgery.data.pictures import MAX_PICTURE_BYTES
from unet_surgery.data.reasons import BadSampleError
from unet_surgery.data.sources import CAPTION_COLUMNS, Broken, RawSample, Texts, caption_column, caption_names
from unet_surgery.errors import DataError, TeacherError, first_few, printable

__all__ = ["FolderSource", "find_metadata"]

FILE_NAME = "file_name"
METADATA = ("metadata.csv", "metadata.jsonl")

Entry = tuple[str, str | None] | Broken
"""A picture's name, beside the metadata file, and its caption as JSON (None: it has none); or what is wrong."""

OnRow = Callable[[str, Mapping[str, object]], None]
"""Called with a row's place and what stands in it, before its entry is given."""


def find_metadata(root: Path) -> list[Path]:
    """Return the metadata files: the folder's own, else those of the folders in it (``train`` alone if it has one).

    Raises:
        DataError: a folder has two, whose pictures would each be there twice.
    """
    for folders in ([root], [root / "train"], sorted(p for p in root.iterdir() if p.is_dir())):
        found = [folder / name for folder in folders for name in METADATA if (folder / name).is_file()]
        twice = next((path for path in found if sum(path.parent == other.parent for other in found) > 1), None)
        if twice is not None:
            raise DataError(
                "a folder has its metadata twice",
                where=str(twice.parent),
                expected=" or ".join(METADATA),
                found=" and ".join(METADATA),
                hint="remove one of them",
            )
        if found:
            return found
    return []


class FolderSource:
    """The samples that metadata files name, in their order."""

    def __init__(self, root: Path, metadata: Sequence[Path], *, caption: str = CAPTION_COLUMNS[0]) -> None:
        self._root, self._metadata, self._caption = root, tuple(metadata), caption
        self._broken: dict[int, Broken] = {}
        names: list[str] = []
        captions: list[str] = []
        digest = hashlib.sha256()
        for path in metadata:
            digest.update(path.read_bytes())
            folder = path.parent.relative_to(root).as_posix()
            read = _csv_entries if path.suffix == ".csv" else _json_entries
            for entry in read(path, caption):
                if isinstance(entry, Broken):
                    self._broken[len(names)] = entry
                    entry = (entry.id, None)  # noqa: PLW2901
                name, text = entry
                names.append(name if folder == "." else f"{folder}/{name}")
                captions.append("null" if text is None else text)
        if not names:
            raise DataError("the metadata names no pictures", where=str(metadata[0]))
        self._names, self._captions = Texts(names), Texts(captions)
        digest.update(repr(caption).encode())
        self._digest = digest.hexdigest()

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._digest.encode())
        for index in range(len(self)):
            try:
                size = os.stat(self._root / self._names[index]).st_size
            except (OSError, ValueError):
                size = -1
            digest.update(size.to_bytes(8, "little", signed=True))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def id(self, index: int) -> str:
        return self._names[index]

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, object]] | Broken]:
        """Yield what the metadata says of each sample, and where; it is read again for that."""
        del columns  # all are at hand
        last: list[tuple[str, Mapping[str, object]]] = []
        for path in self._metadata:
            read = _csv_entries if path.suffix == ".csv" else _json_entries
            for entry in read(path, self._caption, lambda where, row: last.append((where, row))):
                yield entry if isinstance(entry, Broken) else last[-1]
                last.clear()

    def read(self, index: int) -> RawSample:
        name, caption = self.entry(index)
        return RawSample(name, caption, _read_inside(self._root, name))

    def entry(self, index: int) -> tuple[str, Any]:
        """Return the picture's name and its caption, whatever that is, without reading the picture.

        Raises:
            BadSampleError: the row is broken.
        """
        if index in self._broken:
            raise self._broken[index].refuse()
        return self._names[index], json.loads(self._captions[index])


def _read_inside(root: Path, name: str) -> bytes:
    """Read a picture, which must lie in ``root``; links of the Hub's cache to its own blobs do."""
    path = root / name
    try:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise BadSampleError("outside", printable(name))
        if not path.exists():
            raise BadSampleError("missing", "a link to nothing" if path.is_symlink() else None)
        check_inside(root, path)
    except (OSError, ValueError, RuntimeError) as error:  # names with NUL, or longer than any; loops of links
        raise BadSampleError("missing", printable(str(error))) from error
    except TeacherError as error:
        raise BadSampleError("outside", error.found) from error
    try:
        return read_regular(path, MAX_PICTURE_BYTES)
    except TeacherError as error:
        is_huge = "large" in error.what
        raise BadSampleError("bomb" if is_huge else "unreadable", f"{error.what}: {error.found}") from error


def _csv_entries(path: Path, wanted: str, on_row: OnRow | None = None) -> Iterator[Entry]:
    """Yield the rows; bytes that are no UTF-8 become lone surrogates, which no caption may hold."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        columns = next(rows, [])
        column = caption_column(columns, wanted, str(path))
        if FILE_NAME not in columns:
            raise DataError(
                "the metadata names no files",
                where=str(path),
                expected=f"a column {FILE_NAME}",
                found=first_few(columns),
            )
        name_at, caption_at = columns.index(FILE_NAME), columns.index(column)
        while True:
            where = f"{path.name}:{rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield Broken(where, "metadata-broken", printable(str(error)))
                continue
            if row is None:
                return
            if not row:
                continue
            if len(row) > len(columns) or not (name_at < len(row) and row[name_at]):
                yield Broken(where, "metadata-broken", f"{len(row)} fields under {len(columns)} columns")
                continue
            if on_row is not None:
                on_row(where, dict(itertools.zip_longest(columns, row)))
            yield row[name_at], json.dumps(row[caption_at]) if caption_at < len(row) else None


def _json_entries(path: Path, wanted: str, on_row: OnRow | None = None) -> Iterator[Entry]:
    columns = caption_names(wanted)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield Broken(where, "metadata-broken", printable(str(error)))
                continue
            if not isinstance(row, dict) or not isinstance(row.get(FILE_NAME), str) or not row[FILE_NAME]:
                yield Broken(where, "metadata-broken", f"no {FILE_NAME}")
                continue
            if on_row is not None:
                on_row(where, row)
            yield row[FILE_NAME], json.dumps(next((row[name] for name in columns if name in row), None))
