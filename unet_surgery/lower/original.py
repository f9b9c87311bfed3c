"""The original names of a U-Net's tensors, from its graph.

There the U-Net is three lists: ``input_blocks`` (a layer or a downsampler each, ``conv_in`` first), ``middle_block``
and ``output_blocks`` (a layer each). Two ways of numbering them are in use. *Dense* counts what is there; an upsampler
stands in its stage's last block, behind the layer. *Gapped* gives every stage three numbers, as if it had two layers
(down) or three (up), which the common conversion scripts do; an upsampler always has the third. Of stages of two layers
both are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal

from unet_surgery.errors import UsageError
from unet_surgery.graph.nodes import Attention, Stage, UNetGraph
from unet_surgery.lower.modules import modules

__all__ = ["NUMBERINGS", "Numbering", "layer_names", "names_at", "unet_names"]

Numbering = Literal["dense", "gapped"]
NUMBERINGS: tuple[Numbering, ...] = ("dense", "gapped")
GAPPED_LAYERS = 2
"""The most layers of a down stage that three numbers have room for, beside its downsampler."""

_RESNET_LEAVES: Mapping[str, str] = MappingProxyType(
    {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
)
"""A resnet's parts: diffusers' name → the original one."""

_STEM: Mapping[str, str] = MappingProxyType(
    {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "class_embedding": "label_emb",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
)


def unet_names(graph: UNetGraph, numbering: Numbering) -> dict[str, str]:
    """Return diffusers name → original name, without a prefix, of every tensor of ``graph``; no two are the same.

    Raises:
        UsageError: the original layout has no name for a part of ``graph``, or this numbering has no room for a stage.
    """
    _check_sayable(graph)
    return names_at(graph, _module_names(graph, numbering))


def layer_names(graph: UNetGraph) -> dict[str, str]:
    """Return diffusers name → original name of every layer that has a weight, as trainers of adapters write them.

    Empty where the original layout has no name for a part of ``graph``.
    """
    try:
        names = unet_names(graph, "dense")
    except UsageError:
        return {}
    return {name.rpartition(".")[0]: original.rpartition(".")[0] for name, original in names.items()}


def names_at(graph: UNetGraph, places: Mapping[str, str]) -> dict[str, str]:
    """Return diffusers name → original name, where ``places`` maps each resnet, attention and sampler to its place."""
    names: dict[str, str] = {}
    for placed in modules(graph):
        owner, inner, rest = placed.path.partition("transformer_blocks.")
        place = places.get(owner.rstrip("."))
        for tensor in placed.module.tensors:
            part, leaf = (placed.path + tensor.name).rsplit(".", 1)
            if place is None:
                names[f"{part}.{leaf}"] = f"{_STEM[part]}.{leaf}"
            else:
                names[f"{part}.{leaf}"] = place + _inside(owner, inner + rest + tensor.name)
    return names


def _inside(owner: str, name: str) -> str:
    """Return what stands behind a module's place in the name of its tensor ``name``; attentions keep their names."""
    if ".resnets." in owner:
        part, leaf = name.rsplit(".", 1)
        return f".{_RESNET_LEAVES[part]}.{leaf}"
    if ".downsamplers." in owner:
        return "." + name.replace("conv.", "op.")
    return f".{name}"


def _module_names(graph: UNetGraph, numbering: Numbering) -> dict[str, str]:
    """Return where each resnet, attention and sampler of ``graph`` stands: diffusers path → original path.

    Raises:
        UsageError: a stage has more layers than this numbering has room for.
    """
    if numbering == "gapped":
        _check_room(graph)
    places = dict(_down(graph, gapped=numbering == "gapped"))
    if graph.mid is not None:
        places |= {f"mid_block.resnets.{j}": f"middle_block.{2 * j}" for j in range(len(graph.mid.resnets))}
        if graph.mid.attention is not None:
            places["mid_block.attentions.0"] = "middle_block.1"
    return places | dict(_up(graph, gapped=numbering == "gapped"))


