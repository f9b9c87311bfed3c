"""Skip connections: which output of the down side each up layer receives, before and after surgery."""

from __future__ import annotations

from dataclasses import dataclass

from unet_surgery.graph.nodes import Layer, UNetGraph

__all__ = ["ChangedSkip", "changed_skips"]


@dataclass(frozen=True, slots=True)
class ChangedSkip:
    """An up layer (teacher's path) that receives another skip in the student than in the teacher."""

    layer: str
    teacher_skip: str
    student_skip: str


def changed_skips(teacher: UNetGraph, student: UNetGraph) -> tuple[ChangedSkip, ...]:
    """Return the kept up layers whose skip comes from another teacher module than it did."""
    before, after = _skips(teacher), _skips(student)
    return tuple(ChangedSkip(layer, before[layer], skip) for layer, skip in after.items() if before[layer] != skip)


def _skips(graph: UNetGraph) -> dict[str, str]:
    """Return up layer → producer of its skip, both by teacher path; the up side takes them last in, first out."""
    stack = ["conv_in"]
    for stage in graph.down:
        stack += [_last_module(layer) for layer in stage.layers]
        if stage.sampler is not None:
            stack.append(stage.sampler.source)
    return {layer.resnet.source: stack.pop() for stage in graph.up for layer in stage.layers}


def _last_module(layer: Layer) -> str:
    """Return what a layer's output comes from; a bypassed attention adds nothing."""
    attention = layer.attention
    return layer.resnet.source if attention is None or attention.bypass else attention.source
