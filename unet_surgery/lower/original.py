"""The original (LDM, sgm) names of a U-Net's modules, as trainers write them that know no diffusers.

There the U-Net is three lists: ``input_blocks`` (``conv_in``, then a layer or a downsampler each), ``middle_block``
and ``output_blocks`` (a layer each, the last of a stage with the upsampler behind it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from unet_surgery.graph.nodes import Stage, UNetGraph

__all__ = ["original_names"]

_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
)
_STEM: Mapping[str, str] = MappingProxyType(
    {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
)
_INSIDE = re.compile(r"(.*?\.(resnets|attentions|downsamplers|upsamplers)\.\d+)\.(.+)")


def original_names(graph: UNetGraph, names: Iterable[str]) -> dict[str, str]:
    """Return diffusers name → original name of those modules ``names`` of ``graph`` that have one."""
    places = dict(_places(graph))
    found = {}
    for name in names:
        match = _INSIDE.fullmatch(name)
        if match is None:
            if name in _STEM:
                found[name] = _STEM[name]
            continue
        owner, kind, part = match.groups()
        if kind == "resnets":
            part = _PARTS[part]
        elif kind == "downsamplers":
            part = "op"
        found[name] = f"{places[owner]}.{part}"
    return found


def _places(graph: UNetGraph) -> Iterator[tuple[str, str]]:
    """Yield where each resnet, attention and sampler stands: diffusers path, original path."""
    number = 1  # conv_in is number 0
    for i, stage in enumerate(graph.down):
        yield from _layers(f"down_blocks.{i}", stage, "input_blocks", number)
        number += len(stage.layers)
        if stage.sampler is not None:
            yield f"down_blocks.{i}.downsamplers.0", f"input_blocks.{number}.0"
            number += 1
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    number = 0
    for i, stage in enumerate(graph.up):
        yield from _layers(f"up_blocks.{i}", stage, "output_blocks", number)
        number += len(stage.layers)
        if stage.sampler is not None:
            yield f"up_blocks.{i}.upsamplers.0", f"output_blocks.{number - 1}.{2 if stage.has_attention else 1}"


def _layers(path: str, stage: Stage, blocks: str, first: int) -> Iterator[tuple[str, str]]:
    for j, layer in enumerate(stage.layers):
        yield f"{path}.resnets.{j}", f"{blocks}.{first + j}.0"
        if layer.attention is not None:
            yield f"{path}.attentions.{j}", f"{blocks}.{first + j}.1"
