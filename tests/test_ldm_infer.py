"""A config out of names and shapes: what is written in the original layout is read back as the same U-Net."""

from __future__ import annotations

from typing import Any

import pytest
from configs import CONFIGS, FULL_SIZE, stages
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_laws import examples, expressible, removals
from test_ldm_names import student

from unet_surgery.checkpoint.ldm.infer import Inferred, infer_config
from unet_surgery.errors import UsageError, WeightsMismatchError
from unet_surgery.graph import UNetGraph, build, parse_config
from unet_surgery.lower import shapes_of
from unet_surgery.lower.original import NUMBERINGS, Numbering, unet_names
from unet_surgery.recipe import builtin_names, load_recipe

Shapes = dict[str, tuple[int, ...]]
NOT_IN_WEIGHTS = ("attention_head_dim", "norm_num_groups", "sample_size")


def graph_of(config: dict[str, Any]) -> UNetGraph:
    return build(parse_config(config))


def ldm_shapes(config: dict[str, Any], numbering: Numbering = "dense") -> Shapes:
    graph = graph_of(config)
    names = unet_names(graph, numbering)
    return {names[name]: shape for name, shape in shapes_of(graph).items()}


def same_u_net(inferred: Inferred, config: dict[str, Any]) -> bool:
    """Compare as graphs, with the original's values for what no tensor shows."""
    given = {key: config[key] for key in NOT_IN_WEIGHTS}
    ours, theirs = graph_of({**inferred.config, **given}), graph_of(config)
    return ours == theirs


def published(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "_diffusers_version"}


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_published_model_has_its_published_config(name: str) -> None:
    inferred = infer_config(ldm_shapes(FULL_SIZE[name]))
    assert inferred.config == published(FULL_SIZE[name])
    assert inferred.numbering == "dense"
    assert inferred.names == unet_names(graph_of(FULL_SIZE[name]), "dense")


@pytest.mark.parametrize(("name", "channels"), [("sd1", 9), ("sd2", 5), ("sd2", 9), ("sd1", 8)])
def test_inpainting_depth_and_edits_have_more_input_channels(name: str, channels: int) -> None:
    config = {**FULL_SIZE[name], "in_channels": channels}
    assert infer_config(ldm_shapes(config)).config == published(config)


BUILTIN = [
    (recipe, family, numbering)
    for recipe in builtin_names()
    for family in load_recipe(recipe).families or ()
    for numbering in NUMBERINGS
]


@pytest.mark.parametrize(("recipe", "family", "numbering"), BUILTIN, ids=["-".join(case) for case in BUILTIN])
def test_a_students_config_is_read_back(recipe: str, family: str, numbering: Numbering) -> None:
    config = student(recipe, FULL_SIZE[family])
    inferred = infer_config(ldm_shapes(config, numbering))
    assert graph_of(inferred.config) == graph_of(config)
    assert inferred.config == published(config)  # the same form, too
    assert inferred.names == unet_names(graph_of(config), numbering)
    assert inferred.numbering == ("dense" if recipe == "ssd_1b" else numbering)  # full stages leave no gaps


def test_there_are_students_of_every_family() -> None:
    assert len(BUILTIN) == 2 * (3 * 2 + 4 * 1 + 2)


SAYABLE = sorted(
    set(CONFIGS) - {"embeddings", "timestep-class", "simple-class", "odd-heads"}  # refused by unet_names
)


@pytest.mark.parametrize("name", SAYABLE)
def test_small_configs_of_every_shape_are_read_back(name: str) -> None:
    inferred = infer_config(ldm_shapes(CONFIGS[name]))
    assert same_u_net(inferred, CONFIGS[name])


@given(removals(), st.sampled_from(NUMBERINGS), st.booleans())
@settings(max_examples=examples(100))
def test_any_student_is_read_back(case: tuple[str, tuple[str, ...]], numbering: Numbering, allow: bool) -> None:
    plan = expressible(*case, allow)
    assume(plan is not None)
    assert plan is not None
    config = dict(plan.student_config)
    try:
        shapes = ldm_shapes(config, numbering)
    except UsageError:
        return
    inferred = infer_config(shapes)
    graph = graph_of(config)
    attentions = [layer.attention for stage in graph.stages for layer in stage.layers if layer.attention]
    attentions += [graph.mid.attention] if graph.mid and graph.mid.attention else []
    assume(any(attention.depth for attention in attentions))  # else no tensor tells how wide the text is
    assert same_u_net(inferred, config)
    assert inferred.names == unet_names(graph, numbering)


def test_an_upsampler_that_stands_alone_may_have_either_place() -> None:
    """Conversion scripts number it 1 or 2, for SDXL other than for the rest."""
    config = student("bk_tiny", FULL_SIZE["sd1"])
    shapes = ldm_shapes(config, "gapped")
    moved = {name.replace("output_blocks.2.1.conv.", "output_blocks.2.2.conv."): s for name, s in shapes.items()}
    assert moved != shapes
    inferred = infer_config(moved)
    assert inferred.config == infer_config(shapes).config
    assert inferred.numbering == "gapped"
    assert inferred.names["up_blocks.0.upsamplers.0.conv.weight"] == "output_blocks.2.2.conv.weight"


