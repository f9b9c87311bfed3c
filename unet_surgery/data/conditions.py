"""Comparisons of a column with a number or a text, as people write them: ``score>=6.5``, ``style=='photo'``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unet_surgery.errors import DataError, UsageError, printable

__all__ = ["Condition", "parse_filter"]

MAX_FILTER_CHARS = 500
MAX_DIGITS = 300

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_FILTER = re.compile(
    r"""\s*(?:"(?P<quoted>(?:[^"]|"")+)"|(?P<column>[^\s<>=!'"]+))\s*(?P<operator>[<>]=?|[=!]=)\s*(?P<value>.*?)\s*""",
    re.DOTALL,
)
_BARE = re.compile(r"""[^\s<>=!'"]+""")
_TEXT = re.compile(r"'((?:[^']|'')*)'", re.DOTALL)
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison; as a text it is what :func:`parse_filter` reads."""

    column: str
    operator: str
    value: int | float | str

    def __str__(self) -> str:
        column = self.column
        if not _BARE.fullmatch(column):
            column = '"' + column.replace('"', '""') + '"'
        value = "'" + self.value.replace("'", "''") + "'" if isinstance(self.value, str) else repr(self.value)
        return f"{column}{self.operator}{value}"

    def admits(self, found: object, where: str) -> bool:
        """Return whether a sample with ``found`` in the column meets this.

        Raises:
            DataError: a number is compared, and this is none.
        """
        if _is_missing(found):
            return False
        if isinstance(self.value, str):
            return _OPERATORS[self.operator](found if isinstance(found, str) else _spelled(found), self.value)
        number = _number(found)
        if number is None:
            raise DataError(
                f"{printable(self.column)} is compared with a number, and here it is none",
                where=where,
                expected=f"a number, for {printable(str(self))}",
                found=printable(found),
            )
        return not math.isnan(number) and _OPERATORS[self.operator](number, self.value)


def parse_filter(text: str) -> Condition:
    """Return the comparison that ``text`` says: ``COLUMN OP NUMBER`` or ``COLUMN OP 'TEXT'``.

    ``OP`` is ``>=``, ``<=``, ``>``, ``<``, ``==`` or ``!=``; for a text only the last two. A column whose name has
    spaces stands in double quotes. A quote within quotes is written twice.

    Raises:
        UsageError: it says anything else.
    """
    match = _FILTER.fullmatch(text) if len(text) <= MAX_FILTER_CHARS else None
    if match is None:
        raise _no_filter(text, "COLUMN>=NUMBER, COLUMN=='TEXT' …; operators: " + " ".join(_OPERATORS))
    quoted, value = match["quoted"], match["value"]
    column = match["column"] if quoted is None else quoted.replace('""', '"')
    if said := _TEXT.fullmatch(value):
        if match["operator"] not in ("==", "!="):
            raise _no_filter(text, "== or != for a text", "a number has no quotes")
        return Condition(column, match["operator"], said[1].replace("''", "'"))
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise _no_filter(text, "a number, or a text in single quotes", "style=='photo'; the shell takes quotes away")
    return Condition(column, match["operator"], number)


def _is_missing(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() == "nan"
    return value is None or (isinstance(value, float) and math.isnan(value))


def _spelled(value: object) -> str:
    """Return what JSON calls a value that is no text, so that ``nsfw=='true'`` means what it seems to."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(value: object) -> int | float | None:
    """Return the number that a value is or spells, None if it is none; true and false are none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    if not isinstance(value, str) or len(value) > MAX_DIGITS:
        return None
    text = value.strip()
    if _INTEGER.fullmatch(text):
        return int(text)
    return _number(float(text)) if _NUMBER.fullmatch(text) else None


def _no_filter(text: str, expected: str, hint: str | None = None) -> UsageError:
    return UsageError("this is not a filter", expected=expected, found=printable(text), hint=hint)
