"""The toy teacher on its way into the package: assembled, trained, bundled, shipped; its demo and its ablation.

Everything runs on a stand-in with random weights, so that it needs no more than trained ones in their place.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from toy_pipeline import PIPELINE, ROOT, TOY_WORLD, write_configs, write_parts, write_pipeline

import unet_surgery as us
from unet_surgery.checkpoint import bundled
from unet_surgery.distill import distill, load_run
from unet_surgery.errors import RunError, TeacherError, VerificationError
from unet_surgery.evaluate.frechet import frechet_distance
from unet_surgery.hub import fetch_teacher, resolve_teacher
from unet_surgery.hub.cache import cache_folder
from unet_surgery.toyworld.draw import draw_many
from unet_surgery.toyworld.grammar import is_held_out, parse

SHORT = ("steps=2", "batch=4", "optimizer.warmup=1", "data.toy.count=8", "log.every=1", "data.workers=1")


@pytest.fixture(scope="module", autouse=True)
def _scripts() -> Iterator[None]:
    """The scripts import each other by name, as they do when they are run."""
    torch.set_num_threads(1)
    folders = [str(TOY_WORLD), str(ROOT / "benchmarks")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole toy pipeline with random weights, fp32."""
    root = tmp_path_factory.mktemp("stand-in")
    return write_pipeline(root / "student", root)


