"""Finding a U-Net in a single file, wherever it stands, and refusing what is something else."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import CONFIGS, FULL_SIZE
from safetensors.numpy import save_file
from teachers import WEIGHTS, random_tensors, write_unet
from test_ldm_names import student

import unet_surgery as us
from unet_surgery.checkpoint.layout import WeightsChoice
from unet_surgery.checkpoint.ldm.single_file import SingleFile, _dotted, read_single_file
from unet_surgery.checkpoint.reader import Weights, open_weights
from unet_surgery.checkpoint.writer import write_weights
from unet_surgery.errors import TeacherError, WeightsMismatchError
from unet_surgery.graph import build, parse_config
from unet_surgery.lower import make_plan
from unet_surgery.lower.original import NUMBERINGS, Numbering, unet_names
from unet_surgery.recipe import load_recipe, select

Arrays = dict[str, np.ndarray]
CONFIG = CONFIGS["sd1"]
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")


def ldm_arrays(config: Mapping[str, Any], numbering: Numbering = "dense", seed: int = 0) -> Arrays:
    """Return a U-Net's random tensors by their original names, without a prefix."""
    names = unet_names(build(parse_config(config)), numbering)
    return {names[name]: value for name, value in random_tensors(config, seed).items()}


def prefixed(prefix: str, tensors: Arrays) -> Arrays:
    return {prefix + name: value for name, value in tensors.items()}


def averaged(tensors: Arrays) -> Arrays:
    """Return what LitEma keeps: the model's names without dots, behind a prefix, and its own two numbers."""
    flat = {"model_ema." + f"diffusion_model.{name}".replace(".", ""): value for name, value in tensors.items()}
    return {**flat, "model_ema.decay": np.float32(0.9999), "model_ema.num_updates": np.int32(470000)}


def open_file(folder: Path, tensors: Arrays) -> Weights:
    save_file({name: np.asarray(value) for name, value in tensors.items()}, folder / "x.safetensors")
    return open_weights(folder, WeightsChoice("x.safetensors", sharded=False, variant=None))


def read(folder: Path, tensors: Arrays, *, ema: bool = False) -> SingleFile:
    with open_file(folder, tensors) as weights:
        return read_single_file(weights, ema=ema, where="x.safetensors")


def contents(weights: Weights) -> dict[str, bytes]:
    out = {}
    for name in weights:
        file, info, _ = weights.locate(name)
        out[name] = os.pread(file.fd, info.num_bytes, info.offset)
    return out


def expected(seed: int = 0) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in random_tensors(CONFIG, seed).items()}


@pytest.mark.parametrize("numbering", NUMBERINGS)
@pytest.mark.parametrize("prefix", PREFIXES, ids=["model", "diffusion_model", "bare"])
def test_the_view_holds_diffusers_tensors(prefix: str, numbering: Numbering, tmp_path: Path) -> None:
    config = student("bk_tiny", CONFIG)
    tensors = prefixed(prefix, ldm_arrays(config, numbering))
    weights = open_file(tmp_path, {**tensors, "betas": np.zeros(4), "model_ema.decay": np.float32(1)})
    found = read_single_file(weights, where="x")
    with weights.renamed(found.unet) as view:
        wanted = {name: value.tobytes() for name, value in random_tensors(config).items()}
        assert contents(view) == wanted
        assert view.shapes() == {name: value.shape for name, value in random_tensors(config).items()}
        assert view.stored().dtypes == {"F32": len(wanted)}  # of the view, not of the file
        assert view.stored().files == weights.stored().files
        view.check_unchanged()
        with (tmp_path / "x.safetensors").open("ab") as file:
            file.write(b"x")
        with pytest.raises(TeacherError, match="changed"):
            view.check_unchanged()
    with pytest.raises(OSError, match="Bad file descriptor"):  # closing the view closed the file
        os.fstat(weights.files[0].fd)
    assert (found.inferred.numbering, found.has_ema, found.is_ema, found.parts) == (numbering, False, False, {})


@pytest.mark.parametrize("recipe", ["bk_tiny", "ssd_1b"])
def test_what_follows_works_on_the_view(recipe: str, tmp_path: Path) -> None:
    """Plan, writer and dtype conversion see a teacher like any other: the student is the same file."""
    original = CONFIGS["sdxl" if recipe == "ssd_1b" else "sd1"]
    teacher = write_unet(tmp_path / "teacher", original)
    for dtype in (None, "fp16"):
        wanted = us.prune(recipe, teacher, tmp_path / f"wanted-{dtype}", dtype=dtype).folder
        weights = open_file(tmp_path, prefixed("model.diffusion_model.", ldm_arrays(original)))
        found = read_single_file(weights, where="x")
        config, chosen = parse_config(found.inferred.config), load_recipe(recipe)
        with weights.renamed(found.unet) as view:
            plan = make_plan(
                config,
                select(chosen, build(config)),
                recipe=chosen.to_data(),
                teacher_id="local",
                weights=view.stored(),
                tensor_bytes=view.tensor_bytes(),
                dtype=None if dtype is None else "F16",
            )
            out = tmp_path / f"out-{dtype}"
            out.mkdir()
            write_weights(plan, view, out, on_bytes=lambda _: None)
        assert (out / WEIGHTS).read_bytes() == (wanted / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["sd1", "sdxl", "upscale"])