def _down(graph: UNetGraph, *, gapped: bool) -> Iterator[tuple[str, str]]:
    number = 1  # conv_in is number 0
    for i, stage in enumerate(graph.down):
        first = 3 * i + 1 if gapped else number
        yield from _layers(f"down_blocks.{i}", stage, "input_blocks", first)
        number = first + len(stage.layers)
        if stage.sampler is not None:
            yield f"down_blocks.{i}.downsamplers.0", f"input_blocks.{3 * (i + 1) if gapped else number}.0"
            number += 1


def _up(graph: UNetGraph, *, gapped: bool) -> Iterator[tuple[str, str]]:
    number = 0
    for i, stage in enumerate(graph.up):
        first = 3 * i if gapped else number
        yield from _layers(f"up_blocks.{i}", stage, "output_blocks", first)
        number = first + len(stage.layers)
        if stage.sampler is None:
            continue
        block = 3 * i + 2 if gapped else number - 1
        alone = block != number - 1
        # Behind the layer of its block. Alone, it keeps the place it would have had there, but of the first stage
        # 1 is what is written and read, whether that has attention or not.
        place = 1 if alone and i == 0 else 2 if stage.has_attention else 1
        yield f"up_blocks.{i}.upsamplers.0", f"output_blocks.{block}.{place}"


def _layers(path: str, stage: Stage, blocks: str, first: int) -> Iterator[tuple[str, str]]:
    for j, layer in enumerate(stage.layers):
        yield f"{path}.resnets.{j}", f"{blocks}.{first + j}.0"
        if layer.attention is not None:
            yield f"{path}.attentions.{j}", f"{blocks}.{first + j}.1"


def _check_room(graph: UNetGraph) -> None:
    for i, stage in enumerate(graph.down):
        if len(stage.layers) > GAPPED_LAYERS:
            raise UsageError(
                "the gapped numbering has no room for a stage of this U-Net",
                where=f"down.{i}",
                expected=f"at most {GAPPED_LAYERS} layers in a down stage",
                found=f"{len(stage.layers)}",
                hint="use the dense numbering",
            )


def _check_sayable(graph: UNetGraph) -> None:
    """Check that the original layout, which has no config beside its weights, can say what ``graph`` is.

    Raises:
        UsageError: names the first thing that it cannot say.
    """
    for what in _unsayable(graph):
        raise UsageError(
            f"the original layout cannot say what this U-Net has: {what}",
            expected="what Stable Diffusion v1, v2 and XL are made of",
            hint="keep it as a diffusers folder",
        )


def _unsayable(graph: UNetGraph) -> Iterator[str]:
    stem = graph.stem
    attentions = list(_attentions(graph))
    if stem.time_cond_proj_dim is not None:
        yield "a projected condition (time_cond_proj_dim)"
    if stem.class_embedding is not None and stem.class_embedding[0] != "classes":
        yield f"a class embedding of the kind {stem.class_embedding[0]!r} (class_embed_type)"
    if stem.class_embedding is not None and stem.addition_embedding_dim is not None:
        yield "a class embedding beside an addition embedding (num_class_embeds)"
    if stem.resnet_time_channels != stem.time_embed_dim:
        yield "class embeddings appended to the time embedding (class_embeddings_concat)"
    if stem.time_scale_shift:
        yield "a time embedding that scales and shifts (resnet_time_scale_shift)"
    if stem.time_embed_dim != 4 * stem.channels:
        yield "a time embedding that is not four times as wide as the first stage (time_embedding_dim)"
    if (stem.conv_in_kernel, stem.conv_out_kernel) != (3, 3):
        yield "a first or last convolution that is not 3×3 (conv_in_kernel, conv_out_kernel)"
    if len({attention.cross_attention_dim for attention in attentions}) > 1:
        yield "another context width in some stages (a list in cross_attention_dim)"
    if any(attention.channels % attention.num_heads for attention in attentions):
        yield "attention heads that do not divide a stage's width (attention_head_dim)"


def _attentions(graph: UNetGraph) -> Iterator[Attention]:
    for stage in graph.stages:
        yield from (layer.attention for layer in stage.layers if layer.attention is not None)
    if graph.mid is not None and graph.mid.attention is not None:
        yield graph.mid.attention