@pytest.fixture(scope="module")
def shipped_folder(stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in as bundle.py writes it, with its card."""
    import bundle

    out = tmp_path_factory.mktemp("bundle") / "toy"
    bundle.bundle(stand_in, out)
    scores = {
        kind: {"right": 0.95, "interval": (0.93, 0.97), "attributes": {"shape": 0.96}, "pictures": 500}
        for kind in ("one", "two")
    }
    options = argparse.Namespace(captions=500, steps=20, guidance=2.0, seed=0)
    (out / "README.md").write_text(bundle.write_card(stand_in, scores, scores, options))
    return out


@pytest.fixture
def toy(shipped_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that ships the stand-in as ``toy``, in a folder that nobody may write to."""
    root = tmp_path / "_teachers"
    shutil.copytree(ROOT / "unet_surgery" / "_teachers", root, ignore=shutil.ignore_patterns("toy"))
    shutil.copytree(shipped_folder, root / "toy")
    for path in root.rglob("*"):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    monkeypatch.setattr(bundled, "_root", lambda: root)
    yield root / "toy"
    for path in root.rglob("*"):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- as a built-in teacher ---------------------------------------------------------------------------------------------


def test_a_checkout_without_its_weights_does_not_know_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "_teachers"
    shutil.copytree(ROOT / "unet_surgery" / "_teachers", root, ignore=shutil.ignore_patterns("toy"))
    monkeypatch.setattr(bundled, "_root", lambda: root)
    assert "toy" not in bundled.bundled_names()
    assert not any(bundled.is_shipped(name) for name in bundled.bundled_names())
    with pytest.raises(TeacherError, match="there is no model 'toy'"):
        resolve_teacher("toy")


def test_a_shipped_teacher_is_used_where_it_lies(toy: Path) -> None:
    assert "toy" in bundled.bundled_names()
    assert [name for name in bundled.bundled_names() if bundled.is_shipped(name)] == ["toy"]
    found = resolve_teacher("toy")
    assert (found.folder, found.teacher_id, found.name) == (toy, "toy", "toy")
    assert fetch_teacher(found, progress=lambda done, total: None).folder == toy
    assert not (cache_folder() / "toy").exists()
    with pytest.raises(TeacherError, match="there is no model 'toi'") as raised:
        resolve_teacher("toi")
    assert raised.value.hint == "did you mean 'toy'?"


def test_what_lies_in_the_cache_under_its_name_is_not_it(toy: Path) -> None:
    stale = cache_folder() / "toy"
    stale.mkdir(parents=True)
    try:
        assert resolve_teacher("toy").folder == toy
        assert fetch_teacher(resolve_teacher("toy"), progress=lambda done, total: None).folder == toy
    finally:
        stale.rmdir()


def test_every_verb_takes_it_and_none_changes_it(toy: Path, tmp_path: Path) -> None:
    before = contents(toy)
    report = us.inspect_model("toy")
    assert (report.teacher_id, report.weights is not None) == ("toy", True)
    assert us.plan("bk_tiny", "toy").teacher_id == "toy"
    result = us.prune("bk_tiny", "toy", tmp_path / "student")
    assert result.is_pipeline
    assert us.check(result.folder, "toy").compared_files > 8
    assert us.verify(result.folder, "toy").output_shape[1] == 4
    card = (result.folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "--teacher toy" in card
    assert (result.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    config = load_run(ROOT / "examples" / "runs" / "toy_bk_tiny.yaml", changed(result.folder, tmp_path / "run")).config
    trained = distill(config)
    assert trained.student is not None
    assert us.check(trained.student, "toy").is_trained
    assert contents(toy) == before


def changed(student: Path, output: Path, teacher: str = "toy") -> tuple[str, ...]:
    return (*SHORT, f"student={student}", f"output={output}", f"teacher={teacher}")


def test_the_wheel_carries_its_weights(shipped_folder: Path, tmp_path: Path) -> None:
    """Build the real wheel of a copied project, unpack it where nothing may be written, and prune from there."""
    project = tmp_path / "project"
    ignored = shutil.ignore_patterns("__pycache__", "toy")
    shutil.copytree(ROOT / "unet_surgery", project / "unet_surgery", ignore=ignored)
    shutil.copytree(ROOT / "recipes", project / "recipes")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(shipped_folder, project / "unet_surgery" / "_teachers" / "toy")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert contents(site / "unet_surgery" / "_teachers" / "toy") == contents(shipped_folder)
    result = subprocess.run(
        [sys.executable, "-m", "unet_surgery", "prune", "--recipe", "bk_tiny", "--teacher", "toy", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "UNET_SURGERY_CACHE": "/nowhere", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out" / "vae") == contents(shipped_folder / "vae")


# -- trained, and bundled ----------------------------------------------------------------------------------------------


def test_the_teachers_run_begins_from_an_assembled_folder_without_weights(tmp_path: Path) -> None:
    from assemble import assemble, gate_passed

    parts = write_parts(tmp_path / "parts")
    assert not gate_passed(parts)
    (parts / "gate.json").write_text('{"passed": true}')
    assert gate_passed(parts)
    pipeline = assemble(parts, tmp_path / "pipeline", write_configs(tmp_path / "configs"))
    assert not list((pipeline / "unet").glob("*.safetensors"))
    short = ("pictures.steps=2", "save.every=1", "data.toy.count=8", "batch=4", "steps=3", "optimizer.warmup=1")
    changes = (*short, f"student={pipeline}", f"output={tmp_path / 'run'}", "log.every=1")
    run = load_run(TOY_WORLD / "teacher.yaml", changes)
    assert not any(stage.objectives.needs_teacher for stage in run.config.stages)
    assert run.config.num_steps == 3
    result = distill(run.config)
    assert result.student is not None
    assert us.inspect_model(result.student).weights is not None
    assert "license: apache-2.0" in (result.student / "README.md").read_text()
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 1


def test_the_pictures_of_the_teachers_run_are_of_held_out_captions() -> None:
    prompts = yaml.safe_load((TOY_WORLD / "teacher.yaml").read_text())["pictures"]["prompts"]
    assert len(prompts) == 8
    assert all(is_held_out(parse(prompt)) for prompt in prompts)
    assert {len(parse(prompt).things) for prompt in prompts} == {1, 2}


def test_parts_that_are_not_whole_are_not_assembled(tmp_path: Path) -> None:
    from assemble import assemble

    parts = write_parts(tmp_path / "parts")
    path = parts / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("text_model.final_layer_norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="text_encoder|CLIPTextModel"):
        assemble(parts, tmp_path / "out", PIPELINE)


def test_bundled_values_are_the_nearest_halves(stand_in: Path, shipped_folder: Path) -> None:
    for component, file in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        before, after = (load_file(folder / component / f"{file}.safetensors") for folder in (stand_in, shipped_folder))
        assert before.keys() == after.keys()
        assert all(np.array_equal(after[name], before[name].astype(np.float16)) for name in before)
    with safe_open(shipped_folder / "text_encoder" / "model.safetensors", "np") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118  # it is no mapping
    names = set(contents(shipped_folder))
    assert not {"training.json", "plan.json"} & names
    assert {"README.md", "model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"} <= names


def test_a_text_encoder_is_written_in_the_old_layout_and_no_path_travels(stand_in: Path, tmp_path: Path) -> None:
    import bundle

    shutil.copytree(stand_in, tmp_path / "new")
    path = tmp_path / "new" / "text_encoder" / "model.safetensors"
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config = tmp_path / "new" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "/home/me/vae"}))
    bundle.bundle(tmp_path / "new", tmp_path / "out")
    assert "/home/me" not in (tmp_path / "out" / "vae" / "config.json").read_text()
    names = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


def test_a_bundle_that_is_too_large_or_overflows_is_refused(stand_in: Path, tmp_path: Path) -> None:
    import bundle

    with pytest.raises(ValueError, match=r"bytes, and 1,000 are allowed"):
        bundle.bundle(stand_in, tmp_path / "large", max_bytes=1000)
    shutil.copytree(stand_in, tmp_path / "wide")
    path = tmp_path / "wide" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["encoder.conv_in.bias"][3] = 7e4
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(TeacherError, match="too large for F16"):
        bundle.bundle(tmp_path / "wide", tmp_path / "out")


def test_the_comparison_finds_a_value_that_is_not_the_nearest() -> None:
    import bundle

    values = np.array([1.0, 3.14159, -0.1], dtype=np.float32)
    halves = values.astype(np.float16)
    assert 0 < bundle._compared({"a": values}, {"a": halves}) < 2**-11
    for wrong in (np.nextafter(halves, np.float16(9)), halves.astype(np.float32), halves[:2]):
        with pytest.raises(ValueError, match="a was not stored"):
            bundle._compared({"a": values}, {"a": wrong})


def test_scores_from_the_command_line(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import score

    words = ["score.py", str(stand_in), "--captions", "3", "--objects", "two", "--held-out", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "scores.json")])
    assert score.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "scores.json").read_text())
    assert found["split"] == "held_out"
    assert found["scores"].keys() == {"all", "two"}
    assert found["scores"]["two"]["pictures"] == 3
    monkeypatch.setattr(sys, "argv", ["score.py", str(tmp_path)])
    assert score.main() == TeacherError.exit_code


