"""Which activations of student and teacher are compared: a run's feature pairs, chosen from the student's plan.

``bk`` and ``plan`` are in the plan. ``attn1`` derives from its weight map. ``similarity`` is found on calibration
batches: :mod:`unet_surgery.distill.similarity`. No torch here: a dry run lists them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from unet_surgery.errors import RunError
from unet_surgery.lower.features import FeaturePair, Tap
from unet_surgery.lower.plan import SurgeryPlan

__all__ = ["PairKind", "choose_pairs", "pair_shape", "stride_of"]

PairKind = Literal["bk", "plan", "attn1"]

QUERY = ".attn1.to_q.weight"


def choose_pairs(kind: PairKind, plan: SurgeryPlan) -> tuple[FeaturePair, ...]:
    """Return the feature pairs called ``kind`` in the order the student computes them in.

    Raises:
        RunError: there is none.
    """
    if kind == "attn1":
        pairs = _self_attentions(plan)
    else:
        pairs = plan.features.bk if kind == "bk" else plan.features.plan
    if not pairs:
        raise RunError(
            "this student and teacher have no feature pairs of this kind",
            where=f"pairs: {kind}",
            hint="choose another kind, or leave feature_kd out",
        )
    return pairs


def pair_shape(pair: FeaturePair, latent_size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of a pair's activations, without the batch, for latents of (height, width)."""
    high, wide = (-(-size // pair.stride) for size in latent_size)  # a downsampler rounds up
    return (high * wide, pair.channels) if pair.student.layout == "tokens" else (pair.channels, high, wide)


def stride_of(module: str, num_levels: int) -> int:
    """Return the latent size divided by the resolution that a resnet or attention of a stage, or the mid, runs at."""
    stage, _, rest = module.partition(".")
    if stage == "mid_block":
        return int(2 ** (num_levels - 1))
    index = int(rest.partition(".")[0])
    return int(2 ** (index if stage == "down_blocks" else num_levels - 1 - index))


def _self_attentions(plan: SurgeryPlan) -> tuple[FeaturePair, ...]:
    """Return the self-attention outputs of every kept transformer block: what KOALA distils (arXiv 2312.04005).

    The plan's weights say which block of the teacher a block was; where its resolution changed, it is left out.
    """
    ours, theirs = (len(config["block_out_channels"]) for config in (plan.student_config, plan.teacher_config))
    pairs = []
    for name, source in plan.weights.items():
        if not name.endswith(QUERY) or source is None:
            continue
        here, there = (key.removesuffix(".to_q.weight") for key in (name, source))
        stride = stride_of(here, ours)
        if stride == stride_of(there, theirs):
            channels = _width(plan.student_config, here)
            pairs.append(FeaturePair(Tap(here, "output", "tokens"), Tap(there, "output", "tokens"), channels, stride))
    return tuple(pairs)


def _width(config: Mapping[str, Any], module: str) -> int:
    widths: Sequence[int] = config["block_out_channels"]
    stage, _, rest = module.partition(".")
    if stage == "mid_block":
        return widths[-1]
    index = int(rest.partition(".")[0])
    return widths[index] if stage == "down_blocks" else widths[len(widths) - 1 - index]
