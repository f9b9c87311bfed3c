"""Prompts from what people have: a text, a file with one a line, a table with a column of them, a folder's metadata.

Every prompt has a place in its set, which decides its noise and its picture's name; so nothing is left out in silence.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.jsonfile import read_regular
from unet_surgery.data.captions import check_caption
from unet_surgery.data.coco import first_captions
from unet_surgery.data.imagefolder import METADATA
from unet_surgery.data.reasons import BadSampleError
from unet_surgery.errors import DataError, SurgeryError, UsageError, first_few, printable

__all__ = ["COLUMNS", "PromptSet", "prompt_set", "read_prompts"]

COLUMNS = ("text", "caption", "prompt")
"""What a column of prompts is called, where none is named: the first of these that is there."""

SUFFIXES = (".txt", ".csv", ".jsonl", ".json", ".parquet")
MAX_BYTES = 1 << 30

Found = Iterator[tuple[str, object]]
"""Where a prompt stands, such as ``captions.csv:7``, and what stands there."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in their order. ``name`` is the file's name, or ``text``; ``num_before_limit`` how many the file has."""

    name: str
    texts: tuple[str, ...]
    num_before_limit: int

    @property
    def sha256(self) -> str:
        """Return the sha256 of the prompts in UTF-8, a NUL after each: the same from whatever file they came."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()


def read_prompts(spec: str | Path, *, column: str | None = None, limit: int | None = None) -> PromptSet:
    """Return the prompts that ``spec`` means: a file, a folder that holds metadata.csv or metadata.jsonl, or a text.

    Of a .txt every line that is not blank is a prompt. A .csv, .jsonl, .json (a list) or .parquet has them in
    ``column`` (:data:`COLUMNS` if None); lists of texts need none. A .json may also be COCO's captions: then the first
    caption of each image is taken, the images as they are listed. Only the first ``limit`` are kept.

    Raises:
        DataError: there is no such file or column, or a prompt is missing, blank or no text; names the line.
        UsageError: ``limit`` is not positive.
    """
    if limit is not None and limit < 1:
        raise UsageError("limit is not a positive number", found=str(limit))
    text = str(spec)
    if not text.strip():
        raise UsageError("the prompt is empty text", hint="give a text, or a file of prompts")
    path = _file(text)
    if path is None:
        return prompt_set("text", [text])
    texts: list[str] = []
    for where, value in _values(path, column):
        try:
            texts.append(check_caption(value))
        except BadSampleError as error:
            raise DataError(
                "a prompt cannot be used", where=where, expected="a text that is not blank", found=_fault(error)
            ) from error
    if not texts:
        raise DataError("the file holds no prompts", where=str(path))
    return PromptSet(path.name, tuple(texts[:limit]), len(texts))


def prompt_set(name: str, texts: Sequence[str]) -> PromptSet:
    """Return prompts that are at hand already.

    Raises:
        DataError: there are none, or one holds a control character or half a character. One may be empty.
    """
    if not texts:
        raise DataError("there are no prompts")
    for number, text in enumerate(texts):
        try:
            if text:
                check_caption(text)
        except BadSampleError as error:
            raise DataError("a prompt cannot be used", where=f"prompt {number}", found=_fault(error)) from error
    return PromptSet(name, tuple(texts), len(texts))


def _fault(error: BadSampleError) -> str:
    what = {
        "caption-missing": "nothing",
        "caption-empty": "a blank one",
        "caption-huge": "one of an implausible length",
    }
    return what.get(error.reason, error.found or error.reason)


def _file(text: str) -> Path | None:
    """Return the file that is meant, or None for a text."""
    path = Path(text).expanduser()
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, ValueError):  # longer than any name, or with a NUL
        return None
    if is_folder:
        for name in METADATA:
            if (path / name).is_file():
                return path / name
        raise DataError("the folder names no prompts", where=str(path), expected=" or ".join(METADATA))
    if is_there and path.suffix not in SUFFIXES:
        raise DataError(
            "the file's kind is not known",
            where=str(path),
            expected=", ".join(SUFFIXES),
            found=path.suffix or "no suffix",
        )
    if is_there:
        return path
    if path.suffix in SUFFIXES and not any(c in text for c in "\n\r"):
        raise DataError("there is no such file", where=printable(text), hint="a prompt itself may not end like a file")
    return None


def _values(path: Path, column: str | None) -> Found:
    if path.suffix == ".parquet":
        yield from _parquet(path, column)
        return
    text = _text(path)
    match path.suffix:
        case ".txt":
            for number, line in enumerate(io.StringIO(text), 1):
                if line.strip():
                    yield f"{path}:{number}", line.rstrip("\r\n")
        case ".csv":
            yield from _csv(path, text, column)
        case ".jsonl":
            for number, line in enumerate(io.StringIO(text), 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _of_row(_json(line.strip(), path, number - 1), column, where)
        case _:
            yield from _of_json(path, _json(text, path, 0), column)


def _text(path: Path) -> str:
    try:
        data = read_regular(path, MAX_BYTES)
    except SurgeryError as error:
        raise DataError(error.what, where=error.where, expected=error.expected, found=error.found) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            "the file is not UTF-8 text", where=f"{path}:{line}", found=f"byte 0x{data[error.start]:02x}"
        ) from error


def _csv(path: Path, text: str, column: str | None) -> Found:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    place = None
    blank: list[str] = []  # lines that are, unless no row follows
    while True:
        where = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError("the file is not a table", where=where, found=printable(str(error))) from error
        if row is None:
            return
        if place is None:
            place = row.index(_column(row, column, str(path)))
            width = len(row)
        else:
            if len(row) > width:
                raise DataError(
                    "a row has more fields than there are columns",
                    where=where,
                    expected=str(width),
                    found=str(len(row)),
                    hint="a prompt with commas needs quotes around it",
                )
            if not row:
                blank.append(where)
                continue
            yield from ((line, "") for line in blank)
            blank.clear()
            yield where, row[place] if place < len(row) else None


def _of_json(path: Path, data: Any, column: str | None) -> Found:
    if isinstance(data, list):
        for number, row in enumerate(data):
            where = f"{path}: entry {number}"
            yield where, _of_row(row, column, where)
    elif isinstance(data, dict) and isinstance(data.get("annotations"), list) and isinstance(data.get("images"), list):
        yield from _coco(path, data)
    else:
        raise DataError(
            "the file holds no list of prompts",
            where=str(path),
            expected="a list of texts or of objects, or COCO's captions",
            found=f"an object of {first_few(list(data))}" if isinstance(data, dict) else type(data).__name__,
        )


def _coco(path: Path, data: Mapping[str, Any]) -> Found:
    for image, caption in first_captions(data, str(path)):
        yield f"{path}: image {printable(image['id'])}", caption


def _of_row(row: Any, column: str | None, where: str) -> object:
    if isinstance(row, dict):
        return row[_column(list(row), column, where)]
    return row


def _column(there: Sequence[str], wanted: str | None, where: str) -> str:
    names = COLUMNS if wanted is None else (wanted,)
    for name in names:
        if name in there:
            return name
    raise DataError(
        "there is no column of prompts",
        where=where,
        expected=" or ".join(map(printable, names)),
        found=first_few(list(there)) or "no columns",
        hint="name it with --column",
    )


def _json(text: str, path: Path, lines_before: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{lines_before + error.lineno}"
        raise DataError("the file is not valid JSON", where=where, found=printable(error.msg)) from error
    except (ValueError, RecursionError) as error:  # digits or depth beyond all measure
        raise DataError("the file is not valid JSON", where=str(path), found=printable(str(error))) from error


def _parquet(path: Path, column: str | None) -> Found:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            name = _column(file.schema_arrow.names, column, str(path))
            number = 0
            for batch in file.iter_batches(columns=[name]):
                for value in batch.column(0).to_pylist():
                    yield f"{path}: row {number}", value
                    number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            "the file is not a readable Parquet table", where=str(path), found=printable(str(error))
        ) from error
