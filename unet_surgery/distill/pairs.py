"""Which activations of student and teacher are compared: a run's feature pairs, chosen and checked before it begins.

``bk`` and ``plan`` are in the student's plan. ``attn1`` derives from the plan's weight map. ``similarity`` is found on
calibration batches: :mod:`unet_surgery.distill.similarity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unet_surgery.errors import RunError, VerificationError
from unet_surgery.lower.features import FeaturePair, Tap
from unet_surgery.lower.plan import SurgeryPlan
from unet_surgery.runtime.taps import Tapped, tap_name

__all__ = ["PairKind", "check_pairs", "choose_pairs", "stride_of", "tapped"]

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


def tapped(student: nn.Module, teacher: nn.Module, pairs: Sequence[FeaturePair]) -> tuple[Tapped, Tapped]:
    """Return both networks with the taps of ``pairs``.

    Raises:
        VerificationError: a tap names no module of its network.
    """
    ours = _tapped("student", student, [pair.student for pair in pairs])
    try:
        return ours, _tapped("teacher", teacher, [pair.teacher for pair in pairs])
    except VerificationError:
        ours.release()
        raise


def check_pairs(student: Tapped, teacher: Tapped, pairs: Sequence[FeaturePair], inputs: Sequence[Any]) -> None:
    """Run both networks once on the meta device, where nothing is computed, and compare the shapes of every pair.

    ``inputs`` are the forward's arguments: latents [B, C, H, W], timesteps [B], embeddings [B, T, D], and what SDXL
    adds.

    Raises:
        VerificationError: an activation does not have its pair's shape, or a tapped module does not run.
    """
    height, width = inputs[0].shape[-2:]
    ours, theirs = _shapes(student, inputs), _shapes(teacher, inputs)
    for pair, here, there in zip(pairs, ours, theirs, strict=True):
        expected = _expected(pair, len(inputs[0]), height, width)
        for tap, side, found in ((pair.student, "student", here), (pair.teacher, "teacher", there)):
            if found != expected:
                raise VerificationError(
                    "an activation does not have the shape that its pair needs",
                    where=f"{side}: {tap_name(tap)}",
                    expected=f"{list(expected)}, as {_other(pair, side)}",
                    found=str(list(found)),
                )


def stride_of(module: str, num_levels: int) -> int:
    """Return the latent size divided by the resolution that a resnet or attention of a stage, or the mid, runs at."""
    stage, _, rest = module.partition(".")
    if stage == "mid_block":
        return int(2 ** (num_levels - 1))
    index = int(rest.partition(".")[0])
    return int(2 ** (index if stage == "down_blocks" else num_levels - 1 - index))


def _tapped(name: str, unet: nn.Module, taps: Sequence[Tap]) -> Tapped:
    try:
        return Tapped(unet, taps)
    except VerificationError as error:
        error.what = f"{error.what}: the {name}'s"
        raise


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


def _shapes(network: Tapped, inputs: Sequence[Any]) -> list[tuple[int, ...]]:
    held = network.state_dict(keep_vars=True)
    state = {name: torch.empty_like(t, device="meta", dtype=torch.float32) for name, t in held.items()}
    with torch.no_grad():
        _, activations = torch.func.functional_call(network, state, tuple(_on_meta(value) for value in inputs))
    return [tuple(activation.shape) for activation in activations]


def _on_meta(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _on_meta(inner) for key, inner in value.items()}
    return value.to("meta") if isinstance(value, Tensor) else value


def _expected(pair: FeaturePair, batch: int, height: int, width: int) -> tuple[int, ...]:
    high, wide = (-(-size // pair.stride) for size in (height, width))  # a downsampler rounds up
    if pair.student.layout == "tokens":
        return batch, high * wide, pair.channels
    return batch, pair.channels, high, wide


def _other(pair: FeaturePair, side: str) -> str:
    return f"the teacher's {tap_name(pair.teacher)}" if side == "student" else f"the student's {tap_name(pair.student)}"
