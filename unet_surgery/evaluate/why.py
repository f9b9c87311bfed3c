"""Why a network could not be run, in words: for the row of a table that goes on without it."""

from __future__ import annotations

import torch

from unet_surgery.errors import SurgeryError, printable

__all__ = ["OUT_OF_MEMORY", "why_not"]

OUT_OF_MEMORY = "out of memory"
OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
"""What torch says of a CPU, of Apple's GPU, and of CUDA's libraries, which have no error of their own for it."""


def why_not(error: Exception) -> str | None:
    """Return what became of a network in a line; None for an error that is no network's, and is to be raised.

    What torch refuses on a device (a dtype, a shape, a compiler that is missing) is a RuntimeError; what a scheduler or
    a network refuses of its arguments while it runs is a ValueError or an IndexError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OUT_OF_MEMORY
    text = str(error)
    if isinstance(error, RuntimeError) and any(word in text for word in OF_MEMORY):
        return OUT_OF_MEMORY
    if isinstance(error, RuntimeError | ValueError | IndexError):
        return printable(text.strip().partition("\n")[0]) or type(error).__name__
    if isinstance(error, SurgeryError):
        return printable(error.what if error.found is None else f"{error.what}: {error.found}")
    return None
