"""What a run says of itself: metrics.jsonl, and whoever else listens. Nothing here may end a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from unet_surgery.distill.config import RunConfig
from unet_surgery.distill.metrics import Metrics
from unet_surgery.distill.trackers import Trackers
from unet_surgery.errors import OutputError

__all__ = ["Journal", "NoJournal"]

log = logging.getLogger(__name__)

Values = Mapping[str, float | str]


class Journal:
    """A context manager, in the main process. A disk that refuses a line is asked again at the next one.

    Raises:
        OutputError: metrics.jsonl cannot be opened when the run begins.
        MissingExtraError, RunError: a tracker is not installed, or does not start.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        self._folder = folder
        self._trackers = Trackers(config, folder)
        self._metrics = Metrics(folder, step=step)
        self._unwritten: list[tuple[int, Values]] = []

    def __enter__(self) -> Journal:
        try:
            self._trackers.__enter__()
        except BaseException:
            self._metrics.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trackers.__exit__(kind, error, trace)
        self._metrics.close()

    def write(self, step: int, values: Values) -> None:
        """Write a line, and those that could not be written before it."""
        self._unwritten.append((step, values))
        try:
            while self._unwritten:
                self._metrics.append(*self._unwritten[0])
                del self._unwritten[0]
        except OutputError as error:
            log.warning("metrics of %d looks wait for the disk: %s", len(self._unwritten), error.what)
        self._trackers.log(step, values)

    def sync(self) -> None:
        """Force what was written to the disk, so that no checkpoint is newer than its metrics."""
        self._metrics.sync()

    def go_back(self, step: int) -> None:
        """Forget the lines after ``step``."""
        self._metrics.close()
        self._unwritten.clear()
        self._metrics = Metrics(self._folder, step=step)


class NoJournal:
    """What the other processes have in its place."""

    def write(self, step: int, values: Values) -> None:
        pass

    def sync(self) -> None:
        pass

    def go_back(self, step: int) -> None:
        pass
