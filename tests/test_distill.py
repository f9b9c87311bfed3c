"""A run: it learns, ends in a student, goes on exactly where it stopped, and refuses what would make it another run."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teachers import folder_bytes
from training import environment, metrics, run_command, run_data, write_run
from warm import Started, start_tool

import unet_surgery as us
from unet_surgery.distill import RunConfig, distill
from unet_surgery.distill.state import load_state, state_folders
from unet_surgery.errors import OutputBusyError, RunError, TrainingError, VerificationError

pytestmark = pytest.mark.usefixtures("one_thread")


SPARSE: dict[str, Any] = {
    "steps": 9,
    "log": {"every": 4},
    "save": {"every": 3},
    "ema": {"decay": 0.9, "every": 4},
    "objectives": {"feature_kd": {"pairs": "similarity", "normalise": "teacher_power"}, "min_snr": 5.0},
    "noise": {"caption_drop": 0.3, "offset": 0.1, "timesteps": "half_high"},
    "micro_batch": 2,
}
"""A run whose lines, saves and averages fall on different steps, with all that has a state of its own."""


@pytest.fixture(scope="module")
def whole(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    distill(RunConfig.from_data(run_data(out, places["student"], {"cache": str(places["cache"])})))
    return out


@pytest.fixture(scope="module")
def sparse(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "run"
    distill(RunConfig.from_data(run_data(out, places["student"], {"cache": str(places["cache"])}, **SPARSE)))
    return out


def tensors_of(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return dict(load_state(state_folders(run)[-1]).tensors)


def assert_same(ours: Path, theirs: Path) -> None:
    """Weights, average, moments and metrics, bit for bit."""
    a, b = tensors_of(ours), tensors_of(theirs)
    assert a.keys() == b.keys() == {"weights", "ema", "adam_exp_avg", "adam_exp_avg_sq"}
    for group, tensors in a.items():
        assert tensors.keys() == b[group].keys()
        assert all(torch.equal(tensor, b[group][name]) for name, tensor in tensors.items()), group
    assert metrics(ours) == metrics(theirs)
    weights = "student/unet/diffusion_pytorch_model.safetensors"
    assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()


def test_a_run_learns_and_ends_in_a_student(whole: Path, places: dict[str, Path]) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["images"] == 24
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert len([key for key in lines[0] if key.startswith("feature/")]) == 6  # BK Tiny's pairs
    student = whole / "student"
    report = us.verify(student, "tiny-random").check
    assert report.is_trained
    assert report.compared_files > 0
    start = us.load_unet(places["student"]).state_dict()
    ema = tensors_of(whole)["ema"]
    for name, tensor in us.load_unet(student).state_dict().items():
        assert torch.equal(tensor, ema[name])
        assert not torch.equal(tensor, start[name]), f"{name} was not trained"
    card = (student / "README.md").read_text()
    assert "Not trained yet" not in card
    assert "Untrained" not in card
    assert "**Trained** for 6 steps on 24 samples" in card
    assert "training.svg" in card
    assert str(whole.parent) not in card + (student / "training.json").read_text()
    assert {p.name for p in student.iterdir()} >= {"training.json", "training.svg", "plan.json", "model_index.json"}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.extra) for seed in range(1, 10))])
def test_a_killed_run_goes_on_bit_for_bit(sparse: Path, places: dict[str, Path], tmp_path: Path, seed: int) -> None:
    """SIGKILL the real command at random moments, start it again until it is done, and compare with the whole run."""
    rng = random.Random(seed)
    out = tmp_path / "run"
    data = run_data(out, places["student"], {"cache": str(places["cache"])}, **SPARSE)
    run = write_run(tmp_path / "run.yaml", data)
    kills = 0
    for _ in range(12):
        before = _locked_at(out)
        child = start_tool(("distill", str(run), "-q"), env=environment())
        if kills < 3:
            _wait_for(lambda: _locked_at(out) > before, child)  # noqa: B023
            time.sleep(rng.uniform(0, 1.5))
            child.send_signal(signal.SIGKILL)
        done = child.ended()
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
    else:
        pytest.fail("it never came to its end")
    assert kills > 0
    assert_same(out, sparse)


def _locked_at(out: Path) -> int:
    """Return when a trainer last took the folder: networks and data are loaded after that."""
    lock = out / "run.lock"
    return lock.stat().st_mtime_ns if lock.is_file() else 0


def metrics_bytes(out: Path) -> list[bytes]:
    return (out / "metrics.jsonl").read_bytes().splitlines()


def _wait_for(condition: Any, child: Started) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and not child.is_over() and not condition():
        time.sleep(0.01)


def test_a_signal_ends_a_run_with_a_checkpoint(sparse: Path, places: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    data = run_data(out, places["student"], {"cache": str(places["cache"])}, **{**SPARSE, "save": {"every": 1000}})
    run = write_run(tmp_path / "run.yaml", data)
    child = start_tool(("distill", str(run)), env=environment())
    _wait_for(lambda: (out / "metrics.jsonl").is_file() and metrics_bytes(out), child)
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGTERM)  # a launcher's echo
    done = child.ended()
    assert done.returncode == 143, done.stderr
    assert "the same command goes on" in done.stderr
    (folder,) = state_folders(out)
    assert 4 <= load_state(folder).step < 9
    again = run_command("distill", str(run))
    assert again.returncode == 0, again.stderr
    assert "going on after step" in again.stderr
    assert again.stdout.strip() == str(out / "student")
    assert_same(out, sparse)


def test_short_weights_learn_as_long_ones_do(whole: Path, places: dict[str, Path], tmp_path: Path) -> None:
    """bf16 as it is by default, and fp16 with its loss scale, beside fp32."""
    for dtype in ("bf16", "fp16"):
        out = tmp_path / dtype
        speed = {"dtype": dtype}
        distill(RunConfig.from_data(run_data(out, places["student"], {"cache": str(places["cache"])}, speed=speed)))
        lines = metrics(out)
        for ours, theirs in zip(lines, metrics(whole), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
        assert lines[-1]["bad_steps"] == 0
        facts = load_state(state_folders(out)[-1]).facts["trainer"]
        assert facts["loss_scale"] == (1.0 if dtype == "bf16" else 2.0**15)


def test_one_bad_batch_is_skipped_and_forgotten(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step is not applied, its losses are in no mean, and what divides the terms does not remember it."""
    from unet_surgery.data.batches import Batches

    at = Batches.at

    def spoilt(self: Batches, start: int, count: int) -> Any:
        batch = at(self, start, count)
        return replace(batch, images=batch.images * float("nan")) if start == 4 else batch

    monkeypatch.setattr(Batches, "at", spoilt)
    objectives = {"feature_kd": {"normalise": "teacher_power"}}
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, objectives=objectives)
    distill(RunConfig.from_data({**data, "steps": 4, "log": {"every": 2}}))
    first, last = metrics(tmp_path / "run")
    assert (first["bad_steps"], last["bad_steps"]) == (1, 1)
    state = load_state(state_folders(tmp_path / "run")[-1])
    assert state.facts["trainer"]["adam_steps"] == 3
    assert all(torch.isfinite(t).all() for group in state.tensors.values() for t in group.values())
    assert all(value < 10 for value in state.facts["trainer"]["power"][0])
    monkeypatch.undo()
    distill(RunConfig.from_data({**data, "output": str(tmp_path / "good"), "steps": 1, "log": {"every": 1}}))
    (good,) = metrics(tmp_path / "good")
    assert first["loss"] == pytest.approx(good["loss"])  # the mean of the one good step


