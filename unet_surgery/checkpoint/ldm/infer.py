"""The config of a U-Net in the original layout, from its tensors' names and shapes alone.

The names give the stages and layers, the shapes the widths; :func:`~unet_surgery.lower.lower_config` writes them down
as it does a student's. What a forward needs beyond that is not in the weights: it is assumed, as the published models
have it, and said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from unet_surgery.checkpoint.ldm.walk import Part, WalkedStage, WalkedUNet, walk
from unet_surgery.checkpoint.match import check_shapes
from unet_surgery.errors import SurgeryError, UsageError, WeightsMismatchError
from unet_surgery.graph import UNetGraph, build, parse_config
from unet_surgery.graph.config import CROSS_MID, RESNET_MID
from unet_surgery.lower import lower_config, shapes_of
from unet_surgery.lower.original import Numbering, names_at, unet_names

__all__ = ["Inferred", "infer_config"]

WHERE = "the U-Net"
NORM_GROUPS = 32
NUM_HEADS = 8
HEAD_WIDTH = 64
LATENT_SIZE, XL_LATENT_SIZE = 64, 128
TIME_ID_WIDTH = 256
CONTEXT_WIDTHS = {"conv": 768, "linear": 1024}
UNCLIP_CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Inferred:
    """What a file's U-Net is: its config.json, how its blocks are numbered, and what the weights do not say.

    ``names`` maps diffusers' name of every tensor to the file's (without a prefix).
    """

    config: dict[str, Any]
    numbering: Numbering
    assumed: tuple[str, ...]
    names: Mapping[str, str]


def infer_config(shapes: Mapping[str, tuple[int, ...]], *, where: str = WHERE) -> Inferred:
    """Return the config of the U-Net whose tensors, by their original names without a prefix, have these ``shapes``.

    The config describes exactly these tensors. ``where`` is what errors call them.

    Raises:
        WeightsMismatchError: a tensor is missing, unknown or misshaped, or no config of stock diffusers says the rest.
    """
    try:
        walked = walk(shapes)
        _check_sides(walked)
        raw = _raw_config(walked)
        graph = _build(raw)
        names = names_at(graph, _places(walked))
        _check_tensors(graph, names, shapes)
        config = _canonical(raw, graph)
    except WeightsMismatchError as error:
        error.where = f"{where}, {error.where}" if error.where else where
        raise
    return Inferred(config, _numbering(graph, names), tuple(_assumed(config, walked)), names)


def _check_sides(walked: WalkedUNet) -> None:
    if len(walked.down) != len(walked.up):
        raise WeightsMismatchError(
            "the two sides of the U-Net do not have the same number of stages",
            expected=f"{len(walked.down)} stages of output_blocks, as input_blocks has",
            found=f"{len(walked.up)}",
            hint="download the checkpoint again: tensors are missing",
        )
    for level, (down, up) in enumerate(zip(walked.down, reversed(walked.up), strict=True)):
        if len(up.layers) != len(down.layers) + 1:
            first = up.layers[0].resnet.path if up.layers else "output_blocks"
            raise WeightsMismatchError(
                "a stage of output_blocks has the wrong number of layers",
                where=first,
                expected=f"{len(down.layers) + 1}, one more than stage {level} of input_blocks",
                found=f"{len(up.layers)}",
                hint="download the checkpoint again: tensors are missing",
            )


def _raw_config(walked: WalkedUNet) -> dict[str, Any]:
    """Return a config with a list wherever there can be one, and none of the canonical form's economy."""
    widths = [up.layers[0].resnet.size("out_layers.3.weight", 0) for up in reversed(walked.up)]
    linear = any(len(part.shapes.get("proj_in.weight", ())) == 2 for part in walked.attentions)
    context = _context_width(walked) or CONTEXT_WIDTHS["linear" if linear else "conv"]
    only_cross = [
        any(_is_only_cross(part, context) for part in (*down.attentions, *up.attentions))
        for down, up in zip(walked.down, reversed(walked.up), strict=True)
    ]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": context,
        "down_block_types": ["CrossAttnDownBlock2D" if stage.attentions else "DownBlock2D" for stage in walked.down],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": walked.stem.size("input_blocks.0.0.weight", 1),
        "layers_per_block": [len(stage.layers) for stage in walked.down],
        "mid_block_scale_factor": 1,
        "mid_block_type": _mid_type(walked.mid),
        "norm_eps": 1e-05,
        "norm_num_groups": gcd(NORM_GROUPS, *widths),
        "out_channels": walked.stem.size("out.2.weight", 0),
        "sample_size": LATENT_SIZE,
        "up_block_types": ["CrossAttnUpBlock2D" if stage.attentions else "UpBlock2D" for stage in walked.up],
        **_depths(walked),
    }
    if linear:
        config["use_linear_projection"] = True
    if any(only_cross):
        config["only_cross_attention"] = only_cross
    config |= _embeddings(walked.stem, context)
    config["attention_head_dim"] = _heads(widths, per_level=linear and "num_class_embeds" not in config)
    return config


def _context_width(walked: WalkedUNet) -> int | None:
    """Return how wide the text is that attentions look at; None where none of them has a transformer block."""
    for part in walked.attentions:
        for name in part.shapes:
            if name.startswith("transformer_blocks.") and name.endswith(".attn2.to_k.weight"):
                return part.size(name, 1)
    return None


