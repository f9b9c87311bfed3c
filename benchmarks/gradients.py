"""Whole gradients of our trainer's student compared: as it runs, without the compiler, and in fp32."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from our_loop import OurLoop
from torch import Tensor, nn

from unet_surgery.distill.compute import Inputs, compare

CHUNK = 8  # of the fp32 forward, which takes most memory


@dataclass(frozen=True, slots=True)
class Agreement:
    """Distances of whole gradients, each divided by the second's norm."""

    run_to_eager: float
    """What trains, compiled or not, from the same networks without the compiler."""
    run_to_fp32: float
    eager_to_fp32: float
    """What the short dtype alone costs."""


def agreement(loop: OurLoop) -> Agreement:
    """Compare gradients on the loop's next micro-batch, at the rounded weights that it computes with."""
    trainer: Any = loop.trainer
    compute = trainer._compute
    inputs = compute.prepare(next(loop.batches))
    networks = _plain(compute.student), _plain(compute.teacher)
    run = _gradient(compute.student, compute.teacher, compute.compare, loop, [inputs], networks[0])
    eager = _gradient(*networks, compare, loop, [inputs], networks[0])
    student, teacher = (nn.Module.to(copy.deepcopy(network), torch.float32) for network in networks)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        exact = _gradient(student, teacher, compare, loop, _chunks(inputs), student)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    return Agreement(*(float((a - b).norm() / b.norm()) for a, b in ((run, eager), (run, exact), (eager, exact))))


def _plain(network: nn.Module) -> nn.Module:
    plain: nn.Module = getattr(network, "_orig_mod", network)
    return plain


def _gradient(
    student: Any, teacher: Any, compares: Any, loop: OurLoop, parts: list[Inputs], owner: nn.Module
) -> Tensor:
    """Return the gradient of the mean over ``parts``, flat, fp32, on the loop's device."""
    trainer: Any = loop.trainer
    scale, power_P = trainer._update.scale, torch.ones_like(trainer._power.sums_P)
    whole = sum(len(part.timesteps_B) for part in parts)
    for part in parts:
        arguments = (part.noisy_BCHW, part.timesteps_B, part.prompt_embeds_BTD)
        with torch.no_grad():
            theirs = teacher(*arguments)
        terms = compares(trainer._stage.objectives, student(*arguments), theirs, part.target_BCHW, None, power_P)
        (terms.total * (scale * (len(part.timesteps_B) / whole))).backward()
    params = list(owner.parameters())
    flat = torch.cat([(p.grad.float() / scale).flatten() for p in params])
    for p in params:
        p.grad = None
    return flat


def _chunks(inputs: Inputs) -> list[Inputs]:
    """Return the inputs in fp32, a few samples at a time."""
    fields = ("noisy_BCHW", "timesteps_B", "prompt_embeds_BTD", "target_BCHW")
    parts = zip(*(getattr(inputs, field).split(CHUNK) for field in fields), strict=True)
    chunks = (replace(inputs, **dict(zip(fields, part, strict=True))) for part in parts)
    return [replace(c, noisy_BCHW=c.noisy_BCHW.float(), prompt_embeds_BTD=c.prompt_embeds_BTD.float()) for c in chunks]
