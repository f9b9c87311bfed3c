"""Why a sample is left out: one word each, so that a set's faults can be counted."""

from __future__ import annotations

from typing import Literal, get_args

from unet_surgery.errors import DataError

__all__ = ["REASONS", "BadSampleError", "Reason"]

Reason = Literal[
    "missing",  # no picture
    "outside",  # its path leaves the folder, also through links
    "empty",
    "truncated",
    "unreadable",
    "html",
    "lfs-pointer",
    "bomb",
    "too-small",
    "extreme-aspect",
    "caption-missing",
    "caption-empty",
    "caption-huge",
    "caption-bad-text",
    "metadata-broken",  # the line or row that should name picture and caption
    "latent-overflow",  # its latent is not finite in half precision
]

REASONS: tuple[Reason, ...] = get_args(Reason)


class BadSampleError(DataError):
    """One sample cannot be used, for a ``reason``; the rest of its set is not touched by that."""

    def __init__(self, reason: Reason, found: str | None = None) -> None:
        super().__init__(f"a sample cannot be used: {reason}", found=found)
        self.reason = reason
