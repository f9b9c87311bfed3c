"""The end of a run: what is written of it, and what must not be."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from training import run_data

import unet_surgery as us
from unet_surgery.distill import RunConfig
from unet_surgery.distill.finish import MAX_LINES, _public, write_trained
from unet_surgery.errors import TrainingError


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "task": 0.5, "output_kd": 0.25, "feature/down_blocks.0": 0.25}


def written(
    places: dict[str, Path], out: Path, weights: dict[str, torch.Tensor], *, start: str = "student", **more: Any
) -> dict[str, Any]:
    """Return training.json of a student whose weights are ``weights``."""
    config = RunConfig.from_data(run_data(out.parent / "run", places[start], {"cache": str(places["cache"])}))
    given = {"num_samples": 10, "metrics": [line(1)], "samples": None, **more}
    write_trained(places[start], out, config, weights, **given)
    training: dict[str, Any] = json.loads((out / "training.json").read_text())
    return training


@pytest.fixture(scope="module")
def weights(places: dict[str, Path]) -> dict[str, torch.Tensor]:
    return dict(us.load_unet(places["student"]).state_dict())


def test_an_average_that_does_not_fit_the_dtype_is_not_written(
    places: dict[str, Path], weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The student was stored in fp16, which ends at 65,504; the average of its fp32 masters does not."""
    us.prune("bk_tiny", "tiny-random", tmp_path / "halves", dtype="fp16")
    places = {**places, "halves": tmp_path / "halves"}
    name = sorted(weights)[5]
    largest = weights[name].clone()
    largest.view(-1)[0] = -70_000.0
    with pytest.raises(TrainingError, match="does not fit float16") as caught:
        written(places, tmp_path / "out", {**weights, name: largest}, start="halves")
    assert (caught.value.where, caught.value.found) == (name, "70000")
    assert not (tmp_path / "out").exists()
    written(places, tmp_path / "out", weights, start="halves")
    written(places, tmp_path / "long", {**weights, name: largest})  # fp32 holds it


@pytest.mark.parametrize("count", [1, MAX_LINES, MAX_LINES + 1, 25_000])
def test_metrics_are_thinned_to_what_a_repository_can_hold(
    places: dict[str, Path], weights: dict[str, torch.Tensor], tmp_path: Path, count: int
) -> None:
    """Evenly, with the first and the last, a line each, and the file says so."""
    training = written(places, tmp_path / "out", weights, metrics=[line(step) for step in range(1, count + 1)])
    steps = [found["step"] for found in training["metrics"]]
    assert len(steps) == min(count, MAX_LINES)
    assert (steps[0], steps[-1]) == (1, count)
    assert len({b - a for a, b in itertools.pairwise(steps)}) <= 2
    assert training["metrics_thinned"] == (None if count <= MAX_LINES else {"lines": count, "kept": MAX_LINES})
    text = (tmp_path / "out" / "training.json").read_text()
    assert text.count('\n  {"step": ') == len(steps)


def test_what_stood_in_for_bad_samples_is_said(
    places: dict[str, Path], weights: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert written(places, tmp_path / "a", weights)["bad_samples"] == {}
        assert caplog.text == ""
        training = written(places, tmp_path / "b", weights, bad_samples={"bomb": 1, "truncated": 3})
    assert training["bad_samples"] == {"bomb": 1, "truncated": 3}
    assert "4 samples could not be used, and others stood in for them: 3 truncated, 1 bomb" in caplog.text


def test_a_folder_that_looks_like_a_name_of_the_hub_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _public("data/latents") == "data/latents"
    (tmp_path / "data" / "latents").mkdir(parents=True)
    assert _public("data/latents") == "latents"
    assert [_public(name) for name in ("hub:data/latents", "tiny-random", "/srv/me/set", "~/set", None)] == [
        "hub:data/latents",
        "tiny-random",
        "set",
        "set",
        None,
    ]
