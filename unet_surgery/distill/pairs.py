"""A run's feature pairs in the networks themselves: tapped, and checked before anything is trained.

Which pairs there are is chosen in :mod:`unet_surgery.distill.choice`, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unet_surgery.distill.choice import PairKind, choose_pairs, pair_shape, stride_of
from unet_surgery.errors import VerificationError
from unet_surgery.lower.features import FeaturePair, Tap
from unet_surgery.runtime.taps import Tapped, tap_name

__all__ = ["PairKind", "check_pairs", "choose_pairs", "stride_of", "tapped"]


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
        expected = (len(inputs[0]), *pair_shape(pair, (height, width)))
        for tap, side, found in ((pair.student, "student", here), (pair.teacher, "teacher", there)):
            if found != expected:
                raise VerificationError(
                    "an activation does not have the shape that its pair needs",
                    where=f"{side}: {tap_name(tap)}",
                    expected=f"{list(expected)}, as {_other(pair, side)}",
                    found=str(list(found)),
                )


def _tapped(name: str, unet: nn.Module, taps: Sequence[Tap]) -> Tapped:
    try:
        return Tapped(unet, taps)
    except VerificationError as error:
        error.what = f"{error.what}: the {name}'s"
        raise


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


def _other(pair: FeaturePair, side: str) -> str:
    return f"the teacher's {tap_name(pair.teacher)}" if side == "student" else f"the student's {tap_name(pair.student)}"