def test_names_without_dots_are_undone(name: str) -> None:
    config = {**CONFIGS, "sd1": FULL_SIZE["sd1"]}[name]
    names = unet_names(build(parse_config(config)), "dense").values()
    assert "input_blocks.10.0.in_layers.0.weight" in names or name == "sdxl"
    assert [_dotted(n.replace(".", "")) for n in names] == list(names)


def test_of_two_the_plain_one_is_taken(tmp_path: Path) -> None:
    plain, ema = ldm_arrays(CONFIG), ldm_arrays(CONFIG, seed=1)
    tensors = {**prefixed("model.diffusion_model.", plain), **averaged(ema)}
    for wanted, seed in ((False, 0), (True, 1)):
        weights = open_file(tmp_path, tensors)
        found = read_single_file(weights, ema=wanted, where="x")
        assert (found.has_ema, found.is_ema) == (True, wanted)
        with weights.renamed(found.unet) as view:
            assert contents(view) == expected(seed)


def test_the_averaged_one_is_taken_where_it_is_alone(tmp_path: Path) -> None:
    weights = open_file(tmp_path, averaged(ldm_arrays(CONFIG)))
    found = read_single_file(weights, where="x")
    assert (found.has_ema, found.is_ema) == (True, True)
    with weights.renamed(found.unet) as view:
        assert contents(view) == expected()


def test_the_parts_are_found(tmp_path: Path) -> None:
    one = np.zeros((2, 3), np.float32)
    sd1 = {"first_stage_model.encoder.conv_in.weight": one, "cond_stage_model.transformer.text_model.a.weight": one}
    sdxl = {"conditioner.embedders.0.transformer.text_model.a.weight": one, "conditioner.embedders.1.model.b": one}
    unet = prefixed("model.diffusion_model.", ldm_arrays(CONFIG))
    found = read(tmp_path, {**unet, **sd1, "model.logvar": one, "alphas_cumprod": one})
    assert {name: (part.kind, list(part.tensors)) for name, part in found.parts.items()} == {
        "vae": ("vae", ["encoder.conv_in.weight"]),
        "text_encoder": ("clip", ["text_model.a.weight"]),
    }
    found = read(tmp_path, {**unet, **sdxl})
    assert {name: part.kind for name, part in found.parts.items()} == {
        "text_encoder": "clip",
        "text_encoder_2": "open_clip",
    }
    found = read(tmp_path, {**unet, "cond_stage_model.model.token_embedding.weight": one})
    assert found.parts["text_encoder"].kind == "open_clip"


# --- what must be refused ---------------------------------------------------------------------------------------------

UNET = ldm_arrays(CONFIG)
SINGLE = prefixed("model.diffusion_model.", UNET)
SOME = np.ones((4,), np.float32)
REFUSED: dict[str, tuple[Arrays, str]] = {
    "bare and prefixed": ({**UNET, **SINGLE}, "there are 2 U-Nets"),
    "two prefixes": ({**prefixed("diffusion_model.", UNET), **SINGLE}, "there are 2 U-Nets"),
    "a LoRA": ({"lora_unet_input_blocks_1_1.lora_down.weight": SOME}, "a LoRA"),
    "a LoRA beside the U-Net": ({**SINGLE, "lora_unet_input_blocks_1_1.lora_down.weight": SOME}, "a LoRA"),
    "a LoRA inside the U-Net": (
        {**SINGLE, "model.diffusion_model.input_blocks.1.1.proj_in.lora_down.weight": SOME},
        "1 unexpected: input_blocks.1.1.proj_in.lora_down.weight",
    ),
    "a VAE in a checkpoint": ({"first_stage_model.encoder.conv_in.weight": SOME}, "a checkpoint of vae alone"),
    "no U-Net": (
        {"first_stage_model.x.weight": SOME, "cond_stage_model.transformer.y.weight": SOME},
        "a checkpoint of text_encoder and vae alone",
    ),
    "a VAE": ({"encoder.down.0.block.0.conv1.weight": SOME}, "a VAE"),
    "a ControlNet": ({f"control_model.{name}": value for name, value in UNET.items()}, "a ControlNet"),
    "a ControlNet beside the U-Net": ({**SINGLE, **prefixed("control_model.", UNET)}, "a ControlNet"),
    "SD 3": ({"model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": SOME}, "an SD 3 checkpoint"),
    "Flux": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": SOME}, "a Flux checkpoint"),
    "diffusers' names": (random_tensors(CONFIG), "without its config.json"),
    "an empty file": ({}, "no tensors"),
    "something else": ({"hello.weight": SOME}, "1 tensors: hello.weight"),
    "a U-Net cut short": (dict(itertools.islice(SINGLE.items(), 300)), "x.safetensors"),
    "averaged weights cut short": (
        {n: v for n, v in averaged(UNET).items() if "middle_block1norm" not in n},
        "2 missing: middle_block.1.norm.weight",
    ),
    "averaged weights of something else": ({**averaged(UNET), "model_ema.diffusion_modelhello": SOME}, "hello"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_another_file_is_refused_in_words(case: str, tmp_path: Path) -> None:
    tensors, says = REFUSED[case]
    with pytest.raises(TeacherError) as caught:
        read(tmp_path, tensors)
    assert says in str(caught.value)
    assert (caught.value.where or "").startswith("x.safetensors")
    assert isinstance(caught.value, WeightsMismatchError) == (
        "cut short" in case or "inside" in case or "of so" in case
    )


def test_averaged_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no averaged weights"):
        read(tmp_path, SINGLE, ema=True)