def test_pictures_instead_of_a_cache_give_the_same_losses(whole: Path, places: dict[str, Path], tmp_path: Path) -> None:
    """The cache's moments are rounded to half precision; nothing else differs."""
    data = {"images": str(places["pictures"]), "resolution": 16}
    distill(RunConfig.from_data(run_data(tmp_path / "run", places["student"], data, steps=2)))
    lines = metrics(tmp_path / "run")
    assert len(lines) == 2
    for ours, theirs in zip(lines, metrics(whole), strict=False):
        assert ours.pop("stage") == theirs.pop("stage")
        assert ours == pytest.approx(theirs, rel=1e-2)


def test_what_replaced_broken_pictures_is_said_in_the_students_folder(places: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(places["pictures"], tmp_path / "pictures")
    picture = tmp_path / "pictures" / "003.png"
    picture.write_bytes(picture.read_bytes()[:60])
    data = {"images": str(tmp_path / "pictures"), "resolution": 16, "max_bad": 0.5}
    result = distill(RunConfig.from_data(run_data(tmp_path / "run", places["student"], data, steps=3)))
    assert list(json.loads((result.student / "training.json").read_text())["bad_samples"].values()) == [1]


@pytest.mark.parametrize("kind", ["high_resolution", "full"])
def test_recomputation_changes_nothing(whole: Path, places: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Also of the features that are compared: a reentrant checkpoint would give them no gradient."""
    speed = {"dtype": "fp32", "channels_last": False, "checkpointing": kind}
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=2, speed=speed)
    distill(RunConfig.from_data(data))
    lines = metrics(tmp_path / "run")
    assert len(lines) == 2
    for ours, theirs in zip(lines, metrics(whole), strict=False):
        assert ours.pop("stage") == theirs.pop("stage")
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_compiling_on_a_cpu_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, speed={"compile": True})
    with pytest.raises(RunError, match="wrong gradients"):
        distill(RunConfig.from_data(data))


def test_stages_follow_each_other_and_resume(places: dict[str, Path], tmp_path: Path) -> None:
    """Two stages, as OFA's: the task alone, then with a teacher; stopped in between, it goes on to the same weights."""
    stages = [
        {"name": "task", "steps": 2, "teacher": None, "objectives": {"output_kd": 0, "feature_kd": 0}},
        {"name": "kd", "steps": 2, "optimizer": {"lr": 5e-4, "warmup": 1}},
    ]
    cache = {"cache": str(places["cache"])}
    whole = run_data(tmp_path / "whole", places["student"], cache, stages=stages, save={"every": 1, "keep": 9})
    distill(RunConfig.from_data(whole))
    lines = metrics(tmp_path / "whole")
    assert [line["stage"] for line in lines] == ["task", "task", "kd", "kd"]
    assert [line["lr"] for line in lines] == [1e-3, 1e-3, 0.0, 5e-4]
    assert lines[1]["output_kd"] == 0 < lines[2]["output_kd"]
    for left in (1, 2, 3):  # as if it had been killed after so many steps
        broken = tmp_path / f"after{left}"
        (broken / "checkpoints").mkdir(parents=True)
        for folder in state_folders(tmp_path / "whole"):
            if load_state(folder).step <= left:
                (broken / "checkpoints" / folder.name).symlink_to(folder)
        (broken / "metrics.jsonl").write_bytes((tmp_path / "whole" / "metrics.jsonl").read_bytes())
        distill(RunConfig.from_data({**whole, "output": str(broken)}))
        assert_same(broken, tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"optimizer": {"lr": 2e-3}}, "optimizer.lr"),
        ({"batch": 2}, "batch"),
        ({"noise": {"offset": 0.1}}, "noise.offset"),
        ({"objectives": {"feature_kd": {"weight": 2.0}}}, "feature_kd.weight"),
        ({"objectives": {"step_kd": {"guided": 0.2}}}, "step_kd.guided"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_run_is_refused(
    whole: Path, places: dict[str, Path], changes: dict[str, Any], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unet_surgery.distill.identity import refuse_changes

    before = RunConfig.from_data(run_data(whole, places["student"], {"cache": str(places["cache"])}))
    after = RunConfig.from_data(run_data(whole, places["student"], {"cache": str(places["cache"])}, **changes))
    with pytest.raises(RunError) as caught:
        refuse_changes(before.model_dump(mode="json"), after.model_dump(mode="json"), "here")
    assert key in (caught.value.found or "")


def test_a_refusal_lists_what_differs_and_no_whole_hash() -> None:
    from unet_surgery.distill.identity import refuse_changes

    data = {"output": "o", "student": "s", "teacher": "t", "data": {"toy": {"count": 8}}}
    before, after = (
        RunConfig.from_data({**data, **changes}).model_dump(mode="json")
        for changes in ({}, {"seed": 1, "optimizer": {"betas": [0.9, 0.99]}})
    )
    one, other, third = ("1234567890abcdef" * 4, "a" * 64, "b" * 64)
    before["identity"] = {"base": [one, one, one], "teachers": [one, None], "data": third, "plan": one}
    after["identity"] = {"base": [one, one, other], "teachers": [one, other], "data": third, "plan": one}
    with pytest.raises(RunError, match="4 differ") as caught:
        refuse_changes(before, after, "here")
    assert caught.value.found == (
        "identity.base.2: 1234567890ab… → aaaaaaaaaaaa…; identity.teachers.1: None → aaaaaaaaaaaa…; seed: 0 → 1; "
        "stages.0.optimizer.betas.1: 0.999 → 0.99"
    )
    after = {**before, "data": {**before["data"], "toy": {**before["data"]["toy"], "seed": 3}}}
    after["identity"] = {**before["identity"], "data": other}
    with pytest.raises(RunError, match="1 differ") as caught:
        refuse_changes(before, after, "here")
    assert caught.value.found == "data.toy.seed: 0 → 3"


def test_what_moves_only_rounding_may_change(whole: Path, places: dict[str, Path]) -> None:
    from unet_surgery.distill.identity import breaking_changes

    before = RunConfig.from_data(run_data(whole, places["student"], {"cache": str(places["cache"])}))
    free = {"micro_batch": 2, "save": {"every": 9}, "log": {"every": 3}, "steps": 99}
    after = RunConfig.from_data(
        run_data(whole / "elsewhere", places["student"], {"cache": str(places["cache"])}, **free)
    )
    assert not breaking_changes(before.model_dump(mode="json"), after.model_dump(mode="json"))


def test_a_changed_student_is_noticed(places: dict[str, Path], tmp_path: Path) -> None:
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=1)
    distill(RunConfig.from_data(data))
    us.prune("bk_tiny", "tiny-random", tmp_path / "other", dtype="bf16")
    with pytest.raises(RunError, match="begun with other settings") as caught:
        distill(RunConfig.from_data({**data, "student": str(tmp_path / "other")}))
    assert "identity.student" in (caught.value.found or "")


def test_a_finished_run_is_left_as_it_is(
    places: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing large is opened for it, and nothing written; a student of another step is not taken for this run's."""
    import shutil

    from unet_surgery.distill import run as running

    out = tmp_path / "run"
    data = run_data(out, places["student"], {"cache": str(places["cache"])}, steps=2)
    distill(RunConfig.from_data(data))

    def stamps() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "run.lock"}

    before, content = stamps(), folder_bytes(out)
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr(running, "open_base", None)
        patch.setattr(running, "_newest", None)
        result = distill(RunConfig.from_data(data))
        with pytest.raises(RunError, match="other settings"):
            distill(RunConfig.from_data({**data, "seed": 1}))
        with pytest.raises(RunError, match="other settings"):
            distill(RunConfig.from_data({**data, "student": "tiny-random"}))
    assert (result.student, result.step, result.stopped_by) == (out / "student", 2, None)
    assert caplog.messages == ["already finished: step 2 of 2"]
    caplog.clear()
    shutil.copytree(places["cache"], tmp_path / "moved")
    distill(RunConfig.from_data({**data, "data": {"cache": str(tmp_path / "moved")}}))
    assert caplog.messages == ["already finished: step 2 of 2"]
    assert (stamps(), folder_bytes(out)) == (before, content)
    training = out / "student" / "training.json"
    training.write_text(training.read_text().replace('{"step": 2,', '{"step": 1,'))
    caplog.clear()
    distill(RunConfig.from_data(data))
    assert caplog.messages == ["going on after step 2 of 2"]
    assert folder_bytes(out) == content


def test_a_longer_run_goes_on(places: dict[str, Path], tmp_path: Path) -> None:
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=3)
    distill(RunConfig.from_data(data))
    result = distill(RunConfig.from_data({**data, "steps": 5}))
    assert result.step == 5
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    distill(RunConfig.from_data({**data, "steps": 5, "output": str(tmp_path / "at once")}))
    assert_same(tmp_path / "run", tmp_path / "at once")


def test_two_runs_in_one_folder(places: dict[str, Path], tmp_path: Path) -> None:
    from unet_surgery.distill.runlock import RunLock

    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])})
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"), pytest.raises(OutputBusyError):
        distill(RunConfig.from_data(data))


