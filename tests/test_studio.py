"""What the demo does without its page: who draws, what may be asked for, what is drawn, and what it took."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread, get_ident
from typing import Any

import numpy as np
import pytest
import torch
from demo_places import PROMPT
from hub_server import HubStandIn, client_in_process
from safetensors.torch import load_file, save_file

import unet_surgery as us
from unet_surgery.app.memory import most_bytes, weight_bytes
from unet_surgery.app.models import Models, load_models
from unet_surgery.app.studio import Stopped, Studio
from unet_surgery.app.wish import Limits, Wish, read_wish
from unet_surgery.checkpoint.teacher import LOCAL
from unet_surgery.errors import SurgeryError, TeacherError, UsageError
from unet_surgery.evaluate.drawers import choose_dtype, default_dtype
from unet_surgery.sample.draw import sample

CPU = torch.device("cpu")
WISH = Wish(PROMPT, "", 1, 2, 2.0, 32, 32, None)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return us.prune("bk_tiny", "toy", tmp_path_factory.mktemp("demo") / "small-toy").folder


@pytest.fixture(scope="module")
def models(student: Path, one_thread: None) -> Models:
    return load_models(str(student), None, None, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def studio(models: Models) -> Studio:
    return Studio(models)


def test_all_is_drawn_in_one_thread(models: Models) -> None:
    """Each thread that computes has a team of OpenMP's, and where they are more than the cores all are slow."""
    studio, seen = Studio(models), set()
    handle = models.student.unet.register_forward_hook(lambda *_: seen.add(get_ident()))
    try:
        asking = [Thread(target=lambda: list(studio.draw(WISH))) for _ in range(3)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    finally:
        handle.remove()
    assert len(seen) == 1
    assert not seen & {get_ident(), *(thread.ident for thread in asking)}
    studio.close()


# Who draws


def test_the_teacher_is_the_one_that_the_plan_names(models: Models) -> None:
    assert models.teacher is not None
    assert (models.teacher.name, models.student.name) == ("toy", "small-toy")
    assert [d.identity["model"]["parameters"] for d in models.drawers] == [8_605_284, 3_237_444]


def test_parts_that_are_equal_are_in_memory_once(models: Models, student: Path, tmp_path: Path) -> None:
    ours, theirs = models.student.parts, models.teacher.parts  # type: ignore[union-attr]
    assert ours.vae is theirs.vae
    assert ours.text_encoder is theirs.text_encoder
    folder = shutil.copytree(student, tmp_path / "other")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.5}))
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, weights)
    other = load_models(str(folder), None, None, device=CPU, dtype=torch.float32)
    assert other.teacher is not None
    assert other.student.parts.vae is not other.teacher.parts.vae
    assert other.student.parts.text_encoder is not other.teacher.parts.text_encoder


