"""JSON with nothing ambiguous in it: duplicate keys, NaN, huge integers, lone surrogates and bad UTF-8 are refused."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from math import isinf
from pathlib import Path
from typing import Any, NoReturn

from unet_surgery.checkpoint.foreign import recognise
from unet_surgery.errors import SurgeryError, TeacherError, printable

__all__ = ["MAX_JSON_BYTES", "kind_of", "open_regular", "parse_object", "read_object", "read_regular"]

MAX_JSON_BYTES = 8 << 20
SURROGATES = range(0xD800, 0xE000)


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in a regular file of at most ``max_bytes``.

    Raises:
        TeacherError: the file cannot be read or is not one unambiguous JSON object.
    """
    data = read_regular(path, max_bytes)
    try:
        return parse_object(data)
    except ValueError as error:
        what = recognise(data[:64], len(data))
        raise TeacherError(
            "this is not a valid JSON object",
            where=str(path),
            found=what or printable(str(error)),
            hint="download it again" if what else None,
        ) from error
    except SurgeryError as error:
        raise error.at(str(path)) from None


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file: a FIFO is not waited for, a device not read.

    Raises:
        TeacherError: it is something else, larger than ``max_bytes``, or cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise TeacherError(
                "a file is implausibly large",
                where=str(path),
                expected=f"at most {max_bytes} bytes",
                found=f"{size} bytes",
            )
        return file.read(max_bytes)


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading: a FIFO is not waited for, a device not read.

    Raises:
        TeacherError: it is something else, or cannot be read, also within.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TeacherError("a file cannot be read", where=str(path), found=error.strerror or str(error)) from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise TeacherError("this is not a regular file", where=str(path), found=kind_of(mode))
        with open(fd, "rb", closefd=False) as file:
            yield file
    except OSError as error:
        raise TeacherError("a file cannot be read", where=str(path), found=error.strerror) from error
    finally:
        os.close(fd)


def kind_of(mode: int) -> str:
    """Return in words what a file of this mode is."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object that ``data`` holds.

    Raises:
        ValueError: it holds anything else; the message says what.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    try:
        # integers of more than 4300 digits are a ValueError of Python's own
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:
            _refuse_surrogates(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("JSON, but not an object")  # noqa: TRY004  # the one type that callers expect
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {printable(twice)!r} stands twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if isinf(number):
        raise ValueError(f"a number beyond what a float holds ({printable(digits)})")
    return number


def _refuse_surrogates(value: Any) -> None:
    """Half a character cannot be written as UTF-8, so a plan that carries it could not be stored."""
    if isinstance(value, str):
        if any(ord(c) in SURROGATES for c in value):
            raise ValueError(f"half a character (a lone surrogate) in {printable(value)!r}")
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_surrogates(key)
            _refuse_surrogates(item)
    elif isinstance(value, list):
        for item in value:
            _refuse_surrogates(item)
