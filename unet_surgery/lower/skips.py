"""Skip connections: which output of the down side each up layer receives, before and after surgery."""

from __future__ import annotations

from dataclasses import dataclass

from unet_surgery.graph.nodes import Layer, UNetGraph

__all__ = ["ChangedSkip", "changed_skips", "skip_outputs", "skip_sources"]


@dataclass(frozen=True, slots=True)
class ChangedSkip:
    """An up layer (teacher's path) that receives another skip in the student than in the teacher."""

    layer: str
    teacher_skip: str
    student_skip: str


def changed_skips(teacher: UNetGraph, student: UNetGraph) -> tuple[ChangedSkip, ...]:
    """Return the kept up layers whose skip comes from another teacher module than it did."""
    before, after = skip_sources(teacher), skip_sources(student)
    return tuple(
        ChangedSkip(layer, before[layer][0], module)
        for layer, (module, _) in after.items()
        if before[layer][0] != module
    )


def skip_sources(graph: UNetGraph) -> dict[str, tuple[str, str]]:
    """Return up layer → (module that its skip comes from, the resnet or sampler of that place), by teacher path.

    The up side takes the down side's outputs last in, first out. A layer whose attention has gone is still the same
    place, though its output then comes from its resnet.
    """
    stack = skip_outputs(graph)
    return {layer.resnet.source: stack.pop() for stage in graph.up for layer in stage.layers}


def skip_outputs(graph: UNetGraph) -> list[tuple[str, str]]:
    """Return the down side's outputs in their order, each as (module, place) of :func:`skip_sources`."""
    outputs = [("conv_in", "conv_in")]
    for stage in graph.down:
        outputs += [(_last_module(layer), layer.resnet.source) for layer in stage.layers]
        if stage.sampler is not None:
            outputs.append((stage.sampler.source, stage.sampler.source))
    return outputs


def _last_module(layer: Layer) -> str:
    """Return what a layer's output comes from; a bypassed attention adds nothing."""
    attention = layer.attention
    return layer.resnet.source if attention is None or attention.bypass else attention.source
