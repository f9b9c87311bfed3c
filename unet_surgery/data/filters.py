"""Training data by what its metadata says of each sample: ``score>=6.5``, ``style=='photo'``.

A filter compares one column with one number or text; of several, all must hold. A sample that has no value there (an
empty field, null, NaN) meets none, not even ``!=``. What a filter leaves out is not bad: it is counted apart, and the
samples that stay are numbered anew.
"""

from __future__ import annotations

import hashlib
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from unet_surgery.data.sources import Broken, RawSample, Source
from unet_surgery.errors import DataError, UsageError, first_few, printable

__all__ = ["Condition", "FilteredSource", "Row", "RowSource", "filtered", "parse_filter"]

MAX_FILTER_CHARS = 500
MAX_SEEN = 1000
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

Row = tuple[str, Mapping[str, object]]
"""Where a sample is described, such as ``metadata.csv:7``, and what is said of it there, by column."""


class RowSource(Source, Protocol):
    """A source that knows more of its samples than their captions."""

    def rows(self, columns: Sequence[str]) -> Iterator[Row | Broken]:
        """Yield what is known of each sample, in order: ``columns`` at least, where it has them."""


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


def filtered(source: Source, filters: Sequence[str]) -> Source:
    """Return ``source`` without the samples that do not meet all of ``filters``; the source itself if there are none.

    Raises:
        UsageError: a filter cannot be read.
        DataError: no sample has such a column, a number is compared with what is none, or nothing is left.
    """
    conditions = tuple(parse_filter(text) for text in filters)
    return FilteredSource(source, conditions) if conditions else source


class FilteredSource:
    """The samples of ``source`` that meet all of ``conditions``, in their order.

    A sample whose row is broken stays, as a bad one: nobody knows what it would have met.
    """

    def __init__(self, source: Source, conditions: Sequence[Condition]) -> None:
        self._source = source
        self.conditions = tuple(conditions)
        columns = list(dict.fromkeys(condition.column for condition in conditions))
        kept: list[int] = []
        self._broken: dict[int, Broken] = {}
        digest = hashlib.sha256(source.fingerprint.encode())
        seen: dict[str, None] = {}
        for index, row in enumerate(_rows(source, columns)):
            if isinstance(row, Broken):
                self._broken[index] = row
                kept.append(index)
                continue
            where, values = row
            if len(seen) < MAX_SEEN:
                seen |= dict.fromkeys(values)
            seen |= dict.fromkeys(column for column in columns if column in values)
            found = [values.get(column) for column in columns]
            digest.update(repr(found).encode("utf-8", "backslashreplace") + b"\0")
            verdicts = [c.admits(values.get(c.column), where) for c in self.conditions]  # of all: each may refuse
            if all(verdicts):
                kept.append(index)
        _check_columns(columns, seen)
        if not kept:
            raise DataError(
                "no sample meets the filter", expected=_spoken(self.conditions), found=f"none of {len(source)} samples"
            )
        self._kept = np.array(kept, np.int64)
        self.num_left_out = len(source) - len(kept)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._kept)

    def id(self, index: int) -> str:
        return self._source.id(int(self._kept[index]))

    def read(self, index: int) -> RawSample:
        place = int(self._kept[index])
        if place in self._broken:
            raise self._broken[place].refuse()
        return self._source.read(place)


def _rows(source: Any, columns: Sequence[str]) -> Iterator[Row | Broken]:
    rows: Iterator[Row | Broken] = source.rows(columns)
    return rows


def _check_columns(columns: Sequence[str], seen: Iterable[str]) -> None:
    there = list(seen)
    for column in columns:
        if column not in there:
            raise DataError(
                "a filter names a column that is not there",
                expected=first_few(there) or "any column at all",
                found=printable(column),
                hint="a name with spaces stands in double quotes",
            )


def _spoken(conditions: Sequence[Condition]) -> str:
    return " and ".join(printable(str(condition)) for condition in conditions)


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