def test_what_the_weights_do_not_say_is_said() -> None:
    text = "\n".join(infer_config(ldm_shapes(FULL_SIZE["sdxl"])).assumed)
    for part in ("attention_head_dim is [5, 10, 20] (the width divided by 64)", "prediction_type", "1024 pixels",
                 "upcast_attention is false", "addition_time_embed_dim is 256"):  # fmt: skip
        assert part in text
    assert "norm_num_groups" not in text
    small = infer_config(ldm_shapes({**CONFIGS["sd1"], "block_out_channels": [8, 16, 24, 24]}))
    assert any("norm_num_groups is 8" in sentence for sentence in small.assumed)


# --- what must be refused ---------------------------------------------------------------------------------------------

SD1 = ldm_shapes(FULL_SIZE["sd1"])


def without(*starts: str) -> Shapes:
    left = {name: shape for name, shape in SD1.items() if not name.startswith(starts)}
    assert len(left) < len(SD1)
    return left


BROKEN: dict[str, tuple[Shapes, str]] = {
    "nothing": ({}, "output_blocks has the wrong number of layers"),
    "no first convolution": (without("input_blocks.0.0."), "input_blocks.0.0.weight"),
    "no last convolution": (without("out.2."), "out.2.weight"),
    "a tensor missing": (without("middle_block.1.norm.bias"), "1 missing: middle_block.1.norm.bias"),
    "a norm of a resnet missing": (without("input_blocks.4.0.in_layers.0.bias"), "input_blocks.4.0.in_layers.0.bias"),
    "a resnet's width missing": (without("output_blocks.0.0.out_layers.3.weight"), "output_blocks.0.0.out_layers.3"),
    "an attention missing": (without("input_blocks.2.1."), "6 missing: input_blocks.2.1.norm.weight"),
    "a transformer block cut short": (without("input_blocks.2.1.transformer_blocks.0.ff."), "4 missing: input_blocks."),
    "half the mid missing": (without("middle_block.2."), "10 missing: middle_block.2.in_layers"),
    "a layer missing": (without("input_blocks.4."), "output_blocks.6.0"),
    "a downsampler missing": (without("input_blocks.6."), "same number of stages"),
    "an upsampler missing": (without("output_blocks.5.2."), "same number of stages"),
    "the last layer missing": (without("output_blocks.11."), "output_blocks.9.0"),
    "an unknown tensor": ({**SD1, "input_blocks.1.2.c.weight": (3,)}, "1 unexpected: input_blocks.1.2.c.weight"),
    "an unknown stem tensor": ({**SD1, "out.7.weight": (3,)}, "1 unexpected: out.7.weight"),
    "another script's digits": ({**SD1, "input_blocks.٣.0.op.weight": (3,)}, "1 unexpected"),
    "a number with a zero before it": ({**SD1, "input_blocks.03.0.op.weight": (3,)}, "1 unexpected"),
    "a huge number": ({**SD1, f"input_blocks.{'9' * 400}.0.op.weight": (3,)}, "1 unexpected"),
    "a huge transformer block": (
        {**SD1, "input_blocks.1.1.transformer_blocks.999999999.norm1.bias": (320,)},
        "missing: input_blocks.1.1.transformer_blocks.1.norm1.weight",
    ),
    "a shape without axes": ({**SD1, "out.2.weight": ()}, "impossible shape"),
    "a width of nothing": ({**SD1, "output_blocks.0.0.out_layers.3.weight": (0, 0, 3, 3)}, "block_out_channels"),
    "a width beyond bounds": ({**SD1, "output_blocks.0.0.out_layers.3.weight": (1 << 40, 8)}, "block_out_channels"),
    "a tensor of another width": ({**SD1, "time_embed.2.weight": (1280, 1279)}, "[1280, 1279], expected [1280, 1280]"),
    "text of several widths": (
        {**SD1, "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 1024)},
        "[1280, 1024], expected [1280, 768]",
    ),
    "a picture's embedding": (
        {**ldm_shapes(FULL_SIZE["sd2"]), "label_emb.0.0.weight": (1280, 1536)},
        "Stable unCLIP",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_a_damaged_u_net_is_refused_by_name(case: str) -> None:
    shapes, says = BROKEN[case]
    with pytest.raises(WeightsMismatchError) as caught:
        infer_config(shapes, where="x.safetensors")
    assert says in str(caught.value)
    assert (caught.value.where or "").startswith("x.safetensors")
    assert len(str(caught.value)) < 1500


def test_a_u_net_that_no_config_says_is_refused() -> None:
    """The mid's depth is that of the last stage's first layer: a config has one value for both."""
    config = {**CONFIGS["sd2"], **stages(True, True, True, True), "transformer_layers_per_block": [1, 1, 1, 2]}
    shapes = ldm_shapes(config)
    left = {
        name: shape for name, shape in shapes.items() if not name.startswith("middle_block.1.transformer_blocks.1.")
    }
    with pytest.raises(WeightsMismatchError, match="missing: middle_block.1.transformer_blocks.1"):
        infer_config(left)