def test_bad_steps_are_skipped_rolled_back_and_then_given_up(places: dict[str, Path], tmp_path: Path) -> None:
    """A rate at which nothing stays finite: such steps are never applied, and the end is an error with a dump."""
    data = run_data(
        tmp_path / "run",
        places["student"],
        {"cache": str(places["cache"])},
        steps=400,
        optimizer={"lr": 1e30, "clip": None},
        save={"every": 1000},
        trouble={"max_in_a_row": 1, "max_roll_backs": 1},
    )
    with pytest.raises(TrainingError, match="not finite, 2 steps in a row") as caught:
        distill(RunConfig.from_data(data))
    (dump,) = (tmp_path / "run").glob("dump-*.json")
    assert str(dump) in (caught.value.where or "")
    seen = json.loads(dump.read_text())
    assert seen["roll_backs"] == 1
    assert seen["most_bad_in_a_row"] == 2
    assert seen["weights_not_finite"] == []  # what was not finite was never applied
    assert not (tmp_path / "run" / "student").exists()


def spoil_noise(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int, int], bool]) -> None:
    """Make the noise of positions NaN of which ``bad`` (salt, position) is true."""
    from unet_surgery.data.keyed import KeyedNoise

    normals = KeyedNoise.normals

    def spoilt(self: KeyedNoise, kind: str, start: int, count: int, shape: tuple[int, ...]) -> Any:
        values = normals(self, kind, start, count, shape)
        if kind == "noise":
            values[[bad(self.salt, start + i) for i in range(count)]] = np.nan
        return values

    monkeypatch.setattr(KeyedNoise, "normals", spoilt)


