"""Training data by what its metadata says of each sample: ``score>=6.5``, ``style=='photo'``.

A filter compares one column with one number or text; of several, all must hold. A sample that has no value there (an
empty field, null, NaN) meets none, not even ``!=``. What a filter leaves out is not bad: it is counted apart, and the
samples that stay are numbered anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from unet_surgery.data.conditions import Condition, parse_filter
from unet_surgery.data.sources import Broken, RawSample, Source
from unet_surgery.errors import DataError, first_few, printable

__all__ = ["FilteredSource", "Row", "RowSource", "filtered"]

MAX_SEEN = 1000

Row = tuple[str, Mapping[str, object]]
"""Where a sample is described, such as ``metadata.csv:7``, and what is said of it there, by column."""


class RowSource(Source, Protocol):
    """A source that knows more of its samples than their captions."""

    def rows(self, columns: Sequence[str]) -> Iterator[Row | Broken]:
        """Yield what is known of each sample, in order: ``columns`` at least, where it has them."""


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
