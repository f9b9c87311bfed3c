"""Which programs take a single file: facts about their loaders, as they were read and run.

ComfyUI 0.3.64 counts blocks without gaps, derives stages, layers and depths from the names, and knows families by
their widths; of SDXL it wants one of a list of depths. stable-diffusion.cpp builds fixed networks, the small ones
numbered with gaps. diffusers 0.42 (``from_single_file`` with ``config=``) takes all stages to have as many layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unet_surgery.graph.nodes import Attention, Stage, UNetGraph
from unet_surgery.lower.original import Numbering, unet_names

__all__ = ["Verdict", "verdicts"]

BASE_WIDTH = 320
HEAD_WIDTH = 64
OTHERS = "it knows SD v1, v2 and XL by their widths and heads, and these are others"
V_PREDICTION = "v_prediction"
V_PREDICTION_TENSOR = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""By its values ComfyUI tells which of the two an SD v2 predicts; without it, it is taken for epsilon."""

Depths = tuple[int | None, ...]
"""Of a stage's layers; None where there is no attention."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a program takes a file, and why not, or what to mind."""

    runtime: str
    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Build:
    """What a network consists of, beside what its family has in common."""

    widths: tuple[int, ...]
    down: tuple[Depths, ...]
    up: tuple[Depths, ...]
    mid: tuple[int, int | None]
    """(Number of resnets, depth)."""


_N2, _N3 = (None, None), (None, None, None)
_SD = (320, 640, 1280, 1280)
_SMALL = (320, 640, 1280)

FULL = _Build(_SD, ((1, 1), (1, 1), (1, 1), _N2), (_N3, (1, 1, 1), (1, 1, 1), (1, 1, 1)), (2, 1))
TINY = _Build(_SMALL, ((1,), (1,), (1,)), ((1, 1), (1, 1), (1, 1)), (0, None))
SDXS = _Build(_SMALL, ((None,), (1,), (1,)), ((1, 1), (1, 1), (None, None)), (0, None))
XL = _Build(_SMALL, (_N2, (2, 2), (10, 10)), ((10, 10, 10), (2, 2, 2), _N3), (2, 10))
SSD_1B = _Build(_SMALL, (_N2, (2, 2), (4, 4)), ((4, 4, 10), (2, 1, 1), _N3), (1, None))
VEGA = _Build(_SMALL, (_N2, (1, 1), (2, 2)), ((2, 2, 2), (1, 1, 1), _N3), (1, None))

COMFY_XL_DEPTHS: tuple[Depths, ...] = (
    (None, None, 2, 2, 10, 10),
    (None, None, 2, 2, 4, 4),  # SSD-1B
    (None, None, 1, 1, 2, 2),  # Vega
    (None, 2, 5),  # KOALA-700M
    (None, 2, 6),  # KOALA-1B
)
"""Depths of the layers of input_blocks that ComfyUI knows as SDXL."""


def verdicts(graph: UNetGraph, numbering: Numbering, *, prediction_type: str | None = None) -> tuple[Verdict, ...]:
    """Return what each program makes of a single file of ``graph``; ``prediction_type`` is its scheduler's, if known.

    Raises:
        UsageError: as :func:`unet_names`.
    """
    has_gaps = numbering == "gapped" and unet_names(graph, "gapped") != unet_names(graph, "dense")
    return (
        _comfy(graph, has_gaps=has_gaps, prediction_type=prediction_type),
        _cpp(graph, numbering),
        _diffusers(graph, has_gaps=has_gaps),
    )


