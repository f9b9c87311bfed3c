"""A generated folder: what it holds, how it is shared, interrupted and killed, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import functools
import gc
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hub_server import HubStandIn, client_in_process
from PIL import Image
from teachers import entries, folder_bytes, write_unet

import unet_surgery
from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.data.sources import open_source
from unet_surgery.errors import (
    DataError,
    MissingExtraError,
    OutputBusyError,
    OutputError,
    SurgeryError,
    TeacherError,
    UsageError,
)
from unet_surgery.evaluate import drawers, drawing, grids
from unet_surgery.evaluate.generate import generate
from unet_surgery.evaluate.request import GenerateRequest, plan_prompts, plan_protocol
from unet_surgery.runtime.load import load_unet
from unet_surgery.runtime.parts import load_parts
from unet_surgery.sample.draw import sample
from unet_surgery.sample.generated import read_generation
from unet_surgery.sample.keep import Keeping, is_whole_png, picture_name
from unet_surgery.sample.presets import PRESETS
from unet_surgery.sample.schedulers import SAMPLERS, SCHEDULERS, make_scheduler

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

PROMPTS = ["a red circle", 'a "green" square, big', "a blue star\nabove", "größer", "two circles", "a\rcross", "a dot"]
COUNT, SIDE = len(PROMPTS), 16
OPTIONS: dict[str, Any] = {"size": SIDE, "steps": 2, "batch": 2, "device": "cpu", "seed": 3}
NAMES = [f"{i:05d}.png" for i in range(COUNT)]


@pytest.fixture(scope="module", autouse=True)
def _quick(one_thread: None) -> Iterator[None]:
    """The kernels that a CPU uses, and so the last bits, depend on the number of threads; and loading takes longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(unet_surgery.__file__).parents[1]))
        load = functools.cache(drawers.load_drawer)
        patch.setattr(drawing, "load_drawer", load)
        patch.setattr(grids, "load_drawer", load)
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return path