def test_a_checkpoint_inside_trouble_does_not_bring_it_back(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 to 6 are bad, step 5 is saved, step 6 looked at: back to 5, and with other noise all is well."""
    spoil_noise(monkeypatch, lambda salt, position: salt == 0 and 8 <= position < 24)
    changes = {"steps": 9, "log": {"every": 6}, "save": {"every": 5}, "trouble": {"max_in_a_row": 2}}
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, **changes)
    result = distill(RunConfig.from_data(data))
    assert result.step == 9
    assert load_state(state_folders(tmp_path / "run")[-1]).facts["roll_backs"] == 1


def test_a_run_that_applied_no_step_is_an_error(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_noise(monkeypatch, lambda salt, position: True)
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=3)
    with pytest.raises(TrainingError, match="no step of the stage was applied"):
        distill(RunConfig.from_data(data))
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [None] * 3
    assert not (tmp_path / "run" / "student").exists()


def test_a_look_at_nothing_finite_is_null_and_the_card_says_so(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_noise(monkeypatch, lambda salt, position: position < 4)
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=3)
    result = distill(RunConfig.from_data(data))
    assert [line["task"] is None for line in metrics(tmp_path / "run")] == [True, False, False]
    assert "| nan |" in (result.student / "README.md").read_text()


def test_a_run_without_its_checkpoints_is_not_begun_again(places: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=2, save={"every": 2})
    distill(RunConfig.from_data(data))
    before = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(RunError, match="checkpoints are gone"):
        distill(RunConfig.from_data({**data, "seed": 1}))
    shutil.rmtree(tmp_path / "run" / "student")
    with pytest.raises(RunError, match="checkpoints are gone"):
        distill(RunConfig.from_data({**data, "seed": 1}))
    assert metrics(tmp_path / "run") == before


def test_a_run_that_saved_nothing_begins_anew_and_says_so(
    places: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"st')
    distill(RunConfig.from_data(data))
    assert "ended after step 1 with no checkpoint" in caplog.text
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


def test_a_signal_at_a_stages_end_begins_no_other(places: dict[str, Path], tmp_path: Path) -> None:
    import os

    stages = [{"name": "one", "steps": 2}, {"name": "two", "steps": 2}]
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, stages=stages)
    del data["steps"]

    def stop_at(progress: Any) -> None:
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    result = distill(RunConfig.from_data(data), on_progress=stop_at)
    assert (result.step, result.stopped_by, result.student) == (2, signal.SIGTERM, None)
    assert distill(RunConfig.from_data(data)).step == 4


def test_a_tap_that_is_not_there_is_refused_before_the_first_step(places: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(places["student"], tmp_path / "student")
    plan = json.loads((tmp_path / "student" / "plan.json").read_text())
    plan["features"]["bk"][0]["student"]["module"] = "down_blocks.9"
    (tmp_path / "student" / "plan.json").write_text(json.dumps(plan))
    data = run_data(tmp_path / "run", tmp_path / "student", {"cache": str(places["cache"])})
    with pytest.raises(VerificationError, match="the student") as caught:
        distill(RunConfig.from_data(data))
    assert "down_blocks.9" in (caught.value.where or "")
    assert not metrics_bytes(tmp_path / "run")


def test_tensorboard_hears_what_metrics_say(places: dict[str, Path], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=2)
    distill(RunConfig.from_data({**data, "log": {"every": 1, "trackers": ["tensorboard"]}}))
    (folder,) = (tmp_path / "run" / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    heard = [(event.step, event.value) for event in events.Scalars("loss")]
    assert heard == [(line["step"], pytest.approx(line["loss"])) for line in metrics(tmp_path / "run")]


def test_pictures_of_fixed_prompts(places: dict[str, Path], tmp_path: Path) -> None:
    """Teacher, student and average; the last grid goes into the student's card."""
    from PIL import Image

    pictures = {"every": 1, "prompts": ["a red house", "picture number 3"], "steps": 2, "guidance": 2.0}
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=2, pictures=pictures)
    distill(RunConfig.from_data(data))
    first, last = sorted((tmp_path / "run" / "pictures").iterdir())
    assert first.read_bytes() != last.read_bytes()
    assert (tmp_path / "run" / "student" / "samples.png").read_bytes() == last.read_bytes()
    with Image.open(last) as grid:
        assert grid.width > 3 * 128
    assert "![Samples](samples.png)" in (tmp_path / "run" / "student" / "README.md").read_text()


