"""The toy teacher that the package ships: it draws what it is told, and a student of it can be taught."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from toy_pipeline import ROOT, TOY_WORLD

import unet_surgery as us
from unet_surgery.checkpoint.bundled import bundled_folder, is_shipped
from unet_surgery.data.encode import as_pixels, encode_moments
from unet_surgery.hub import fetch_teacher, resolve_teacher
from unet_surgery.runtime.parts import load_parts
from unet_surgery.sample.draw import decode
from unet_surgery.toyworld.checker import judge
from unet_surgery.toyworld.draw import draw_many
from unet_surgery.toyworld.grammar import parse

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_BYTES = 25_000_000


@pytest.fixture(scope="module")
def score() -> ModuleType:
    """``examples/toy_world/score.py``."""
    spec = importlib.util.spec_from_file_location("toy_score", TOY_WORLD / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_shipped_whole_and_small() -> None:
    folder = bundled_folder("toy")
    assert is_shipped("toy")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= MAX_BYTES


def test_its_vae_gives_pictures_back_so_that_the_checker_reads_them(score: ModuleType) -> None:
    vae = load_parts(bundled_folder("toy")).vae
    captions = score.captions_of("one", 72) + score.captions_of("two", 128)
    shown = draw_many([parse(text) for text in captions], range(1000, 1000 + len(captions)))
    with torch.no_grad():
        means = encode_moments(vae, as_pixels(shown)).chunk(2, dim=1)[0]
        again = decode(vae, means * vae.config.scaling_factor, batch=64)
    right = [judge(picture, text).right for picture, text in zip(again, captions, strict=True)]
    assert np.mean(right) >= 0.99
    error = (again.astype(np.float64) - shown) / 255
    assert -10 * np.log10(np.square(error).mean()) >= 30


def test_it_draws_what_captions_say_that_no_training_saw(score: ModuleType) -> None:
    unet, parts = score.load_pipeline("toy")
    captions = score.captions_of("one", 24) + score.captions_of("two", 24)
    pictures = score.drawing(unet, parts, steps=12)(captions, 0)
    found = score.tally(pictures, captions)
    assert found["one"]["right"] >= 0.9
    assert found["two"]["right"] >= 0.9
    # what is right of its own caption is wrong of another
    others = [*captions[1:], captions[0]]
    assert not any(judge(picture, text).right for picture, text in zip(pictures, others, strict=True))


@pytest.mark.parametrize(
    "recipe", ["bk_base", "bk_small", "bk_tiny", "ofa_small", "segmind_small", "segmind_tiny", "sdxs_512"]
)
def test_every_recipe_for_sd_v1_applies_unchanged(recipe: str, tmp_path: Path) -> None:
    result = us.prune(recipe, "toy", tmp_path / "student")
    us.check(result.folder, "toy")
    us.verify(result.folder)
    assert result.plan.student.params < result.plan.teacher.params


def test_pruned_it_draws_nothing_right(score: ModuleType, tmp_path: Path) -> None:
    student = us.prune("bk_tiny", "toy", tmp_path / "student").folder
    unet, parts = score.load_pipeline(str(student))
    captions = score.captions_of("one", 32) + score.captions_of("two", 32)
    assert score.score(score.drawing(unet, parts, steps=12), captions, [0])["all"]["right"] <= 0.1


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_plain_diffusers_draws_with_a_student_of_it(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """As a card says it: without a dtype too, where transformers 5 would leave the text encoder in half precision."""
    from diffusers import StableDiffusionPipeline

    student = us.prune("bk_tiny", "toy", tmp_path / "student").folder
    options = {} if dtype is None else {"torch_dtype": dtype}
    pipeline = StableDiffusionPipeline.from_pretrained(str(student), **options)
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline("a small red circle at the top on a white background", num_inference_steps=2).images
    assert picture.size == (32, 32)


def test_its_folder_is_used_where_it_lies() -> None:
    found = fetch_teacher(resolve_teacher("toy"), progress=lambda _done, _all: None)
    assert found.folder == bundled_folder("toy")


@pytest.mark.extra
def test_the_demo_keeps_its_promise(tmp_path: Path) -> None:
    """What ``make demo`` runs, whole: minutes."""
    done = subprocess.run(
        [sys.executable, str(TOY_WORLD / "demo.py"), "--out", str(tmp_path / "demo")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ": as promised" in done.stdout
    assert (tmp_path / "demo" / "index.html").is_file()