def _comfy(graph: UNetGraph, *, has_gaps: bool, prediction_type: str | None) -> Verdict:
    name = "ComfyUI"
    if has_gaps:
        return Verdict(name, False, "it counts blocks without gaps: --numbering dense")
    family = _family(graph)
    if family is None:
        return Verdict(name, False, OTHERS)
    if any(not stage.layers for stage in graph.down):
        return Verdict(name, False, "it takes every stage to have a layer")
    if any(attention.depth == 0 for attention in _attentions(graph)):
        return Verdict(name, False, "it drops an attention without transformer blocks")
    depths = tuple(depth for stage in graph.down for depth in _depths(stage))
    if family == "sdxl" and depths not in COMFY_XL_DEPTHS:
        return Verdict(name, False, f"of SDXL it knows some depths only, not {_shown(depths)}")
    if prediction_type == V_PREDICTION and not (
        family == "sd2" and graph.stem.in_channels == 4 and V_PREDICTION_TENSOR in unet_names(graph, "dense").values()
    ):
        return Verdict(name, True, "but it takes this one, which predicts v, for epsilon, and does not say so")
    return Verdict(name, True)


def _cpp(graph: UNetGraph, numbering: Numbering) -> Verdict:
    name = "stable-diffusion.cpp"
    family, build, inputs = _family(graph), _build(graph), graph.stem.in_channels
    if family is None:
        return Verdict(name, False, OTHERS)
    whole = {"sd1": ((FULL,), (4, 8, 9)), "sd2": ((FULL,), (4, 9)), "sdxl": ((XL, SSD_1B, VEGA), (4,))}
    small = {"sd1": (TINY, SDXS), "sd2": (TINY,)}
    if build in whole[family][0] and inputs in whole[family][1]:
        return Verdict(name, True)
    if build in small.get(family, ()) and inputs == 4:
        if numbering == "gapped":
            return Verdict(name, True)
        return Verdict(name, False, "it reads this network with gaps: --numbering gapped")
    return Verdict(name, False, "of pruned networks it knows BK-SDM Tiny, SDXS-512, SSD-1B and Vega only")


def _diffusers(graph: UNetGraph, *, has_gaps: bool) -> Verdict:
    name = "diffusers, from_single_file(config=…)"
    if has_gaps:
        return Verdict(name, False, "it counts blocks without gaps, and loses tensors: --numbering dense")
    layers = [len(stage.layers) for stage in graph.down]
    if len(set(layers)) > 1:
        return Verdict(name, False, f"it takes every stage to have as many layers, and these have {_shown(layers)}")
    return Verdict(name, True)


def _family(graph: UNetGraph) -> str | None:
    """Return the family whose loader would take the U-Net, pruned or not: by what pruning leaves as it is."""
    attentions = list(_attentions(graph))
    stem = graph.stem
    contexts = {attention.cross_attention_dim for attention in attentions}
    if stem.channels != BASE_WIDTH or any(stage.channels % BASE_WIDTH for stage in graph.down):
        return None
    if stem.class_embedding is not None or any(attention.only_cross_attention for attention in attentions):
        return None
    if not stem.linear_projection:
        is_sd1 = contexts == {768} and stem.addition_embedding_dim is None
        return "sd1" if is_sd1 and all(attention.num_heads == 8 for attention in attentions) else None
    if any(attention.num_heads * HEAD_WIDTH != attention.channels for attention in attentions):
        return None
    families = {(1024, None): "sd2", (2048, 2816): "sdxl"}
    return families.get((next(iter(contexts)), stem.addition_embedding_dim)) if len(contexts) == 1 else None


def _build(graph: UNetGraph) -> _Build:
    mid = graph.mid
    return _Build(
        widths=tuple(stage.channels for stage in graph.down),
        down=tuple(_depths(stage) for stage in graph.down),
        up=tuple(_depths(stage) for stage in graph.up),
        mid=(0, None) if mid is None else (len(mid.resnets), mid.attention.depth if mid.attention else None),
    )


def _depths(stage: Stage) -> Depths:
    return tuple(None if layer.attention is None else layer.attention.depth for layer in stage.layers)


def _attentions(graph: UNetGraph) -> Iterator[Attention]:
    for stage in graph.stages:
        yield from (layer.attention for layer in stage.layers if layer.attention is not None)
    if graph.mid is not None and graph.mid.attention is not None:
        yield graph.mid.attention


def _shown(numbers: Depths | list[int]) -> str:
    return ", ".join("–" if number is None else str(number) for number in numbers)