@pytest.mark.extra
def test_memory_does_not_grow(places: dict[str, Path], tmp_path: Path) -> None:
    """500 steps: what is resident after 100 is what is resident at the end, but for a little of the allocator's."""
    import os

    page, seen = os.sysconf("SC_PAGE_SIZE"), {}

    def note(progress: Any) -> None:
        with open("/proc/self/statm") as file:
            seen[progress.step] = int(file.read().split()[1]) * page

    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=500, batch=2)
    data |= {"log": {"every": 50}, "save": {"every": 100}}
    distill(RunConfig.from_data(data), on_progress=note)
    assert seen[500] < seen[100] + (24 << 20), {step: value >> 20 for step, value in seen.items()}


@pytest.mark.parametrize(
    "objectives",
    [
        {"min_snr": 5.0, "feature_kd": {"normalise": "teacher_power"}},
        {"task": 0, "output_kd": 0, "feature_kd": 0, "step_kd": {"weight": 1, "guided": 1}},
    ],
    ids=["features", "steps"],
)
def test_a_step_asks_the_device_for_nothing(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objectives: dict[str, Any]
) -> None:
    """Reading a value, or anything whose shape depends on values, would make a GPU wait: no such call in a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from unet_surgery.distill.trainer import StageTrainer

    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2"}
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name().removeprefix("aten::").partition(".")[0])
            return func(*args, **(kwargs or {}))

    step = StageTrainer.step

    def watched(self: StageTrainer, *args: Any) -> None:
        with Watch():
            step(self, *args)

    monkeypatch.setattr(StageTrainer, "step", watched)
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=2)
    distill(RunConfig.from_data({**data, "objectives": objectives, "log": {"every": 2}}))
    assert "convolution" in seen
    assert "_fused_adamw_" in seen
    assert not waiting & set(seen)


def test_a_step_is_what_a_plain_trainer_does(places: dict[str, Path], tmp_path: Path) -> None:
    """One step beside thirty lines as BK-SDM's trainer has them: hooks by name, a sum of three terms, torch's AdamW."""
    from diffusers import DDPMScheduler
    from torch.nn import functional

    from unet_surgery.data.keyed import KeyedNoise
    from unet_surgery.data.latents import LatentCache
    from unet_surgery.data.order import Order
    from unet_surgery.runtime.parts import load_parts

    weights = {"task": 0.5, "output_kd": 2.0, "feature_kd": 3.0}
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=1, seed=7)
    distill(RunConfig.from_data({**data, "objectives": weights, "optimizer": {"lr": 1e-3, "weight_decay": 0.1}}))

    parts = load_parts(places["student"])
    student, teacher = us.load_unet(places["student"]), us.load_unet(distilled_from())
    noise, order = KeyedNoise(7), Order(10, 7)
    moments, ids = LatentCache(places["cache"]).batch(order.indices(0, 4))
    mean, std = moments.float().chunk(2, 1)
    shape = (4, 8, 8)
    latents = (mean + std * torch.from_numpy(noise.normals("posterior", 0, 4, shape))) * parts.vae.config.scaling_factor
    epsilon = torch.from_numpy(noise.normals("noise", 0, 4, shape))
    timesteps = (torch.from_numpy(noise.uniforms("timestep", 0, 4, 2)[:, 0].copy()) * 1000).long()
    noisy = DDPMScheduler.from_config(parts.scheduler_config).add_noise(latents, epsilon, timesteps)
    prompts = parts.text_encoder(ids)[0]
    ours, theirs = {}, {}
    pairs = [("down_blocks.0", "down_blocks.0"), ("down_blocks.1", "down_blocks.1")]
    pairs += [("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out")]
    pairs += [(f"up_blocks.{i}", f"up_blocks.{i + 1}") for i in range(3)]
    for net, kept, side in ((student, ours, 0), (teacher, theirs, 1)):
        for pair in pairs:
            net.get_submodule(pair[side]).register_forward_hook(
                lambda _m, _i, out, kept=kept, name=pair[side]: kept.__setitem__(name, out)
            )
    with torch.no_grad():
        wanted = teacher(noisy, timesteps, prompts).sample
    prediction = student(noisy, timesteps, prompts).sample

    def first(value: Any) -> torch.Tensor:
        return value[0] if isinstance(value, tuple) else value

    features = [functional.mse_loss(first(ours[a]), first(theirs[b])) for a, b in pairs]
    task, output = functional.mse_loss(prediction, epsilon), functional.mse_loss(prediction, wanted)
    loss = 0.5 * task + 2.0 * output + 3.0 * sum(features)
    adamw = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.1)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    adamw.step()

    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (line["task"], line["output_kd"]) == pytest.approx((task.item(), output.item()), rel=1e-5)
    terms = [value for key, value in line.items() if key.startswith("feature/")]
    assert terms == pytest.approx([feature.item() for feature in features], rel=1e-5)
    relative = [value for key, value in line.items() if key.startswith("relative/")]
    power = [first(theirs[b]).square().mean().item() for _, b in pairs]
    assert relative == pytest.approx([f.item() / p for f, p in zip(features, power, strict=True)], rel=1e-5)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    trained = tensors_of(tmp_path / "run")["weights"]
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-4, msg=name)  # a tenth of the rate


def distilled_from() -> Path:
    from unet_surgery.hub import fetch_teacher, resolve_teacher

    return fetch_teacher(resolve_teacher("tiny-random"), progress=lambda _d, _t: None).folder


def test_a_rolled_back_run_keeps_its_noise_when_resumed(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unet_surgery.distill import setup as module
    from unet_surgery.distill.state import save_state

    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, steps=1)
    distill(RunConfig.from_data(data))
    state = load_state(state_folders(tmp_path / "run")[-1])
    save_state(tmp_path / "run", replace(state, facts={**state.facts, "roll_backs": 2}))
    salts = []
    keyed = module.KeyedNoise
    monkeypatch.setattr(module, "KeyedNoise", lambda seed, salt=0: salts.append(salt) or keyed(seed, salt))
    distill(RunConfig.from_data({**data, "steps": 2}))
    assert set(salts) == {2}
    assert load_state(state_folders(tmp_path / "run")[-1]).facts["roll_backs"] == 2
