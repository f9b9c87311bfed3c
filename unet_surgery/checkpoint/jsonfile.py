"""JSON with nothing ambiguous in it: duplicate keys, NaN, huge integers and bad UTF-8 are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from unet_surgery.errors import SurgeryError, TeacherError, printable

__all__ = ["parse_object", "read_object"]

MAX_BYTES = 8 << 20
MAX_DIGITS = 20


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of at most 8 MiB.

    Raises:
        TeacherError: the file cannot be read or is not one unambiguous JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise TeacherError("a JSON file is too large", where=str(path), expected="8 MiB", found=f"{size} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise TeacherError("a JSON file cannot be read", where=str(path), found=error.strerror or str(error)) from error
    try:
        return parse_object(data)
    except ValueError as error:
        raise TeacherError("this is not a valid JSON object", where=str(path), found=printable(str(error))) from error
    except SurgeryError as error:
        raise error.at(str(path)) from None


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
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_bounded_int)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("JSON, but not an object")  # noqa: TRY004  # the one type that callers expect
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {printable(key)!r} stands twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