@pytest.fixture(scope="module")
def whole(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process draws without a fault."""
    out = tmp_path_factory.mktemp("whole") / "pictures"
    result = generate("tiny-random", prompts, out, **OPTIONS)
    assert (result.finished, result.num_pictures, result.num_there, result.num_drawn) == (True, COUNT, COUNT, COUNT)
    return out


def same(ours: Path, theirs: Path) -> None:
    """All files are the same, byte for byte; of generation.json all but what says how long it took."""
    files = folder_bytes(ours), folder_bytes(theirs)
    facts = [json.loads(part.pop("generation.json")) | {"seconds": 0} for part in files]
    assert files[0] == files[1]
    assert facts[0] == facts[1]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        return np.array(picture)


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# --- what is told at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": "tiny-rando"}, TeacherError, "did you mean 'tiny-random'"),
        ({"base": "no such"}, TeacherError, "there is no model 'no such'"),
        ({"teacher": "to"}, TeacherError, "there is no model 'to'"),
        ({"scheduler": "ddmi"}, UsageError, "no scheduler"),
        ({"prompts": "nothing.csv"}, DataError, "nothing.csv"),
        ({"init": "nothing"}, DataError, "nothing"),
        ({"limit": 2}, DataError, "fewer prompts than --limit says"),
        ({"preset": "hpsv2", "limit": 3200}, DataError, "fewer prompts than --limit says"),
        ({"size": (0, 32)}, UsageError, "32×0"),
        ({"resize": -1}, UsageError, "-1×-1"),
        ({"scheduler": "DEIS"}, UsageError, "did you mean DEISMultistepScheduler"),
        ({"scheduler": "DPMSolverSDE"}, UsageError, "noise of its own"),
        ({}, MissingExtraError, "unet-surgery doctor says why"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_the_networks_libraries_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "unet_surgery.evaluate.drawing", None)
    asked: dict[str, Any] = {"model": "tiny-random", "prompts": "a circle", "out": tmp_path / "out", **changed}
    with pytest.raises(error, match=message):
        generate(**asked)
    assert not (tmp_path / "out").exists()


def test_pictures_may_be_called_as_who_drew_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path, places: dict[str, Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "load_drawer", drawers.load_drawer)
    drawn = [generate("tiny-random", "a circle", "tiny-random", **OPTIONS).num_drawn for _ in range(2)]
    assert drawn == [1, 0]  # the same command goes on
    by_name = read_generation(Path("tiny-random"))["model"]["parameters"]
    shutil.rmtree("tiny-random")
    shutil.copytree(places["student"], "tiny-random")  # a model of that name is one
    generate("tiny-random", "a circle", "other", **OPTIONS)
    assert read_generation(Path("other"))["model"]["parameters"] < by_name


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of diffusers' KDPM2
@pytest.mark.parametrize("scheduler", sorted({*SCHEDULERS, *SAMPLERS} - {"LMSDiscreteScheduler"}))
def test_every_scheduler_leaves_a_folder_that_goes_on(tmp_path: Path, scheduler: str) -> None:
    """Their options are kept as JSON, and compared when the same command is given again."""
    out = tmp_path / "out"
    options = OPTIONS | {"batch": 1, "steps": 4, "scheduler": scheduler}
    generate("tiny-random", "a circle", out, **options)
    (out / NAMES[0]).unlink()
    assert generate("tiny-random", "a circle", out, **options).num_drawn == 1
    json.loads((out / "generation.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_draws(tmp_path: Path, preset: str) -> None:
    steps = {"steps": 2} if PRESETS[preset].steps > 20 else {}
    result = generate("tiny-random", "a circle", tmp_path / "out", preset=preset, limit=1, size=SIDE, **steps)
    assert result.num_drawn == 1
    assert read_generation(tmp_path / "out")["preset"] == preset


@pytest.mark.parametrize("whose", ["own", "teacher"])
def test_too_many_steps_are_refused_before_a_folder_is_begun(tmp_path: Path, whose: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"does not take this number of steps(.*\n)+.*another number of --steps"):
        generate(
            "tiny-random",
            "a circle",
            out,
            **OPTIONS | {"steps": 51, "scheduler": "lcm"} | ({"teacher": "tiny-random"} if whose == "teacher" else {}),
        )
    assert not out.exists()
    assert generate("tiny-random", "a circle", out, **OPTIONS | {"scheduler": "lcm"}).num_drawn == 1


def test_a_place_where_no_folder_can_be_made_is_no_rival(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written(.*\n)+.*No such file"):
        generate("tiny-random", "a circle", "/proc/nothing/pictures", **OPTIONS)
    with pytest.raises(TeacherError, match="there is no model"):
        generate("x" * 300, "a circle", tmp_path / "out", **OPTIONS)


def test_a_teacher_of_other_latents_is_refused_before_drawing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="of another kind(.*\n)+.*2 pixels a side(.*\n)+.*4 pixels a side"):
        generate("tiny-random", "a circle", tmp_path / "out", teacher="toy", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_folders_of_pictures_do_not_hold_each_other(tmp_path: Path) -> None:
    for out, full in (("a", "a"), ("a", "a/b"), ("a/b", "a")):
        with pytest.raises(UsageError, match="a folder of their own"):
            generate("tiny-random", "a circle", tmp_path / out, full_size=tmp_path / full, resize=8, **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_what_tells_of_mistakes_needs_no_torch() -> None:
    modules = "unet_surgery.evaluate.generate, unet_surgery.evaluate.metrics"
    code = f"import sys; sys.modules['torch'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("size", "is_told"), [(32, False), (16, False), (64, False), (14, True), ((16, 66), True)])
def test_a_size_far_from_the_models_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int | tuple[int, int], is_told: bool
) -> None:
    caplog.set_level(logging.WARNING, "unet_surgery")
    generate("tiny-random", "a circle", tmp_path / "out", size=size, steps=1, device="cpu")
    assert ("tiny-random was made for 32×32" in caplog.text) == is_told


# --- what it holds --------------------------------------------------------------------------------------------------


def test_it_holds_a_picture_of_each_prompt(whole: Path, tiny: Path) -> None:
    assert entries(whole) == sorted([*NAMES, "generation.json", "metadata.csv"])
    expected = sample(load_unet(tiny), load_parts(tiny), PROMPTS, seed=3, steps=2, guidance=7.5, size=SIDE)
    for name, picture in zip(NAMES, expected, strict=True):
        assert levels_apart(pixels(whole / name), picture) <= 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves files to the collector
def test_other_programs_read_it(whole: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    source = open_source(whole, caption_column="caption")
    assert [source.read(i).caption for i in range(COUNT)] == PROMPTS
    rows = datasets.load_dataset("imagefolder", data_dir=str(whole), split="train", cache_dir=str(tmp_path))
    assert list(rows["caption"]) == PROMPTS
    for i in range(COUNT):
        assert np.array_equal(np.array(rows[i]["image"]), pixels(whole / NAMES[i]))
    del rows
    gc.collect()


def test_what_generation_json_says(whole: Path, tiny: Path) -> None:
    facts = read_generation(whole)
    assert list(facts)[:3] == ["format", "format_version", "unet_surgery"]
    assert (facts["format"], facts["format_version"]) == ("unet-surgery-generation", 1)
    assert facts["model"]["name"] == "tiny-random"
    assert facts["model"]["parameters"] == sum(p.numel() for p in load_unet(tiny).parameters())
    assert facts["prompts"]["name"] == "prompts.json"
    assert facts["prompts"]["count"] == facts["images"] == COUNT
    expected = {
        "preset": None,
        "width": SIDE,
        "height": SIDE,
        "drawn_width": SIDE,
        "drawn_height": SIDE,
        "resize": None,
    }
    expected |= {
        "steps": 2,
        "guidance": 7.5,
        "negative": "",
        "seed": 3,
        "seeding": "keyed",
        "batch": 2,
        "dtype": "fp32",
    }
    expected |= {"device": "cpu"}
    assert {key: facts[key] for key in expected} == expected
    assert facts["scheduler"]["class"] == "DDIMScheduler"
    assert facts["scheduler"]["options"]["beta_schedule"] == "scaled_linear"
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["seconds"] > 0
    text = (whole / "generation.json").read_text()
    assert str(whole.parent) not in text
    assert str(tiny) not in text


def test_names_sort_in_the_order_of_prompts() -> None:
    assert picture_name(0, 1) == "00000.png"
    assert picture_name(99_999, 100_000) == "99999.png"
    assert (picture_name(5, 100_001), picture_name(100_000, 100_001)) == ("000005.png", "100000.png")


def test_kept_smaller_and_through_jpeg(whole: Path, prompts: Path, tmp_path: Path) -> None:
    """BK-SDM's script stores a picture as JPEG, opens that, resizes it by PIL's default, and stores that as JPEG."""
    generate("tiny-random", prompts, tmp_path / "kept", resize=8, jpeg=75, full_size=tmp_path / "full", **OPTIONS)
    kept, full = read_generation(tmp_path / "kept"), read_generation(tmp_path / "full")
    assert (kept["width"], kept["drawn_width"], kept["resize"], kept["jpeg"]) == (8, SIDE, "bicubic", 75)
    assert (full["width"], full["drawn_width"], full["resize"], full["jpeg"]) == (SIDE, SIDE, None, 75)
    assert entries(tmp_path / "full") == entries(tmp_path / "kept") == entries(whole)
    for name in NAMES:
        stored = tmp_path / "stored.jpg"
        Image.fromarray(pixels(whole / name)).save(stored)
        with Image.open(stored) as opened:
            assert np.array_equal(pixels(tmp_path / "full" / name), np.array(opened))
            opened.resize((8, 8)).save(tmp_path / "small.jpg")
        with Image.open(tmp_path / "small.jpg") as opened:
            assert np.array_equal(pixels(tmp_path / "kept" / name), np.array(opened))


def test_what_can_be_kept() -> None:
    with pytest.raises(UsageError, match="no such filter"):
        Keeping((8, 8), "cubic")
    for quality in (0, 101):
        with pytest.raises(UsageError, match="quality"):
            Keeping(jpeg=quality)
    file = io.BytesIO()
    Image.new("RGB", (5, 7)).save(file, "PNG")
    data = file.getvalue()
    assert is_whole_png(data[:24], data[-12:], (5, 7))
    assert not is_whole_png(data[:24], data[-12:], (7, 5))
    assert not is_whole_png(data[:24], data[-13:-1], (5, 7))


# --- going on ---------------------------------------------------------------------------------------------------------


def damage(folder: Path) -> None:
    (folder / NAMES[1]).unlink()
    data = (folder / NAMES[4]).read_bytes()
    (folder / NAMES[4]).write_bytes(data[: len(data) // 2])
    (folder / NAMES[6]).write_bytes(b"")


def test_the_same_command_again_does_nothing(whole: Path, prompts: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "copy"))
    before = folder_bytes(out)
    result = generate("tiny-random", prompts, out, **{**OPTIONS, "batch": 3})
    assert (result.finished, result.num_drawn) == (True, 0)
    assert folder_bytes(out) == before


@pytest.mark.parametrize("unfinished", [False, True])
def test_it_goes_on_with_what_is_missing(whole: Path, prompts: Path, tmp_path: Path, unfinished: bool) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "copy"))
    damage(out)
    if unfinished:
        os.unlink(out / "generation.json")
        os.unlink(out / "metadata.csv")
        (out / ".unfinished").mkdir()
    (out / ".00004.png.unet-surgery").write_bytes(b"half")
    kept = (out / NAMES[0]).stat().st_mtime_ns
    result = generate("tiny-random", prompts, out, **OPTIONS)
    assert (result.finished, result.num_drawn) == (True, 3)
    assert (out / NAMES[0]).stat().st_mtime_ns == kept  # drawn again with its neighbour, not written again
    same(out, whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed: 3 → 4"),
        ({"steps": 3}, "steps: 2 → 3"),
        ({"size": 32}, "drawn_height: 16 → 32"),
        ({"scheduler": "euler"}, "scheduler.class: DDIMScheduler → EulerDiscreteScheduler"),
        ({"negative": "blurred"}, "negative:  → blurred"),
        ({"limit": 3}, "prompts.count: 7 → 3"),
        ({"dtype": "bf16"}, "dtype: fp32 → bf16"),
        ({"seeding": "stream"}, "seeding: keyed → stream"),
        ({"jpeg": 90}, "jpeg: None → 90"),
    ],
)
def test_others_do_not_go_on(whole: Path, prompts: Path, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    for begun in (False, True):
        out = Path(shutil.copytree(whole, tmp_path / str(begun)))
        if begun:
            facts = json.loads((out / "generation.json").read_text())
            os.unlink(out / "generation.json")
            (out / ".unfinished").mkdir()
            (out / ".unfinished" / "settings.json").write_text(json.dumps(facts))
        before = folder_bytes(out)
        with pytest.raises(OutputError, match="begun with other settings") as caught:
            generate("tiny-random", prompts, out, **OPTIONS | change)
        assert named in str(caught.value)
        if begun:
            assert folder_bytes(out) == before


def test_another_model_of_the_same_name_does_not_go_on(whole: Path, prompts: Path, tiny: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    model = Path(shutil.copytree(tiny, tmp_path / "tiny-random"))
    config = read_object(model / "unet" / "config.json")
    shutil.rmtree(model / "unet")
    write_unet(model / "unet", config)
    with pytest.raises(OutputError, match=r"model.sha256: .* → "):
        generate(model, prompts, out, **OPTIONS)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_parts_in_any_order(whole: Path, prompts: Path, tmp_path: Path, order: Sequence[int]) -> None:
    results = [generate("tiny-random", prompts, tmp_path / "out", part=(i, 3), **OPTIONS) for i in order]
    assert [result.finished for result in results] == [False, False, True]
    assert sum(result.num_drawn for result in results) == COUNT
    assert results[-1].num_there == COUNT
    same(tmp_path / "out", whole)
    assert read_generation(tmp_path / "out")["seconds"] is None


def test_parts_of_different_batches_leave_no_prompt_out(whole: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate("tiny-random", prompts, out, part=(0, 2), **OPTIONS | {"batch": 3})
    result = generate("tiny-random", prompts, out, part=(1, 2), **OPTIONS)
    assert (result.finished, result.num_there) == (True, COUNT)
    for name in NAMES:
        assert levels_apart(pixels(out / name), pixels(whole / name)) <= 1
    facts = read_generation(out)
    assert sorted(one["batch"] for one in facts["drawn_by"]) == [2, 3]
    assert (facts["batch"], facts["device"]) == (None, "cpu")


def test_room_for_all_folders_of_a_disk(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = COUNT * SIDE * SIDE * 3
    free = (4 << 20) + 2 * one - 1
    monkeypatch.setattr(disk, "free_bytes", lambda folder: free if tmp_path in folder.parents else 1 << 40)
    with pytest.raises(OutputError, match="not enough room"):
        generate("tiny-random", prompts, tmp_path / "out", full_size=tmp_path / "full", **OPTIONS)
    assert not list(tmp_path.rglob("*.png"))
    assert generate("tiny-random", prompts, tmp_path / "alone", **OPTIONS).finished


def test_a_full_disk(whole: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = disk.replace_file, 0

    def refuse(path: Path, content: Any, *, force: bool = False) -> None:
        nonlocal written
        written += path.suffix == ".png"
        if written > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content, force=force)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "replace_file", refuse)
        with pytest.raises(OutputError, match="what is drawn stays.*\n.*\n.*No space"):
            generate("tiny-random", prompts, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out" / "generation.json").exists()
    result = generate("tiny-random", prompts, tmp_path / "out", **OPTIONS)
    assert 0 < result.num_drawn < COUNT
    same(tmp_path / "out", whole)


def test_one_process_a_part(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate("tiny-random", prompts, out, part=(1, 2), **OPTIONS)
    with open(out / ".unfinished" / "part-1-of-2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputBusyError, match="another process is drawing this part"):
            generate("tiny-random", prompts, out, part=(0, 2), **OPTIONS)
        assert not generate("tiny-random", prompts, out, part=(1, 2), **OPTIONS).finished


# --- killed, interrupted, shared by real processes --------------------------------------------------------------------


def forked(work: Callable[[], object]) -> int:
    """Run ``work`` in a process of its own, which has loaded all that this one has."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            os._exit(code)
    return pid


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def num_whole(folder: Path) -> int:
    """Every picture's file is a whole one: decoding it raises if not."""
    paths = sorted(folder.glob("[0-9]*.png"))
    for path in paths:
        assert pixels(path).shape == (SIDE, SIDE, 3)
    return len(paths)


def test_killed_again_and_again(whole: Path, prompts: Path, tmp_path: Path) -> None:
    """Each process is killed at some moment after it has written a picture more, each time another moment."""
    out = tmp_path / "out"
    generate("tiny-random", prompts, tmp_path / "warm", limit=1, **OPTIONS)
    for kill in range(5):
        before = num_whole(out) if out.is_dir() else 0
        child = forked(lambda: generate("tiny-random", prompts, out, **OPTIONS))
        wait_for(lambda before=before: len(list(out.glob("*.png"))) > before or (out / "generation.json").exists())
        time.sleep(0.003 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert num_whole(out) > before or (out / "generation.json").exists()
        if (out / "generation.json").exists():
            break
    assert kill >= 1
    assert generate("tiny-random", prompts, out, **OPTIONS).finished
    same(out, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(whole: Path, prompts: Path, tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "out"
    words = ["generate", "tiny-random", "-p", str(prompts), "-o", str(out), "--size", str(SIDE), "--steps", "2"]
    words += ["--batch", "2", "--device", "cpu", "--seed", "3"]

    def run() -> None:
        with open(tmp_path / "said", "w", buffering=1) as said:
            os.dup2(said.fileno(), 2)
            sys.stderr = said
            signal.signal(signal.SIGINT, signal.default_int_handler)
            from unet_surgery.cli.main import app

            app(words, standalone_mode=True)

    child = forked(run)
    wait_for(lambda: len(list(out.glob("*.png"))) >= 2)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    said = (tmp_path / "said").read_text()
    assert os.waitstatus_to_exitcode(status) == code, said
    assert "of 7 pictures are drawn; the same command goes on from there" in said
    assert "nothing half-written was left" in said
    assert 2 <= num_whole(out) < COUNT
    assert not [name for name in os.listdir(out) if name.endswith(".unet-surgery")]
    assert generate("tiny-random", prompts, out, **OPTIONS).finished
    same(out, whole)


def launched(words: Sequence[str], prompts: Path, out: Path) -> str:
    words = [
        sys.executable,
        *words,
        "-m",
        "unet_surgery",
        "generate",
        "tiny-random",
        "-p",
        str(prompts),
        "-o",
        str(out),
    ]
    words += ["--size", str(SIDE), "--steps", "2", "--batch", "2", "--device", "cpu", "--seed", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_real_processes(whole: Path, prompts: Path, tmp_path: Path) -> None:
    """As a launcher starts them, which says by RANK who is who; no process knows of the other."""
    out = tmp_path / "out"
    children = [
        forked(functools.partial(generate, "tiny-random", prompts, out, part=(rank, 2), **OPTIONS)) for rank in range(2)
    ]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    same(out, whole)


@pytest.mark.extra
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"],
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"],
    ],
)
def test_launchers(whole: Path, prompts: Path, tmp_path: Path, launcher: list[str]) -> None:
    if "accelerate" in launcher[1]:
        launcher = [*launcher, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    assert launched(launcher, prompts, tmp_path / "out") == f"{tmp_path / 'out'}\n"
    same(tmp_path / "out", whole)


# --- one stream of noise ----------------------------------------------------------------------------------------------


def test_one_stream_repeats_a_plain_loop(prompts: Path, tiny: Path, tmp_path: Path) -> None:
    """Pictures of a loop over batches through diffusers' pipeline with one generator, as BK-SDM's script has it."""
    options = {**OPTIONS, "seeding": "stream", "scheduler": "pndm", "seed": 1234}
    generate("tiny-random", prompts, tmp_path / "out", **options)
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    parts = load_parts(tiny)
    pipeline = StableDiffusionPipeline(
        parts.vae,
        parts.text_encoder,
        parts.tokenizer,
        load_unet(tiny),
        make_scheduler(parts.scheduler_config, "pndm"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    diffusers.utils.logging.set_verbosity(level)
    generator = torch.Generator("cpu").manual_seed(1234)
    for start in range(0, COUNT, 2):
        texts = PROMPTS[start : start + 2]
        images = pipeline(texts, num_inference_steps=2, height=SIDE, width=SIDE, generator=generator).images
        for index, image in enumerate(images, start):
            assert levels_apart(pixels(tmp_path / "out" / NAMES[index]), np.array(image)) <= 1

    parted = tmp_path / "parted"
    for index in (1, 0):
        generate("tiny-random", prompts, parted, part=(index, 2), **options)
    same(parted, tmp_path / "out")
    damage(parted)
    generate("tiny-random", prompts, parted, **options)
    same(parted, tmp_path / "out")
    with pytest.raises(OutputError, match=r"stream.batch: 2 → 3"):
        generate("tiny-random", prompts, parted, **options | {"batch": 3})
    with pytest.raises(UsageError, match="one stream of noise is for samplers that draw none"):
        generate("tiny-random", prompts, tmp_path / "other", **options | {"scheduler": "euler-a"})


# --- whose U-Net, and from what ---------------------------------------------------------------------------------------


def test_a_unet_alone_borrows_the_rest(places: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    student = places["student"]
    with pytest.raises(UsageError, match="U-Net alone(.*\n)+.*--base"):
        generate(student / "unet", prompts, tmp_path / "none", **OPTIONS)
    generate(student / "unet", prompts, tmp_path / "alone", base="tiny-random", **OPTIONS)
    generate(student, prompts, tmp_path / "whole", **OPTIONS)
    for name in NAMES:
        assert np.array_equal(pixels(tmp_path / "alone" / name), pixels(tmp_path / "whole" / name))
    assert not (tmp_path / "none").exists()


def test_models_of_the_hub(
    tiny: Path, places: dict[str, Path], prompts: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNET_SURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(drawing, "load_drawer", drawers.load_drawer)
    hub = HubStandIn()
    hub.add("org/tiny", tiny)
    with hub.serve() as endpoint, client_in_process(endpoint, tmp_path / "hf"):
        generate(places["student"] / "unet", prompts, tmp_path / "student", base="org/tiny", **OPTIONS)
        weights = "unet/diffusion_pytorch_model.safetensors"
        assert weights not in [parse_qs(record.query)["name"][0] for record in hub.seen("GET", "cdn")]
        generate("org/tiny", prompts, tmp_path / "out", **OPTIONS)
    for name in NAMES:
        assert np.array_equal(pixels(tmp_path / "out" / name), pixels(whole / name))
    assert read_generation(tmp_path / "out")["model"]["name"] == "org/tiny"
    assert read_generation(tmp_path / "out")["model"]["sha256"] == read_generation(whole)["model"]["sha256"]
    assert read_generation(tmp_path / "student")["base"]["name"] == "org/tiny"


def test_other_kinds_of_models(prompts: Path, unet_folders: dict[str, Path], tmp_path: Path) -> None:
    for model, match in (
        (unet_folders["sdxl"], "conditions beside time and text"),
        ("sdxl-random", "addition_embed_type: text_time"),
        (unet_folders["sd1"], "does not fit"),
        ("nobody", "there is no model"),
    ):
        with pytest.raises(SurgeryError, match=match):
            generate(model, prompts, tmp_path / "out", base="tiny-random", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_image_to_image(places: dict[str, Path], prompts: Path, whole: Path, tmp_path: Path) -> None:
    init = places["pictures"]
    with pytest.raises(DataError, match="not of one number(.*\n)+.*7 pictures(.*\n)+.*10"):
        generate("tiny-random", prompts, tmp_path / "out", init=init, **OPTIONS)
    options = {**OPTIONS, "steps": 4}
    generate("tiny-random", prompts, tmp_path / "a", init=init, limit=5, strength=0.25, **options)
    plain = tmp_path / "plain"
    plain.mkdir()
    for k in range(5):
        shutil.copy(init / f"{k:03d}.png", plain / f"{k}.png")
    generate("tiny-random", prompts, tmp_path / "b", init=plain, limit=5, strength=0.25, **options)
    (plain / "._0.png").write_bytes(b"macOS")
    (plain / "z.png").mkdir()
    assert generate("tiny-random", prompts, tmp_path / "b", init=plain, limit=5, strength=0.25, **options).finished
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "white").save(file, "PNG")
    kept = (plain / "4.png").read_bytes()
    (plain / "4.png").write_bytes(file.getvalue().ljust(len(kept), b"\0")[: len(kept)])  # as many bytes
    with pytest.raises(OutputError, match="init: "):
        generate("tiny-random", prompts, tmp_path / "b", init=plain, limit=5, strength=0.25, **options)
    for name in NAMES[:5]:
        assert np.array_equal(pixels(tmp_path / "a" / name), pixels(tmp_path / "b" / name))
        assert levels_apart(pixels(tmp_path / "a" / name), pixels(whole / name)) > 10
    facts = read_generation(tmp_path / "a")
    assert (facts["strength"], len(facts["init"])) == (0.25, 64)
    with pytest.raises(OutputError, match="strength: 0.25 → 0.5"):
        generate("tiny-random", prompts, tmp_path / "a", init=init, limit=5, strength=0.5, **options)
    generate("tiny-random", None, tmp_path / "own", init=init, **options)  # its metadata has captions
    assert read_generation(tmp_path / "own")["prompts"]["count"] == 10
    for wrong, match in (
        ({"size": (16, 32)}, "squares"),
        ({"strength": 2.0}, "share"),
        ({"init": "/nowhere"}, "no such"),
    ):
        with pytest.raises(SurgeryError, match=match):
            generate("tiny-random", prompts, tmp_path / "c", **{**options, "init": init, "limit": 2, **wrong})
    for wrong in ({"strength": 0.5}, {"masks": init}):
        with pytest.raises(UsageError, match="--init"):
            generate("tiny-random", prompts, tmp_path / "c", **options, **wrong)


def test_inpainting(places: dict[str, Path], prompts: Path, tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "inpaint"))
    config = {**read_object(model / "unet" / "config.json"), "in_channels": 9}
    shutil.rmtree(model / "unet")
    write_unet(model / "unet", config)
    for name, box in (("left", (0, 0, 8, 16)), ("right", (8, 0, 16, 16))):
        (tmp_path / name).mkdir()
        for k in range(3):
            mask = Image.new("L", (SIDE, SIDE))
            mask.paste(255, box)
            mask.save(tmp_path / name / f"{k}.png")
    options = {**OPTIONS, "init": places["pictures"], "limit": 3}
    for name in ("left", "right"):
        generate(model, prompts, tmp_path / f"{name}-out", masks=tmp_path / name, **options)
    one, other = (pixels(tmp_path / f"{name}-out" / NAMES[0]) for name in ("left", "right"))
    assert levels_apart(one, other) > 3
    assert read_generation(tmp_path / "left-out")["strength"] == 1.0
    with pytest.raises(UsageError, match="inpaints"):
        generate(model, prompts, tmp_path / "x", **OPTIONS)
    with pytest.raises(UsageError, match="masks are for inpainting"):
        generate("tiny-random", prompts, tmp_path / "x", masks=tmp_path / "left", **options)
    with pytest.raises(DataError, match="not of one number"):
        generate(model, prompts, tmp_path / "x", masks=tmp_path / "left", **options | {"limit": 4})


def test_beside_the_teacher(prompts: Path, places: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = generate("tiny-random", prompts, out, teacher="tiny-random", grids=5, limit=6, **OPTIONS)
    assert result.grids == (tmp_path / "out-grids" / "grid-00000.png",)
    shown = pixels(result.grids[0])
    assert shown.shape[0] > 5 * 128
    left = shown[:, 236 : 236 + 128]  # the margins and captions of sample/grid.py
    right = shown[:, 236 + 138 : 236 + 266]
    assert np.array_equal(left[60:], right[60:])  # the same model, the same noise
    assert "out-grids" not in entries(out)
    again = generate("tiny-random", prompts, out, teacher=places["student"] / "unet", grids=2, limit=6, **OPTIONS)
    assert (again.num_drawn, len(again.grids)) == (0, 1)
    assert not np.array_equal(pixels(again.grids[0])[60:188, 236:364], pixels(again.grids[0])[60:188, 374:502])


def test_a_teacher_is_refused_before_drawing(
    prompts: Path, unet_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for teacher, match in (("nobody", "there is no model"), (unet_folders["sdxl"], "conditions beside")):
        with pytest.raises(SurgeryError, match=match):
            generate("tiny-random", prompts, out, teacher=teacher, **OPTIONS)
    (tmp_path / "out-grids").write_text("")
    with pytest.raises(OutputError, match="grids' folder is a file"):
        generate("tiny-random", prompts, out, teacher="tiny-random", **OPTIONS)
    (tmp_path / "out-grids").unlink()
    with pytest.raises(UsageError, match="share a folder"):
        generate("tiny-random", prompts, out, teacher="tiny-random", full_size=tmp_path / "out-grids", **OPTIONS)
    assert not out.exists()
    make = disk.make_folders

    def refuse(path: Path) -> None:
        if path.name == "out-grids":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        make(path)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "make_folders", refuse)
        with pytest.raises(OutputError, match="the grids cannot be written(.*\n)+.*No space"):
            generate("tiny-random", prompts, out, teacher="tiny-random", grids=2, limit=2, **OPTIONS)
    assert read_generation(out)["images"] == 2  # the pictures are done all the same
    assert generate("tiny-random", prompts, out, teacher="tiny-random", grids=2, limit=2, **OPTIONS).grids


def test_a_compiled_unet_is_given_whole_batches(
    prompts: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another shape would be another compilation."""
    unets: list[Any] = []
    seen: list[int] = []

    def compiling(self: Any) -> None:
        unets.append(self)

    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    forward = UNet2DConditionModel.forward

    def counting(self: Any, sample: torch.Tensor, *more: Any, **options: Any) -> Any:
        seen.append(len(sample))
        return forward(self, sample, *more, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counting)
    for seeding in ("keyed", "stream"):
        options = {**OPTIONS, "batch": 4, "seeding": seeding}
        generate("tiny-random", prompts, tmp_path / seeding, compiled=True, channels_last=True, **options)
        if seeding == "stream":
            generate("tiny-random", prompts, tmp_path / "plain", **options)
    assert len(unets) == 1
    assert seen[:4] == [8, 8, 8, 8]
    for name in NAMES:
        assert levels_apart(pixels(tmp_path / "keyed" / name), pixels(whole / name)) <= 1
        assert levels_apart(pixels(tmp_path / "stream" / name), pixels(tmp_path / "plain" / name)) <= 1


# --- presets and arguments --------------------------------------------------------------------------------------------


def test_the_presets_are_the_published_protocols() -> None:
    facts = {
        name: (p.count, p.size, p.resize, p.jpeg, p.scheduler, p.steps, p.guidance, p.seed)
        for name, p in PRESETS.items()
    }
    assert facts == {
        "mscoco30k": (30_000, 512, 256, 75, "pndm", 25, 7.5, 1234),
        "mscoco5k": (5_000, 512, None, None, "dpmsolver++", 8, 7.5, 0),
        "hpsv2": (800, 512, None, 75, "dpmsolver++", 8, 7.5, 0),
    }


def asked(prompts: str | Path | None = None, **options: Any) -> GenerateRequest:
    return GenerateRequest("tiny-random", prompts, Path("out"), **options)


def test_options_override_a_preset() -> None:
    protocol = plan_protocol(asked(preset="mscoco30k"))
    assert (protocol.size, protocol.scheduler, protocol.steps, protocol.seed) == ((512, 512), "pndm", 25, 1234)
    assert protocol.keeping == Keeping((256, 256), "bicubic", 75)
    options = {"steps": 16, "scheduler": "ddim", "guidance": 2.0, "seed": 0, "size": (64, 32), "resize": 0, "jpeg": 0}
    protocol = plan_protocol(asked(preset="mscoco30k", **options))
    assert (protocol.steps, protocol.scheduler, protocol.guidance, protocol.seed) == (16, "ddim", 2.0, 0)
    assert (protocol.size, protocol.keeping) == ((64, 32), Keeping())
    assert plan_protocol(asked(resize=(8, 4))).keeping.size == (4, 8)  # PIL's order


def test_a_preset_runs(prompts: Path, tmp_path: Path) -> None:
    options = {"size": SIDE, "resize": 8, "steps": 2, "limit": 3, "device": "cpu", "batch": 2}
    generate("tiny-random", prompts, tmp_path / "out", preset="mscoco30k", **options)
    facts = read_generation(tmp_path / "out")
    assert (facts["preset"], facts["scheduler"]["class"], facts["jpeg"]) == ("mscoco30k", "PNDMScheduler", 75)
    assert facts["scheduler"]["options"]["skip_prk_steps"] is True
    assert pixels(tmp_path / "out" / NAMES[0]).shape == (8, 8, 3)


def test_presets_want_their_prompts(prompts: Path) -> None:
    with pytest.raises(UsageError, match=r"mscoco30k needs its prompts(.*\n)+.*metadata.csv(.*\n)+.*--prompts"):
        plan_prompts(asked(preset="mscoco30k"))
    with pytest.raises(DataError, match=r"not the prompts of the preset hpsv2(.*\n)+.*800(.*\n)+.*7(.*\n)*.*--limit"):
        plan_prompts(asked(prompts, preset="hpsv2"))
    assert len(plan_prompts(asked(prompts, preset="hpsv2", limit=3)).texts) == 3
    with pytest.raises(UsageError, match="did you mean mscoco30k"):
        plan_protocol(asked(preset="mscoco30"))
    with pytest.raises(UsageError, match="prompts are needed"):
        plan_prompts(asked())


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"batch": 0}, "batch must be"),
        ({"steps": 0}, "steps must be"),
        ({"limit": 0}, "limit must be"),
        ({"grids": 0}, "grids must be"),
        ({"seeding": "random"}, "no such seeding"),
        ({"guidance": float("nan")}, "guidance is not a finite"),
        ({"guidance": float("inf")}, "guidance is not a finite"),
        ({"seeding": "stream", "seed": 1 << 64}, "64 bits"),
        ({"seeding": "stream", "seed": -(1 << 63) - 1}, "64 bits"),
        ({"seeding": "stream", "init": "pictures"}, "text alone"),
        ({"part": (2, 2)}, "no such part"),
        ({"scheduler": "eulr"}, "did you mean euler"),
        ({"resize_filter": "cubic"}, "no such filter"),
        ({"dtype": "fp8"}, "no such dtype"),
        ({"device": "quantum"}, "no such device"),
        ({"size": 17}, "no latents for this size"),
    ],
)
def test_arguments_without_sense(tmp_path: Path, wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        generate("tiny-random", "a cat", tmp_path / "out", **{**OPTIONS, **wrong})
    assert not (tmp_path / "out").exists()


def test_where_pictures_may_go(tiny: Path, prompts: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    for out, match in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "something else"),
        (tmp_path / "file" / "no" / "out", "leads through what is no folder"),
    ):
        with pytest.raises(OutputError, match=match):
            generate("tiny-random", prompts, out, **OPTIONS)
    with pytest.raises(OutputError, match="input"):
        generate(tiny, prompts, tiny / "out", **OPTIONS)
    (tmp_path / "x").mkdir()
    for full_size in (tmp_path / "x", tmp_path / "x" / "full"):
        with pytest.raises(UsageError, match="a folder of their own"):
            generate("tiny-random", prompts, tmp_path / "x", full_size=full_size, **OPTIONS)


def test_reading_generation_json(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not made by unet-surgery generate"):
        read_generation(tmp_path)
    (tmp_path / ".unfinished").mkdir()
    with pytest.raises(DataError, match="not all drawn yet"):
        read_generation(tmp_path)
    for text, match in (('{"format": "x"}', "known"), ("[", "valid JSON")):
        (tmp_path / "generation.json").write_text(text)
        with pytest.raises(DataError, match=match):
            read_generation(tmp_path)


def test_without_torch(tmp_path: Path) -> None:
    """A module of that name that does not import stands in its place."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    words = [sys.executable, "-m", "unet_surgery", "generate", "tiny-random", "-p", "a", "-o", str(tmp_path / "out")]
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 1
    assert "no torch here" in done.stderr
    assert "unet-surgery[train]" in done.stderr
    assert "fault of unet-surgery" not in done.stderr


def test_sizes_as_people_write_them() -> None:
    from unet_surgery.cli.options import size_of

    assert [size_of("size", text, "512 or 512x768") for text in (None, "512", "512x768", "64X32", "0")] == [
        None,
        512,
        (768, 512),
        (32, 64),
        0,
    ]
    for text in ("", "x", "512x", "-1", "1.5", "512x512x3"):
        with pytest.raises(UsageError, match="--size is not a size"):
            size_of("size", text, "512 or 512x768")