def test_a_run_whose_warm_up_takes_all_of_it_is_refused_in_words() -> None:
    run = ROOT / "examples" / "runs" / "toy_bk_tiny.yaml"
    with pytest.raises(RunError) as raised:
        load_run(run, ["steps=20"])
    assert "takes all of the 20" in str(raised.value)
    assert load_run(run, ["steps=20", "optimizer.schedule=constant"]).config.num_steps == 20


# -- the demo ----------------------------------------------------------------------------------------------------------


def demo_words(teacher: Path, out: Path, *more: str) -> list[str]:
    changes = [word for change in SHORT for word in ("--set", change)]
    counts = ["--captions", "5", "4", "--sampling-steps", "1", "--processes", "1"]
    return ["--teacher", str(teacher), "--out", str(out), *counts, *changes, *more]


def test_the_demo(stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import demo

    out = tmp_path / "demo"
    assert demo.main(demo_words(stand_in, out)) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(out / "index.html")
    assert "NOT as promised" in printed  # the stand-in draws nothing
    page = (out / "index.html").read_text()
    assert page.count("<img ") == 8 * 4  # four prompts of each kind, four networks
    assert [page.count(f'<div class="head">{name}</div>') for name in demo.NAMES] == [1] * 4
    assert page.count("of 5)") == page.count("of 4)") == 4
    control, distilled = (json.loads((out / n / "student" / "training.json").read_text()) for n in CONTROLLED)
    assert control["run"]["init"] == "random"
    assert control["run"]["stages"][0]["objectives"]["output_kd"] == 0
    assert distilled["run"]["init"] == "weights"
    same = ("steps", "batch", "noise", "optimizer")
    assert all(control["run"]["stages"][0][k] == distilled["run"]["stages"][0][k] for k in same)
    assert control["run"]["data"] == distilled["run"]["data"]

    where = (*SHORT, f"teacher={stand_in}", f"student={out / 'student'}", f"output={out / 'distilled'}")
    again = demo.train("distilled", where)  # it is finished: what it wrote is read
    assert [line["step"] for line in again.metrics] == [1, 2]
    assert "step" not in capsys.readouterr().out
    assert demo.main(demo_words(stand_in, out, "--set", "seed=5")) == RunError.exit_code
    assert "begun with other settings" in capsys.readouterr().err


CONTROLLED = ("scratch", "distilled")


@pytest.mark.parametrize(
    ("rights", "verdict"),
    [((90, 5, 80), "as promised"), ((90, 5, 76), "NOT as"), ((90, 11, 80), "NOT as"), ((0, 0, 0), "NOT as")],
)
def test_the_demo_says_whether_it_keeps_its_promise(rights: tuple[int, ...], verdict: str) -> None:
    import demo

    def drawn(right: int) -> Any:
        score = {"right": right / 100, "interval": (0.0, 1.0), "pictures": 100, "num_right": right}
        return demo.Drawn(np.zeros((0, 32, 32, 3), np.uint8), {"all": score}, 1.0)

    trained = demo.Trained(Path(), [], 1.0)
    networks = dict(zip(demo.NAMES, map(drawn, (*rights, 0)), strict=True))
    done: Any = argparse.Namespace(drawn=networks, distilled=trained, control=trained)
    (line,) = [line for line in demo._report(done, 1.0) if "promised" in line]
    assert line.endswith(verdict if verdict.startswith("as") else "NOT as promised")
    assert ("NOT" in line) == (verdict != "as promised")


def test_a_demo_without_its_teacher_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import demo

    assert demo.main(["--teacher", "nobody", "--out", str(tmp_path / "demo")]) == TeacherError.exit_code
    assert "there is no model 'nobody'" in capsys.readouterr().err


def test_ctrl_c_while_it_imports_is_said_in_a_line() -> None:
    """The real script, stopped when its first heavy import begins."""
    path = ROOT / "examples" / "toy_world" / "demo.py"
    code = (
        "import os, runpy, signal, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
        f"runpy.run_path({str(path)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped; nothing was done yet\n")


def test_a_stopped_demo_says_whether_anything_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import demo

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", stop)
    words = ["--out", str(tmp_path), "--processes", "1"]
    assert demo.main(words) == 130
    assert capsys.readouterr().err == "stopped; nothing was saved yet, and the same command begins anew\n"
    (tmp_path / "scratch" / "checkpoints" / "step-00000016").mkdir(parents=True)
    assert demo.main(words) == 130
    assert capsys.readouterr().err == "stopped, and saved (step-00000016); the same command goes on from there\n"


def test_ctrl_c_ends_no_process_but_by_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that draws or waits does not die of it: its pool would end the other one, which is saving."""
    import demo

    with demo._executor(2) as executor:
        for future in [executor.submit(time.sleep, 0.1) for _ in range(2)]:
            future.result()
        drawing = executor.submit(time.sleep, 0.5)  # one draws, the other waits
        time.sleep(0.2)
        for pid in executor._processes:
            os.kill(pid, signal.SIGINT)
        drawing.result()
        assert executor.submit(abs, -1).result() == 1

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr(demo, "distill", stop)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            demo.train("distilled", ("student=s", "teacher=t", "output=o"))
        assert caught.value.args == (signal.default_int_handler,)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# -- the ablation ------------------------------------------------------------------------------------------------------


def settings(teacher: Path) -> Any:
    import ablation

    counts = {"steps": 2, "batch": 4, "captions": 4, "sampling_steps": 1, "noisy": 4}
    return ablation.Settings(teacher=str(teacher), **counts)


def test_the_jobs_differ_in_what_the_table_says() -> None:
    import ablation

    jobs = ablation.all_jobs()
    assert len(jobs) == len({job.name for job in jobs}) == 1 + 2 + 2 * 6 * 3
    assert all(ablation.job_of(job.name) == job for job in jobs)
    found = {}
    for job in jobs[3:]:
        config = load_run(ablation.RUN, job.changes(ablation.Settings())).config
        wanted = config.stages[0].objectives
        assert (config.num_steps, config.stages[0].batch, config.seed) == (200, 32, job.seed)
        features = wanted.feature_kd
        found[job.variant] = (config.init, wanted.task, wanted.output_kd, features.weight, features.normalise)
    assert found == {
        "random-task": ("random", 1, 0, 0, "none"),
        "task": ("weights", 1, 0, 0, "none"),
        "output": ("weights", 1, 1, 0, "none"),
        "features": ("weights", 1, 1, 1, "none"),
        "normalised": ("weights", 1, 1, 1, "teacher_power"),
        "normalised-tenth": ("weights", 1, 1, 0.1, "teacher_power"),
    }
    rows = list(found.values())
    for before, after in itertools.pairwise(rows):
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1, "one thing at a time"
    shipped = load_run(ablation.RUN).config.stages[0].objectives.feature_kd
    assert (shipped.weight, shipped.normalise) == rows[-1][3:]


def test_a_job_is_kept_and_not_run_again(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ablation

    wanted, started = settings(stand_in), []
    monkeypatch.setattr(ablation.Job, "changes", lambda job, s: (*CHANGES(job, s), "data.toy.count=8"))
    job = ablation.job_of("bk_tiny-normalised-1")
    ablation.run_job(job, wanted, tmp_path / "results", tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())
    result = ablation.kept(job, wanted, tmp_path / "results")
    assert result is not None
    assert result["scores"]["all"]["pictures"] == 8
    assert result["output_error"] > 0
    assert result["frechet"] > 0
    assert [line["step"] for line in result["metrics"]] == [2]

    words = ["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs"), "--work", str(tmp_path / "work")]
    words += ["--only", job.name]
    for name, value in vars_of(wanted).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    monkeypatch.setattr(ablation, "_start", lambda job, *_: started.append(job.name) or subprocess.Popen(["false"]))
    assert ablation.main(words) == 0
    assert started == []
    table = (tmp_path / "docs" / "ablation.md").read_text()
    assert "| 5 | + output + normalised features | 1 |" in table
    assert (tmp_path / "docs" / "ablation.svg").read_text().startswith("<svg")

    assert ablation.main([*words, "--steps", "3"]) == 1  # other settings: it is run again, and fails here
    assert started == [job.name]
    assert ablation.kept(job, dataclasses.replace(wanted, captions=5), tmp_path / "results") is None
    monkeypatch.setattr(ablation, "teacher_digest", lambda name: "another teacher of this name")
    assert ablation.kept(job, wanted, tmp_path / "results") is None


def CHANGES(job: Any, wanted: Any) -> tuple[str, ...]:  # noqa: N802
    import ablation

    return (
        *ablation.VARIANTS[job.variant][1],
        f"teacher={wanted.teacher}",
        f"seed={job.seed}",
        f"steps={wanted.steps}",
        f"batch={wanted.batch}",
        "optimizer.warmup=1",
    )


def vars_of(wanted: Any) -> dict[str, Any]:
    return {name: getattr(wanted, name) for name in type(wanted).__dataclass_fields__}


def test_an_ablation_without_its_teacher_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import ablation

    words = ["--teacher", "nobody", "--results", str(tmp_path / "r"), "--work", str(tmp_path / "w")]
    assert ablation.main(words) == TeacherError.exit_code
    assert capsys.readouterr().err.count("there is no model 'nobody'") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_means_and_ranges() -> None:
    import ablation

    def result(variant: str, seed: int, right: float) -> dict[str, Any]:
        scores = {kind: {"right": right} for kind in ("all", "one", "two")}
        same = {"recipe": "bk_base", "output_error": right / 10, "frechet": 3.0, "training_cpu_seconds": 60.0 + seed}
        return {**same, "variant": variant, "seed": seed, "scores": scores, "machine": "a machine", "threads": 1}

    rows = [result("task", seed, share) for seed, share in enumerate((0.25, 0.5, 0.75))] + [result("pruned", 0, 0.0)]
    rows.append({**result("itself", 0, 0.9375), "recipe": "teacher"})
    text = ablation.markdown(rows, ablation.Settings())
    assert (
        "| 2 | the teacher's weights; task | 3 | 50.0 % (25.0 to 75.0) | 50.0 % (25.0 to 75.0) "
        "| 0.0500 (0.0250 to 0.0750) | 3.00 (3.00 to 3.00) |"
    ) in text
    assert "| 0 | pruned, not trained | 1 | 0.0 % |" in text
    assert "A training took 60 to 62 CPU seconds (a machine, 1 threads a job)." in text
    assert "The teacher itself: 93.8% and 93.8% right, Fréchet distance 3.00." in text
    assert "FID" not in text
    picture, left = ablation.picture(rows), ablation.BARS_LEFT
    assert re.findall(r'width="([\d.]+)"', picture) == ["0.0", f"{0.5 * ablation.BARS_WIDTH:.1f}"]
    (ends,) = re.findall(r'class="range" d="M([\d.]+) \d+H([\d.]+)"', picture)  # a single seed has no range
    assert [float(end) - left for end in ends] == [0.25 * ablation.BARS_WIDTH, 0.75 * ablation.BARS_WIDTH]


def test_output_error_is_relative_to_the_teachers_power(stand_in: Path) -> None:
    import ablation
    from score import load_pipeline

    teacher, parts = load_pipeline(str(stand_in))

    class Scaled(torch.nn.Module):
        def forward(self, *inputs: Any, **named: Any) -> Any:
            return tuple(0.75 * output for output in teacher(*inputs, **named))

    assert ablation.output_error(teacher, teacher, parts, 8) == 0
    assert ablation.output_error(Scaled(), teacher, parts, 8) == pytest.approx(0.0625, rel=1e-5)


def test_the_feature_tells_what_is_shown(stand_in: Path) -> None:
    import ablation
    from score import captions_of, load_pipeline

    _, parts = load_pipeline(str(stand_in))

    def moments(seed: int, captions: list[str]) -> Any:
        pictures = draw_many([parse(text) for text in captions], range(seed, seed + len(captions)))
        return ablation.pooled_moments(parts.vae, pictures)

    captions = captions_of("one", 160)
    first, again = moments(0, captions), moments(1000, captions)
    others = moments(0, [text.replace("white", "navy").replace("gray", "navy") for text in captions])
    assert first[1].shape == (64, 64)
    assert frechet_distance(*first, *again) < 0.3 * frechet_distance(*first, *others)
