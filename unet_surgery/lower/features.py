"""Feature maps: which activations of teacher and student a distillation compares.

Two sets. ``plan``: the output of every stage, and of the mid, that both networks have at the same width and resolution;
where the student lost a stage's downsampler, its output is compared with the *input* of the teacher's. ``bk``: as
BK-SDM's trainer pairs them (arXiv 2305.15798 and the released code): stage outputs, never the mid, and for a lost
downsampler the branch before the residual add, ``attentions.N.proj_out``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unet_surgery.graph.nodes import Stage, UNetGraph

__all__ = ["FeatureMap", "FeaturePair", "Tap", "feature_map", "tap_name"]


@dataclass(frozen=True, slots=True)
class Tap:
    """An activation, named by a module path and a side of it; of a stage's tuple output, the hidden states.

    ``layout``: ``image`` is [batch, channels, height, width]; ``tokens`` is [batch, height · width, channels], what a
    linear ``proj_out`` (SD 2, SDXL) gives.
    """

    module: str
    at: Literal["input", "output"] = "output"
    layout: Literal["image", "tokens"] = "image"


def tap_name(tap: Tap) -> str:
    """Return ``tap`` as errors and logs call it."""
    return tap.module if tap.at == "output" else f"input of {tap.module}"


@dataclass(frozen=True, slots=True)
class FeaturePair:
    """Two activations of one shape: ``channels`` wide, at the latent size divided by ``stride``, in their layout."""

    student: Tap
    teacher: Tap
    channels: int
    stride: int


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """The pairs of one teacher and student."""

    plan: tuple[FeaturePair, ...]
    bk: tuple[FeaturePair, ...]


def feature_map(teacher: UNetGraph, student: UNetGraph) -> FeatureMap:
    """Return the taps that can be compared; a stage whose resolution changed is in neither set."""
    plan: list[FeaturePair] = []
    bk: list[FeaturePair] = []
    for level, stage in enumerate(student.down):
        if stage.index != level:
            continue  # a finer level is gone, so this one runs at another resolution
        whole = teacher.down[stage.index]
        here, there = Tap(f"down_blocks.{level}"), Tap(whole.source)
        if stage.sampler is not None or whole.sampler is None:
            stride = 2 ** (level + (stage.sampler is not None))
            plan.append(FeaturePair(here, there, stage.channels, stride))
            bk.append(plan[-1])
            continue
        stride = 2**level
        plan.append(FeaturePair(here, Tap(whole.sampler.source, "input"), stage.channels, stride))
        branches = _branches_before_residual(stage, whole, f"down_blocks.{level}", teacher.stem.linear_projection)
        if branches is not None:
            bk.append(FeaturePair(*branches, stage.channels, stride))
    if student.mid is not None and teacher.mid is not None and student.num_levels == teacher.num_levels:
        mid = Tap("mid_block")
        plan.append(FeaturePair(mid, mid, student.mid.channels, 2 ** (student.num_levels - 1)))
    for i, stage in enumerate(student.up):
        level = student.num_levels - 1 - i
        if teacher.num_levels - 1 - stage.index != level:
            continue
        stride = 2 ** (level - (stage.sampler is not None))
        plan.append(FeaturePair(Tap(f"up_blocks.{i}"), Tap(stage.source), stage.channels, stride))
        bk.append(plan[-1])
    return FeatureMap(tuple(plan), tuple(bk))


def _branches_before_residual(stage: Stage, whole: Stage, path: str, linear_projection: bool) -> tuple[Tap, Tap] | None:
    """Return the last attention's ``proj_out`` on both sides, or the last resnet's output without attention."""
    if not stage.layers or not whole.layers:
        return None
    number = len(stage.layers) - 1
    ours, theirs = stage.layers[-1], whole.layers[-1]
    if ours.attention is not None and theirs.attention is not None and not ours.attention.bypass:
        layout: Literal["image", "tokens"] = "tokens" if linear_projection else "image"
        return (
            Tap(f"{path}.attentions.{number}.proj_out", "output", layout),
            Tap(f"{theirs.attention.source}.proj_out", "output", layout),
        )
    kind = "resnets" if ours.attention is None else "attentions"
    last = theirs.resnet.source if theirs.attention is None else theirs.attention.source
    return Tap(f"{path}.{kind}.{number}"), Tap(last)
