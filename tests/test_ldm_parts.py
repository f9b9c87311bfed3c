"""VAEs and text encoders in the original layout and back, tensor for tensor as diffusers' own conversion has them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.layout import WeightsChoice
from unet_surgery.checkpoint.ldm.parts import read_part, write_part
from unet_surgery.checkpoint.ldm.single_file import PartKind, PartSource
from unet_surgery.checkpoint.reader import Weights, open_weights
from unet_surgery.checkpoint.tensorfile import OutTensor, in_file_order, write_tensors
from unet_surgery.errors import TeacherError

Tensors = dict[str, torch.Tensor]

VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
CLIP_CONFIG = CLIPTextConfig(
    vocab_size=60, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, projection_dim=8,
    max_position_embeddings=16,
)  # fmt: skip


def randomized(model: Any) -> Tensors:
    """Return a model's tensors, every value another."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(t.shape, generator=generator, dtype=t.dtype) for name, t in model.state_dict().items()}


def vae() -> Tensors:
    return randomized(AutoencoderKL(**VAE_CONFIG))


def text_encoder(*, projection: bool = False) -> Tensors:
    """Return a text encoder's tensors by their names in every published file, which begin with ``text_model.``."""
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIP_CONFIG)
    names = ("text_model.", "text_projection.")
    return {n if n.startswith(names) else f"text_model.{n}": t for n, t in randomized(model).items()}


def opened(path: Path, tensors: Tensors) -> Weights:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return open_weights(path.parent, WeightsChoice(path.name, sharded=False, variant=None))


def stored(path: Path, tensors: list[OutTensor]) -> Tensors:
    """Write ``tensors``, and return what the reference implementation reads."""
    disk.replace_file(path, lambda fd: write_tensors(fd, in_file_order(tensors), lambda _: None), force=True)
    return load_file(path)


def to_original(kind: PartKind, tensors: Tensors, prefix: str, folder: Path) -> Tensors:
    with opened(folder / "part.safetensors", tensors) as weights:
        located = {name: weights.locate(name) for name in weights}
        return stored(folder / "original.safetensors", write_part(kind, located, prefix))


def to_diffusers(kind: PartKind, tensors: Tensors, prefix: str, folder: Path) -> Tensors:
    with opened(folder / "single.safetensors", tensors) as weights:
        located = {name.removeprefix(prefix): weights.locate(name) for name in weights}
        made = read_part(PartSource(kind, prefix, located))
        assert made == in_file_order(made)
        return stored(folder / "component.safetensors", made)


def assert_equal(ours: Tensors, theirs: Tensors) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor, theirs[name]), name


def diffusers_open_clip(tensors: Tensors, prefix: str, *, projection: bool) -> Tensors:
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIP_CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert_open_clip_checkpoint(model, dict(tensors), prefix=prefix)


# --- as diffusers has them --------------------------------------------------------------------------------------------


