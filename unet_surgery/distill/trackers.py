"""Who else hears of a run's metrics: tensorboard, wandb and trackio, through accelerate's trackers."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from unet_surgery.checkpoint import disk
from unet_surgery.distill.config import RunConfig
from unet_surgery.distill.identity import flat
from unet_surgery.errors import MissingExtraError, printable

__all__ = ["Trackers"]

TENSORBOARD, ID = "tensorboard", "run.id"


class Trackers:
    """A context manager; in the main process only. A run that goes on continues its lines where the tracker can.

    Raises:
        MissingExtraError: a tracker's package is not installed.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._id = _own_id(folder) if config.log.trackers else ""
        self._started: list[Any] = []

    def __enter__(self) -> Trackers:
        for name in self._config.log.trackers:
            self._started.append(self._start(name))
        return self

    def _start(self, name: str) -> Any:
        try:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            tracker = LOGGER_TYPE_TO_CLASS[name](self._config.log.project, **self._options(name))
            tracker.start()
        except ImportError as error:
            raise MissingExtraError(
                f"log.trackers names {name}, which is not installed",
                found=printable(str(error)),
                hint=f"pip install accelerate {name}, or leave it out: metrics.jsonl has everything",
            ) from error
        tracker.store_init_configuration(
            {key: _plain(value) for key, value in flat(self._config.model_dump(mode="json")).items()}
        )
        return tracker

    def _options(self, name: str) -> dict[str, Any]:
        if name == TENSORBOARD:
            return {"logging_dir": str(self._folder / TENSORBOARD)}
        if name == "wandb":
            return {"id": self._id, "name": self._config.run_name, "resume": "allow", "dir": str(self._folder)}
        return {"name": f"{self._config.run_name}-{self._id}", "resume": "allow"}

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Pass on the numbers of one look."""
        numbers = {key: value for key, value in values.items() if not isinstance(value, str)}
        for tracker in self._started:
            tracker.log(numbers, step=step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._started:
            tracker.finish()


def _own_id(folder: Path) -> str:
    """Return what trackers know this run by: made once, and kept in its folder."""
    path = folder / ID
    if not path.is_file():
        disk.replace_file(path, secrets.token_hex(6).encode(), force=True)
    return path.read_text("ascii")


def _plain(value: Any) -> str | float | bool:
    """Return a value as trackers store it: a list or nothing becomes JSON."""
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value)
