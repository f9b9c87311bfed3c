"""How torch picks its kernels while a run goes; afterwards it picks as before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from unet_surgery.distill.config import Speed

__all__ = ["kernels"]


@contextlib.contextmanager
def kernels(speed: Speed) -> Iterator[None]:
    """Let cuDNN look for its fastest kernels, or torch take only those that give the same bits every time.

    What is fastest is found by timing, anew in each process: a resumed run may get other kernels, and other rounding.
    """
    before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.benchmark = speed.autotune and not speed.deterministic
    if speed.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
        torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.use_deterministic_algorithms(before[1])
