"""Networks, parts and data that do not fit each other: refused before anything is trained, in a run and on paper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training import run_data

from unet_surgery.distill import RunConfig, distill
from unet_surgery.distill.dryrun import dry_run
from unet_surgery.distill.networks import Folders
from unet_surgery.distill.setup import open_base
from unet_surgery.errors import ConfigError, RunError, TeacherError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/config.json"


@pytest.mark.parametrize(
    ("who", "file", "change", "says"),
    [
        ("student", UNET, {"cross_attention_dim": 64}, "the text encoder is not of this U-Net's kind"),
        ("student", UNET, {"in_channels": 8, "out_channels": 8}, "the latents are not of this U-Net's kind"),
        ("student", UNET, {"dropout": 0.1}, "a student with dropout cannot be trained exactly"),
        ("student", UNET, {"out_channels": 8}, "this kind of U-Net cannot be trained here yet"),
        ("student", SCHEDULER, {"beta_end": 0.02}, "the student's own scheduler has other noise than the run's"),
        (
            "student",
            SCHEDULER,
            {"prediction_type": "v_prediction"},
            "the student's own scheduler says another prediction",
        ),
        ("teacher", UNET, {"cross_attention_dim": 64}, "the teacher is of another kind than the student"),
        ("teacher", SCHEDULER, {"num_train_timesteps": 500}, "the teacher was trained with other noise"),
        (
            "teacher",
            SCHEDULER,
            {"prediction_type": "sample", "rescale_betas_zero_snr": True},
            "predict different things",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_alike_in_a_run_and_on_paper(
    places: dict[str, Path], tmp_path: Path, tiny: Path, who: str, file: str, change: dict[str, Any], says: str
) -> None:
    """In the words of the error, with both values, of whatever stage, before any weights are loaded."""
    shutil.copytree(places["student"] if who == "student" else tiny, tmp_path / who)
    path = tmp_path / who / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    data = {**run_data(tmp_path / "run", places["student"], {"toy": {"count": 8}}), "base": "tiny-random"}
    if who == "student":
        data["student"] = str(tmp_path / who)
    else:
        data["stages"] = [{"objectives": {"output_kd": 0, "feature_kd": 0}}, {"teacher": str(tmp_path / who)}]
    config = RunConfig.from_data(data)
    with pytest.raises((RunError, ConfigError), match=says) as caught:
        distill(config)
    assert str(next(iter(change.values()))) in f"{caught.value.found} {caught.value.expected}"
    assert caught.value.found
    assert caught.value.expected
    assert any(line.startswith(caught.value.what) for line in dry_run(config).refused)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_optimizer_of_one_process_is_refused_on_two(places: dict[str, Path], tmp_path: Path) -> None:
    data = run_data(tmp_path / "run", places["student"], {"toy": {"count": 8}}, optimizer={"kind": "adamw8bit"})
    config, folders = RunConfig.from_data(data), Folders(tmp_path, tmp_path, (None,))  # nothing is there to be loaded
    world = SimpleNamespace(size=2, device=torch.device("cpu"))
    with pytest.raises(RunError, match="works in one process"):
        open_base(config, folders, world)  # type: ignore[arg-type]
    assert "works in one process" in dry_run(config, num_processes=2).refused[0]
    assert dry_run(config).refused == ()


@pytest.mark.parametrize("resolution", [1, 17])
def test_pictures_that_do_not_become_whole_latents(places: dict[str, Path], tmp_path: Path, resolution: int) -> None:
    data = {"images": str(places["pictures"]), "resolution": resolution}
    config = RunConfig.from_data(run_data(tmp_path / "run", places["student"], data))
    with pytest.raises(UsageError, match="does not fit the VAE"):
        distill(config)


def test_a_missing_teacher_is_named_with_its_stage(places: dict[str, Path], tmp_path: Path) -> None:
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, teacher="nobody", steps=1)
    for config, where in (
        (RunConfig.from_data(data), "stage main, teacher"),
        (RunConfig.from_data({**data, "stages": [{"teacher": "tiny-random"}, {"name": "kd"}]}), "stage kd, teacher"),
    ):
        for act in (distill, dry_run):
            with pytest.raises(TeacherError, match="there is no model 'nobody'") as caught:
                act(config)
            assert caught.value.where == where


def test_a_missing_student_is_called_so_in_a_run_and_on_paper(places: dict[str, Path], tmp_path: Path) -> None:
    data = run_data(tmp_path / "run", tmp_path / "nowhere", {"cache": str(places["cache"])}, steps=1)
    config = RunConfig.from_data(data)
    for act in (distill, dry_run):
        with pytest.raises(RunError, match="there is no such student yet"):
            act(config)
