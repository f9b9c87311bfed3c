"""How fast this machine multiplies matrices, measured: what a network's speed is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["matmul_flops"]

SMALLEST, LARGEST = 256, 8192
SECONDS = 0.02
REPEATS = 5


def matmul_flops(
    device: torch.device,
    dtype: torch.dtype,
    settle: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> float | None:
    """Return the most FLOP/s of a product of square matrices that was seen; None where there is no such product.

    The matrices grow until a product takes ``SECONDS``, so the answer comes within a second or two on any machine. A
    MAC is two FLOPs. It is a measurement, not a datasheet's peak: on a busy machine it is lower, and a network whose
    convolutions run in a faster mode (TF32, Winograd) may be above it.
    """
    try:
        best, side = 0.0, SMALLEST
        while True:
            a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
            a @ b
            seconds = min(_seconds(a, b, settle, clock) for _ in range(REPEATS))
            best = max(best, 2 * side**3 / seconds)
            if seconds >= SECONDS or side >= LARGEST:
                return best
            side *= 2
    except (RuntimeError, ZeroDivisionError):  # no room, no such kernel, a clock that stands still
        return None


def _seconds(a: torch.Tensor, b: torch.Tensor, settle: Callable[[], None], clock: Callable[[], float]) -> float:
    settle()
    begun = clock()
    a @ b
    settle()
    return clock() - begun