def _is_only_cross(part: Part, context: int) -> bool:
    """True where the first of a block's two attentions looks at the text as well."""
    name = next((n for n in part.shapes if n.endswith(".attn1.to_k.weight")), None)
    return name is not None and part.size(name, 1) == context != part.size("proj_in.weight", 0)


def _mid_type(parts: Sequence[Part]) -> str | None:
    if not parts:
        return None
    return RESNET_MID if [part.kind for part in parts] == ["resnet"] else CROSS_MID


def _depths(walked: WalkedUNet) -> dict[str, Any]:
    """Return both depth keys in their longest form: a list a stage, with a depth a layer."""

    def entries(stages: Sequence[WalkedStage]) -> list[Any]:
        return [
            [0 if layer.attention is None else layer.attention.depth for layer in stage.layers]
            if stage.attentions
            else 1
            for stage in stages
        ]

    down = entries(walked.down)
    mid = next((part for part in walked.mid if part.kind == "attention"), None)
    if mid is not None and not walked.down[-1].attentions:
        down[-1] = mid.depth
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": entries(walked.up)}


def _embeddings(stem: Part, context: int) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if "label_emb.weight" in stem.shapes:
        keys["num_class_embeds"] = stem.size("label_emb.weight", 0)
    if "label_emb.0.0.weight" in stem.shapes:
        if context == UNCLIP_CONTEXT:
            raise WeightsMismatchError(
                "this U-Net takes a picture's embedding: Stable unCLIP or Stable Video, which are not supported",
                where="label_emb.0.0.weight",
                expected="Stable Diffusion v1, v2 or XL",
            )
        keys |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_ID_WIDTH,
            "projection_class_embeddings_input_dim": stem.size("label_emb.0.0.weight", 1),
            "sample_size": XL_LATENT_SIZE,
        }
    return keys


def _heads(widths: Sequence[int], *, per_level: bool) -> int | list[int]:
    if per_level:
        return [gcd(width, max(1, width // HEAD_WIDTH)) for width in widths]
    return gcd(NUM_HEADS, *widths)


def _build(raw: Mapping[str, Any]) -> UNetGraph:
    try:
        return build(parse_config(raw))
    except SurgeryError as error:
        raise WeightsMismatchError(
            "the tensors are of no U-Net that diffusers can build",
            expected=error.expected,
            found=f"{error.what}: {error.found}",
            hint=error.hint,
        ) from error


def _places(walked: WalkedUNet) -> dict[str, str]:
    """Return where the file has each resnet, attention and sampler: diffusers path → original path."""
    places: dict[str, str] = {}
    for side, stages in (("down", walked.down), ("up", walked.up)):
        for i, stage in enumerate(stages):
            for j, layer in enumerate(stage.layers):
                places[f"{side}_blocks.{i}.resnets.{j}"] = layer.resnet.path
                # an attention that its stage's others have, but this layer lacks, is reported by this name
                own = layer.attention.path if layer.attention else layer.resnet.path.removesuffix("0") + "1"
                places[f"{side}_blocks.{i}.attentions.{j}"] = own
            if stage.sampler is not None:
                places[f"{side}_blocks.{i}.{side}samplers.0"] = stage.sampler.path
    places |= {f"mid_block.resnets.{j}": f"middle_block.{2 * j}" for j in range(2)}
    return places | {"mid_block.attentions.0": "middle_block.1"}


def _check_tensors(graph: UNetGraph, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {names[name]: shape for name, shape in shapes_of(graph).items()}
    hint = "download the checkpoint again, or convert it again"
    check_shapes(expected, shapes, where="", source="their own structure", hint=hint, recognise=False)


def _canonical(raw: Mapping[str, Any], graph: UNetGraph) -> dict[str, Any]:
    """Return the config in the form that published ones have: scalars where the levels agree, no key at its default."""
    template = {key: value for key, value in raw.items() if "transformer_layers" not in key and key != "mid_block_type"}
    template["layers_per_block"] = 2
    if len(set(raw.get("only_cross_attention", ()))) == 1:
        template["only_cross_attention"] = True
    try:
        return lower_config(template, graph)
    except SurgeryError as error:
        raise WeightsMismatchError(
            "the tensors are of no U-Net that diffusers can build", expected=error.expected, found=error.found
        ) from error


def _numbering(graph: UNetGraph, names: Mapping[str, str]) -> Numbering:
    try:
        return "dense" if unet_names(graph, "dense") == names else "gapped"
    except UsageError:
        return "dense"  # what cannot be written is read by its own structure, whatever that is called


def _assumed(config: Mapping[str, Any], walked: WalkedUNet) -> Iterator[str]:
    heads, size = config["attention_head_dim"], config["sample_size"]
    if walked.attentions:
        rule = f"the width divided by {HEAD_WIDTH}" if isinstance(heads, list) else "as in Stable Diffusion v1"
        yield f"attention_head_dim is {heads} ({rule})"
    yield "prediction_type is the scheduler's to say: epsilon, unless the model was trained for v_prediction"
    yield f"sample_size is {size} ({8 * size} pixels)"
    yield "upcast_attention is false"
    if "addition_time_embed_dim" in config:
        yield f"addition_time_embed_dim is {TIME_ID_WIDTH} (as in SDXL)"
    if config["norm_num_groups"] != NORM_GROUPS:
        yield f"norm_num_groups is {config['norm_num_groups']}, which divides all widths ({NORM_GROUPS} does not)"
