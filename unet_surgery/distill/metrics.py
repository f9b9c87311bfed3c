"""``metrics.jsonl``: what a run measured, a line of JSON for each time it looked, in the order of its steps."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from math import isfinite, nan
from pathlib import Path
from types import TracebackType
from typing import Any

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.jsonfile import parse_object
from unet_surgery.errors import OutputError

__all__ = ["FEATURE", "METRICS", "RELATIVE", "Metrics", "last_step", "sum_of_features", "term"]

METRICS = "metrics.jsonl"
FEATURE = "feature/"
"""What the names of feature terms begin with; the student's tap follows."""
RELATIVE = "relative/"
"""The same of these terms by the mean square of the teacher's activation in the same samples: 1 is as bad as zeros."""

Value = float | int | str | bool | None


class Metrics:
    """A context manager that appends whole lines to ``metrics.jsonl`` of the folder ``run``.

    A run that goes on from ``step`` drops the lines of later steps, and half a line at the end: it writes them again,
    and the file becomes that of a run that never stopped. A run that begins has ``step`` 0.

    Raises:
        OutputError: the file cannot be opened, read or written.
    """

    def __init__(self, run: Path, *, step: int) -> None:
        self.path = Path(run) / METRICS
        self._last_step = step
        self._is_whole = True
        try:
            self._fd = disk.open_for_update(self.path)
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._end = _end_of(self._fd, step)
            self._cut()
        except OSError as error:
            os.close(self._fd)
            raise self._failed(error) from error
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, step: int, values: Mapping[str, Value]) -> None:
        """Append the line of ``step``; a number that is not finite becomes null, for JSON has none.

        Raises:
            OutputError: the disk refuses; the file is then as it was, and the next line may be tried.
            ValueError: the steps go backwards, or ``values`` holds a ``step`` of its own.
        """
        if step < self._last_step or "step" in values:
            raise ValueError(f"no line for step {step} can follow that of step {self._last_step}")
        line = {"step": step, **{name: _finite(value) for name, value in values.items()}}
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            if not self._is_whole:
                self._cut()
            self._is_whole = False
            disk.write_at(self._fd, data, self._end)
            self._is_whole = True
        except OSError as error:
            with contextlib.suppress(OSError):
                self._cut()
            raise self._failed(error) from error
        self._end += len(data)
        self._last_step = step

    def sync(self) -> None:
        """Force the lines to disk: call it before a checkpoint, which counts on those of the steps up to its own.

        Raises:
            OutputError: the disk refuses.
        """
        try:
            disk.fsync(self._fd)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        os.close(self._fd)

    def _cut(self) -> None:
        if os.fstat(self._fd).st_size != self._end:
            disk.truncate(self._fd, self._end)
        self._is_whole = True

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            "the run's metrics cannot be written", where=str(self.path), found=error.strerror or str(error)
        )


def _end_of(fd: int, step: int) -> int:
    """Return where the last line ends that is whole and not of a step after ``step``."""
    position = end = 0
    with open(fd, "rb", closefd=False) as file:
        for line in file:
            position += len(line)
            if line.endswith(b"\n") and _is_kept(line, step):
                end = position
    return end


def _is_kept(line: bytes, step: int) -> bool:
    found = _step_of(line)
    return found is not None and found <= step


def _step_of(line: bytes) -> int | None:
    """Return the step that a line is of, None where it is none of ours."""
    try:
        found = parse_object(line).get("step")
    except ValueError:
        return None
    return found if type(found) is int else None


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not isfinite(value) else value


def sum_of_features(line: Mapping[str, Any]) -> float:
    """Return the sum of a line's feature terms, unweighted; NaN where one was never finite."""
    return float(sum(term(line, key) for key in line if key.startswith(FEATURE)))


def term(line: Mapping[str, Any], name: str) -> float:
    """Return a number of a line: 0 where the line has none of that name, NaN where it was never finite."""
    value = line.get(name, 0.0)
    return nan if value is None else float(value)


def last_step(run: Path) -> int:
    """Return the step of the last whole line of a run's metrics; 0 where there is none."""
    try:
        lines = (run / METRICS).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    steps = (_step_of(line) for line in reversed(lines) if line.endswith(b"\n"))
    return next((step for step in steps if step is not None), 0)
