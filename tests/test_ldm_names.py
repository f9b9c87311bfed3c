"""The original names of U-Nets: goldens, laws, and diffusers' own conversion as the judge."""

from __future__ import annotations

from typing import Any

import pytest
from configs import CONFIGS, FULL_SIZE, stages
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from unet_surgery.errors import UsageError
from unet_surgery.graph import UNetGraph, build, parse_config
from unet_surgery.lower import make_plan, shapes_of
from unet_surgery.lower.original import NUMBERINGS, unet_names
from unet_surgery.recipe import load_recipe, select

TEACHERS = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl", "sd1-inpaint": "sd1", "sd2-depth": "sd2"}


def graph_of(config: dict[str, Any]) -> UNetGraph:
    return build(parse_config(config))


def student(recipe: str, teacher: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a built-in recipe's student."""
    config = parse_config(teacher)
    chosen = load_recipe(recipe)
    plan = make_plan(config, select(chosen, build(config)), recipe=chosen.to_data(), teacher_id="local")
    return dict(plan.student_config)


@pytest.mark.parametrize("name", [*sorted(FULL_SIZE), "sd1-inpaint", "sd2-depth"])
def test_of_a_teacher_both_numberings_are_the_original(name: str) -> None:
    graph = graph_of({**CONFIGS, **FULL_SIZE}[name])
    assert unet_names(graph, "dense") == unet_names(graph, "gapped")


GOLDEN = {
    "sd1": {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.0.resnets.0.conv1.weight": "input_blocks.1.0.in_layers.2.weight",
        "down_blocks.0.attentions.1.proj_in.weight": "input_blocks.2.1.proj_in.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.3.resnets.1.time_emb_proj.bias": "input_blocks.11.0.emb_layers.1.bias",
        "mid_block.resnets.1.conv2.weight": "middle_block.2.out_layers.3.weight",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
            "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
        "conv_norm_out.bias": "out.0.bias",
        "conv_out.weight": "out.2.weight",
    },
    "sdxl": {
        "add_embedding.linear_1.weight": "label_emb.0.0.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.2.conv.weight",
        "up_blocks.2.resnets.2.conv1.weight": "output_blocks.8.0.in_layers.2.weight",
    },
    "upscale": {"class_embedding.weight": "label_emb.weight"},
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_the_names_are_these(name: str) -> None:
    names = unet_names(graph_of(CONFIGS[name]), "dense")
    assert {tensor: names[tensor] for tensor in GOLDEN[name]} == GOLDEN[name]


def test_a_pruned_u_net_counts_what_is_there_or_leaves_gaps() -> None:
    graph = graph_of(student("bk_tiny", CONFIGS["sd1"]))
    places = {
        "down_blocks.1.resnets.0.conv1.weight": ("input_blocks.3.0.in_layers.2.weight", "input_blocks.4.0"),
        "down_blocks.1.downsamplers.0.conv.weight": ("input_blocks.4.0.op.weight", "input_blocks.6.0"),
        "up_blocks.0.resnets.1.conv1.weight": ("output_blocks.1.0.in_layers.2.weight", "output_blocks.1.0"),
        "up_blocks.0.upsamplers.0.conv.weight": ("output_blocks.1.2.conv.weight", "output_blocks.2.1.conv"),
        "up_blocks.1.upsamplers.0.conv.weight": ("output_blocks.3.2.conv.weight", "output_blocks.5.2.conv"),
        "up_blocks.2.resnets.1.conv1.weight": ("output_blocks.5.0.in_layers.2.weight", "output_blocks.7.0"),
    }
    dense, gapped = (unet_names(graph, numbering) for numbering in NUMBERINGS)
    for name, (in_dense, in_gapped) in places.items():
        assert dense[name] == in_dense
        assert gapped[name].startswith(in_gapped)


SCALAR = [
    (recipe, name)
    for recipe, names in {
        "bk_base": ("sd1", "sd2", "sd1-inpaint"),
        "bk_small": ("sd1", "sd2", "sd2-depth"),
        "bk_tiny": ("sd1", "sd2"),
        "sdxs_512": ("sd1",),
        "koala_700m": ("sdxl",),
        "ssd_1b": ("sdxl",),
    }.items()
    for name in names
]


@pytest.mark.parametrize("config", FULL_SIZE.values(), ids=FULL_SIZE)
def test_diffusers_reads_a_teachers_names_back(config: dict[str, Any]) -> None:
    _read_back(config)


@pytest.mark.parametrize(("recipe", "name"), SCALAR, ids=[f"{r}-{n}" for r, n in SCALAR])
def test_diffusers_reads_a_students_dense_names_back(recipe: str, name: str) -> None:
    _read_back(student(recipe, {**CONFIGS, **FULL_SIZE}[name]))


def _read_back(config: dict[str, Any]) -> None:
    """diffusers only moves tensors about, so the names themselves can stand for them."""
    names = unet_names(graph_of(config), "dense")
    checkpoint = {f"model.diffusion_model.{ldm}": name for name, ldm in names.items()}
    assert convert_ldm_unet_checkpoint(checkpoint, config) == {name: name for name in names}


@pytest.mark.parametrize("numbering", NUMBERINGS)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_tensor_has_a_name_of_its_own(name: str, numbering: Any) -> None:
    graph = graph_of(CONFIGS[name])
    try:
        names = unet_names(graph, numbering)
    except UsageError:
        assert name in {"embeddings", "timestep-class", "simple-class", "odd-heads", "three-layers", "mixed-layers"}
        return
    assert names.keys() == shapes_of(graph).keys()
    assert len(set(names.values())) == len(names)


BASE = CONFIGS["sd1"]
UNSAYABLE = {
    "time_cond_proj_dim": {"time_cond_proj_dim": 5},
    "class_embed_type": {"class_embed_type": "timestep"},
    "num_class_embeds": {**CONFIGS["sdxl"], "num_class_embeds": 4},
    "class_embeddings_concat": {"num_class_embeds": 4, "class_embeddings_concat": True},
    "resnet_time_scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "time_embedding_dim": {"time_embedding_dim": 24},
    "conv_in_kernel": {"conv_in_kernel": 5},
    "cross_attention_dim": {"cross_attention_dim": [12, 8, 8, 8]},
    "attention_head_dim": {"attention_head_dim": 3},
}


@pytest.mark.parametrize("key", sorted(UNSAYABLE))
def test_what_the_layout_cannot_say_is_refused_by_name(key: str) -> None:
    with pytest.raises(UsageError, match=key):
        unet_names(graph_of({**BASE, **UNSAYABLE[key]}), "dense")


def test_gaps_have_room_for_two_layers() -> None:
    with pytest.raises(UsageError, match="no room") as caught:
        unet_names(graph_of(CONFIGS["mixed-layers"]), "gapped")
    assert caught.value.where == "down.2"


def test_a_stage_without_attention_has_its_upsampler_in_the_first_place() -> None:
    config = {**BASE, "block_out_channels": [8, 16, 16], **stages(True, False, True), "layers_per_block": 1}
    graph = graph_of(config)
    assert unet_names(graph, "dense")["up_blocks.1.upsamplers.0.conv.bias"] == "output_blocks.3.1.conv.bias"
    assert unet_names(graph, "gapped")["up_blocks.1.upsamplers.0.conv.bias"] == "output_blocks.5.1.conv.bias"
