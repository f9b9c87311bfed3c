"""Who else hears of a run: what goes wrong with a tracker is refused at the beginning, and only warned of later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training import run_data

from unet_surgery.distill import RunConfig
from unet_surgery.distill.journal import Journal
from unet_surgery.errors import RunError


class Faulty:
    """A tracker that does not do the thing that ``fails`` names; ``done`` is what was asked of any."""

    fails, done = "", list[str]()

    def __init__(self, project: str, **_: Any) -> None:
        self.name = project

    def _do(self, what: str) -> None:
        self.done.append(what)
        if what == self.fails:
            raise ConnectionError(f"no key to {what} with")

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._do("store")

    def log(self, values: dict[str, Any], step: int) -> None:
        self._do("log")

    def finish(self) -> None:
        self._do("finish")


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[Faulty]:
    """The tracker wandb is the faulty one."""
    from accelerate import tracking

    kind = type("Faulty", (Faulty,), {"done": []})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", kind)
    return kind


def journal(folder: Path, *trackers: str) -> Journal:
    data = run_data(folder, folder / "student", {"toy": {}}, log={"trackers": list(trackers)})
    return Journal(RunConfig.from_data(data), folder, 0)


@pytest.mark.parametrize(("fails", "done"), [("start", ["start"]), ("store", ["start", "store", "finish"])])
def test_a_tracker_that_does_not_start_is_refused(
    faulty: type[Faulty], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, done: list[str]
) -> None:
    """By its name; the one that had started before it is finished."""
    from accelerate import tracking

    other = type("Other", (Faulty,), {"done": []})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", other)
    faulty.fails = fails
    with (
        pytest.raises(RunError, match="the tracker wandb does not start") as caught,
        journal(tmp_path, "trackio", "wandb"),
    ):
        pass
    assert caught.value.found == f"no key to {fails} with"
    assert (faulty.done, other.done) == (done, ["start", "store", "finish"])


def test_a_tracker_that_fails_later_is_warned_of(
    faulty: type[Faulty], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faulty.fails = "log"
    with journal(tmp_path, "wandb", "wandb") as lines:
        lines.write(1, {"loss": 1.0, "stage": "main"})
        faulty.fails = "finish"
    assert faulty.done == ["start", "store"] * 2 + ["log"] * 2 + ["finish"] * 2
    assert "wandb was not told of step 1: no key to log with" in caplog.text
    assert "wandb did not end as it should: no key to finish with" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 1