def test_a_vae(tmp_path: Path) -> None:
    ours = vae()
    original = to_original("vae", ours, "first_stage_model.", tmp_path)
    assert original["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert "first_stage_model.decoder.up.2.block.0.conv1.weight" in original  # the coarsest stage is the last
    assert_equal(convert_ldm_vae_checkpoint(dict(original), VAE_CONFIG), ours)
    assert_equal(to_diffusers("vae", original, "first_stage_model.", tmp_path), ours)


def test_a_vae_with_the_attention_names_of_before(tmp_path: Path) -> None:
    ours = vae()
    old = {}
    for name, tensor in ours.items():
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")  # noqa: PLW2901
        old[name] = tensor
    assert old.keys() != ours.keys()
    assert_equal(
        to_original("vae", old, "first_stage_model.", tmp_path),
        to_original("vae", ours, "first_stage_model.", tmp_path),
    )


def test_a_vae_whose_loss_was_saved_with_it(tmp_path: Path) -> None:
    original = to_original("vae", vae(), "first_stage_model.", tmp_path)
    extra = {**original, "first_stage_model.loss.logvar": torch.zeros(1)}
    assert_equal(to_diffusers("vae", extra, "first_stage_model.", tmp_path), vae())


@pytest.mark.parametrize("prefix", ["cond_stage_model.transformer.", "conditioner.embedders.0.transformer."])
def test_the_text_encoder_of_sd1(prefix: str, tmp_path: Path) -> None:
    ours = text_encoder()
    original = to_original("clip", ours, prefix, tmp_path)
    assert_equal(convert_ldm_clip_checkpoint(original), ours)
    unused = {"text_model.embeddings.position_ids": (1, 16), "logit_scale": (), "text_projection.weight": (12, 12)}
    buffers = {**original, **{prefix + name: torch.zeros(shape) for name, shape in unused.items()}}
    assert_equal(to_diffusers("clip", buffers, prefix, tmp_path), ours)


@pytest.mark.parametrize(
    ("prefix", "projection"),
    [("cond_stage_model.model.", False), ("conditioner.embedders.1.model.", True)],
    ids=["sd2", "sdxl"],
)
def test_the_text_encoders_of_sd2_and_sdxl(prefix: str, projection: bool, tmp_path: Path) -> None:
    ours = text_encoder(projection=projection)
    original = to_original("open_clip", ours, prefix, tmp_path)
    assert original[f"{prefix}transformer.resblocks.1.attn.in_proj_weight"].shape == (36, 12)
    assert (f"{prefix}text_projection" in original) == projection
    # diffusers takes a third of in_proj to be as wide as the projection: the published ones are square
    square = {name: t for name, t in original.items() if not name.endswith("text_projection")}
    projections = {name: t for name, t in ours.items() if not name.startswith("text_projection")}
    assert_equal(diffusers_open_clip(square, prefix, projection=projection), projections)
    unused = {f"{prefix}logit_scale": torch.tensor(1.0), f"{prefix}attn_mask": torch.zeros(16, 16)}
    assert_equal(to_diffusers("open_clip", {**original, **unused}, prefix, tmp_path), ours)


def test_a_projection_is_transposed(tmp_path: Path) -> None:
    ours = text_encoder(projection=True)
    original = to_original("open_clip", ours, "conditioner.embedders.1.model.", tmp_path)
    assert torch.equal(
        original["conditioner.embedders.1.model.text_projection"], ours["text_projection.weight"].T.contiguous()
    )


def test_the_last_of_24_layers_is_left_out_of_sd2_alone(tmp_path: Path) -> None:
    prefix = "cond_stage_model.model."
    block = {
        name.replace("resblocks.0.", "resblocks.23."): t
        for name, t in to_original("open_clip", text_encoder(), prefix, tmp_path).items()
    }
    original = {**block, **to_original("open_clip", text_encoder(), prefix, tmp_path)}
    unused = {**original, f"{prefix}text_projection": torch.zeros(12, 12)}
    ours = to_diffusers("open_clip", unused, prefix, tmp_path)
    assert_equal(ours, text_encoder())
    assert_equal(ours, diffusers_open_clip(unused, prefix, projection=False))
    sdxl = {name.replace(prefix, "conditioner.embedders.1.model."): t for name, t in original.items()}
    kept = to_diffusers("open_clip", sdxl, "conditioner.embedders.1.model.", tmp_path)
    assert "text_model.encoder.layers.23.mlp.fc1.weight" in kept


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_names_without_text_model_are_the_same(kind: PartKind, tmp_path: Path) -> None:
    """transformers 5 saves them so."""
    ours = text_encoder()
    bare = {name.removeprefix("text_model."): tensor for name, tensor in ours.items()}
    assert_equal(to_original(kind, bare, "x.", tmp_path), to_original(kind, ours, "x.", tmp_path))
    if kind == "clip":
        assert_equal(to_diffusers("clip", bare, "", tmp_path), ours)


# --- what must be refused ---------------------------------------------------------------------------------------------

LAYER = "text_model.encoder.layers.0.self_attn"
BROKEN: dict[str, tuple[PartKind, dict[str, tuple[int, ...] | None], str]] = {
    "a VAE with something else": ("vae", {"decoder.mid_block.attentions.0.foo.weight": (3,)}, "foo.weight"),
    "a VAE's attention of three pixels": ("vae", {"decoder.mid_block.attentions.0.to_q.weight": (16, 16, 3)}, "to_q"),
    "a VAE's attention twice": ("vae", {"decoder.mid_block.attentions.0.query.weight": (16, 16)}, "two in one"),
    "a stage beyond all bounds": ("vae", {"decoder.up_blocks.99999.resnets.0.conv1.bias": (8,)}, "99999"),
    "a text encoder with something else": ("clip", {"vision_model.weight": (3,)}, "vision_model"),
    "a text encoder twice": ("clip", {"final_layer_norm.weight": (12,)}, "two in one"),
    "queries without keys": ("open_clip", {f"{LAYER}.k_proj.weight": None}, f"{LAYER}.k_proj.weight"),
    "keys without queries": ("open_clip", {f"{LAYER}.q_proj.weight": None}, f"{LAYER}.k_proj.weight"),
    "values of another size": ("open_clip", {f"{LAYER}.v_proj.weight": (13, 12)}, "[13, 12]"),
    "a projection that is none": ("open_clip", {"text_projection.weight": (12,)}, "a matrix"),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_a_wrong_component_is_refused(case: str, tmp_path: Path) -> None:
    kind, changes, says = BROKEN[case]
    tensors = vae() if kind == "vae" else text_encoder()
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    with pytest.raises(TeacherError) as caught:
        to_original(kind, tensors, "x.", tmp_path)
    assert says in str(caught.value)
    assert "part.safetensors" in (caught.value.where or "")


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("open_clip", "transformer.resblocks.0.attn.in_proj_weight", (35, 12)),
        ("open_clip", "transformer.resblocks.x.attn.in_proj_weight", (36, 12)),
        ("open_clip", "text_projection", (3,)),
        ("open_clip", "transformer.resblocks.0.foo.weight", (3,)),
        ("vae", "decoder.up.0.block.0.conv1.gamma", (3,)),
        ("clip", "transformer.foo", (3,)),
    ],
)
def test_a_wrong_part_is_refused(kind: PartKind, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="."):
        to_diffusers(kind, {name: torch.zeros(shape)}, "", tmp_path)


def test_dtypes_travel(tmp_path: Path) -> None:
    ours = {name: tensor.half() for name, tensor in text_encoder(projection=True).items()}
    original = to_original("open_clip", ours, "x.", tmp_path)
    assert {tensor.dtype for tensor in original.values()} == {torch.float16}
    assert_equal(to_diffusers("open_clip", original, "x.", tmp_path), ours)
    assert np.prod(original["x.text_projection"].shape) == 96
