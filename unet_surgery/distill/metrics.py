"""``metrics.jsonl``: what a run measured, a line of JSON for each time it looked, in the order of its steps."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.jsonfile import parse_object
from unet_surgery.errors import OutputError

__all__ = ["FEATURE", "METRICS", "Metrics", "sum_of_features"]

METRICS = "metrics.jsonl"
FEATURE = "feature/"
"""What the names of feature terms begin with; the student's tap follows."""

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
    try:
        found = parse_object(line).get("step")
    except ValueError:
        return False
    return type(found) is int and found <= step


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not isfinite(value) else value


def sum_of_features(line: Mapping[str, Any]) -> float:
    """Return the sum of a line's feature terms, unweighted."""
    return float(sum(value for key, value in line.items() if key.startswith(FEATURE)))