def test_without_a_teacher_that_can_be_found_the_student_draws_alone(student: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(student, tmp_path / "orphan")
    plan = folder / "plan.json"
    text = plan.read_text()
    for name, says in (
        ("nobody/anywhere", "nobody/anywhere cannot be used"),
        ("tiny-random", "another model"),
        (LOCAL, "names a folder of some machine"),
    ):
        plan.write_text(text.replace('"id": "toy"', f'"id": "{name}"', 1))
        alone = load_models(str(folder), None, None, device=CPU, dtype=torch.float32)
        assert alone.teacher is None
        assert says in (alone.no_teacher or "")


def test_a_teacher_that_is_asked_for_must_be_there(student: Path) -> None:
    with pytest.raises(TeacherError, match="there is no model 'nobody'"):
        load_models(str(student), "nobody", None, device=CPU, dtype=torch.float32)
    alone = load_models(str(student), "none", None, device=CPU, dtype=torch.float32)
    assert (alone.teacher, alone.no_teacher) == (None, None)


def test_a_unet_alone_draws_with_its_teachers_parts(student: Path) -> None:
    both = load_models(str(student / "unet"), "toy", None, device=CPU, dtype=torch.float32)
    assert both.student.identity["base"]["name"] == "toy"
    with pytest.raises(UsageError, match="U-Net alone"):
        load_models(str(student / "unet"), None, None, device=CPU, dtype=torch.float32)


def test_the_teacher_of_a_student_on_the_hub_is_the_one_that_its_plan_names(student: Path, tmp_path: Path) -> None:
    hub = HubStandIn()
    hub.add("org/student", student)
    with hub.serve() as endpoint, client_in_process(endpoint, tmp_path / "hf"):
        models = load_models("org/student", None, None, device=CPU, dtype=torch.float32)
    assert [d.name for d in models.drawers] == ["toy", "org/student"]


def test_one_default_of_dtypes_for_all_commands() -> None:
    names = [default_dtype(torch.device(kind)) for kind in ("cpu", "cuda", "mps")]
    assert names == ["fp32", "fp16", "fp32"]
    assert [choose_dtype(None, torch.device(kind)) for kind in ("cpu", "cuda")] == [torch.float32, torch.float16]
    assert choose_dtype("bf16", CPU) is torch.bfloat16
    with pytest.raises(UsageError, match="no such dtype"):
        choose_dtype("fp61", CPU)


# What may be asked for

GOOD = {
    "prompt": "a", "negative": "", "seed": 0, "steps": 1, "guidance": 1, "width": 32, "height": 32, "scheduler": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("prompt", None, "not a text"),
        ("prompt", "x" * 1001, "too long"),
        ("prompt", "\ud800", "no character"),
        ("negative", 7, "negative prompt is not a text"),
        ("seed", -1, "0 to 4294967295"),
        ("seed", 2**32, "0 to 4294967295"),
        ("seed", 0.5, "whole number"),
        ("seed", float("nan"), "not a number"),
        ("seed", True, "not a number"),
        ("steps", 0, "1 to 200"),
        ("steps", 1e9, "1 to 200"),
        ("steps", "3", "not a number"),
        ("steps", 10**400, "not a number"),  # too large for a float
        ("guidance", -1, "0 to 30"),
        ("guidance", float("inf"), "not a number"),
        ("width", 33, "multiple of 4 up to 64"),
        ("width", 0, "multiple of 4 up to 64"),
        ("height", 68, "multiple of 4 up to 64"),
        ("scheduler", "dimm", "did you mean ddim"),
        ("scheduler", "UNet2DConditionModel", "no scheduler"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_what_can(name: str, value: Any, says: str) -> None:
    assert read_wish(GOOD, Limits(4, 64)).width == 32
    with pytest.raises(UsageError, match=says):
        read_wish({**GOOD, name: value}, Limits(4, 64))


# What is drawn


def test_both_draw_from_the_same_noise_what_sample_draws(studio: Studio, models: Models) -> None:
    drawn = list(studio.draw(WISH))
    assert [d.name for d in drawn] == ["toy", "small-toy"]
    for one, drawer in zip(drawn, models.drawers, strict=True):
        expected = sample(drawer.unet, drawer.parts, [PROMPT], seed=1, steps=2, guidance=2.0)
        assert np.array_equal(one.picture, expected[0])
        assert one.seconds > 0
    twins = Studio(Models(models.student, models.student))
    first, second = twins.draw(WISH)
    assert np.array_equal(first.picture, second.picture)


def test_the_seed_decides_the_picture(studio: Studio) -> None:
    again, other = (list(studio.draw(replace(WISH, seed=seed)))[1].picture for seed in (1, 2))
    assert np.array_equal(again, list(studio.draw(WISH))[1].picture)
    assert not np.array_equal(again, other)


def test_progress_counts_calls_and_stop_ends_at_the_next(studio: Studio) -> None:
    told: list[tuple[int, int, int]] = []
    list(studio.draw(WISH, lambda *how_far: told.append(how_far)))
    assert told == [(0, 1, 2), (0, 2, 2), (1, 1, 2), (1, 2, 2)]

    def stop(_number: int, done: int, _calls: int) -> None:
        told.append((9, done, 9))
        studio.stop("another")
        studio.stop("me")

    with pytest.raises(Stopped):
        list(studio.draw(WISH, stop, "me"))
    assert told[4:] == [(9, 1, 9)]
    assert len(list(studio.draw(WISH))) == 2  # the next one is drawn, and no hook is left
    assert not any(drawer.unet._forward_hooks for drawer in studio.models.drawers)


def test_two_wishes_are_drawn_one_after_the_other(studio: Studio) -> None:
    """Else they would measure each other."""
    order: list[str] = []

    def draw(name: str) -> None:
        list(studio.draw(WISH, lambda *_: order.append(name)))

    threads = [Thread(target=draw, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "".join(order) in ("aaaabbbb", "bbbbaaaa")


def test_stop_is_for_ones_own_pictures_waiting_ones_too(studio: Studio) -> None:
    drawing = studio.draw(WISH, None, "a")
    next(drawing)
    ends: list[str] = []

    def wait(who: str) -> None:
        try:
            ends.append(f"{who} drew {len(list(studio.draw(WISH, None, who)))}")
        except Stopped:
            ends.append(f"{who} stopped")

    threads = [Thread(target=wait, args=(who,)) for who in "bc"]
    for thread in threads:
        thread.start()
    while len(studio._asked) < 3:
        time.sleep(0.01)
    studio.stop("b")
    threads[0].join(30)
    assert ends == ["b stopped"]  # while another is still drawing
    assert len(list(drawing)) == 1
    threads[1].join(60)
    assert ends == ["b stopped", "c drew 2"]
    assert studio._asked == []
    studio.stop()
    assert len(list(studio.draw(WISH))) == 2  # a stop is for what was asked for before it


def test_who_asked_first_is_answered_first(studio: Studio) -> None:
    drawing = studio.draw(WISH, None, "first")
    next(drawing)
    order: list[str] = []

    def wait(who: str) -> None:
        for drawn in studio.draw(WISH, None, who):
            order.append(who) if drawn.name == "toy" else None

    threads = [Thread(target=wait, args=(str(number),)) for number in range(6)]
    for number, thread in enumerate(threads):
        thread.start()
        while len(studio._asked) < number + 2:
            time.sleep(0.001)
    assert len(list(drawing)) == 1
    for thread in threads:
        thread.join(60)
    assert order == ["0", "1", "2", "3", "4", "5"]


def test_after_its_end_a_studio_gives_up_what_is_asked(models: Models) -> None:
    ended = Studio(models)
    ended.close()
    with pytest.raises(Stopped):
        list(ended.draw(WISH))
    assert ended._asked == []


def test_a_model_that_draws_nonsense_is_an_error_and_not_a_picture(models: Models) -> None:
    unet = models.student.unet
    bias = unet.conv_out.bias.data.clone()
    unet.conv_out.bias.data.fill_(float("nan"))
    try:
        with pytest.raises(SurgeryError, match="NaN or Inf"):
            list(Studio(Models(models.student, None)).draw(WISH))
    finally:
        unet.conv_out.bias.data.copy_(bias)


def test_an_overlong_prompt_is_told_of(studio: Studio) -> None:
    assert studio.unread_words(PROMPT) == ""
    assert studio.unread_words("red " * 100) == "the text encoder reads 24 tokens; this prompt has 102"


def test_the_toy_world_is_known_by_its_words(studio: Studio, tiny: Path) -> None:
    assert studio.is_toy
    other = load_models(str(tiny), "none", None, device=CPU, dtype=torch.float32)
    assert not Studio(other).is_toy


def test_the_toy_teacher_is_judged_right() -> None:
    teacher = Studio(load_models("toy", None, None, device=CPU, dtype=torch.float32))
    (drawn,) = teacher.draw(Wish(PROMPT, "", 0, 20, 2.0, 32, 32, None))
    assert drawn.verdict == ""
    (other,) = teacher.draw(Wish("anything else", "", 0, 2, 2.0, 32, 32, None))
    assert other.verdict is None


# What it took


def test_memory_counts_what_is_there_at_once() -> None:
    there = torch.zeros(1000)

    def run() -> None:
        one = there + 1  # 4000
        one = one * 2  # 4000 more until the first is gone
        view = one[:10]
        view += 1  # neither a view nor an operator in place takes anything
        del one, view
        torch.ones(500)  # 2000, when all else is gone

    assert most_bytes(run, CPU) == 8000
    assert most_bytes(lambda: there.view(10, 100), CPU) == 0
    assert most_bytes(lambda: [there + i for i in range(5)], CPU) == 20_000
    assert weight_bytes([torch.nn.Linear(10, 10)]) == 440


def test_a_student_takes_less_than_its_teacher(studio: Studio) -> None:
    teacher, student = studio.draw(WISH)
    assert student.peak_bytes < teacher.peak_bytes
    held = weight_bytes([studio.models.student.unet])
    assert held < student.peak_bytes < 3 * held
