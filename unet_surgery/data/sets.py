"""What a training run draws its batches from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["TrainingSet"]


class TrainingSet(Protocol):
    """Samples by index: ``batch`` is a pure function of its indices, and may be called from several threads.

    Shapes: n samples, C latent channels, T tokens.
    """

    @property
    def latents(self) -> Literal["moments", "pixels"]:
        """What the first tensor of a batch holds.

        ``moments``: float16 [n, 2C, h, w], the VAE's posterior mean and then its standard deviation, unscaled: a
        latent is (mean + std · noise) · scaling_factor. ``pixels``: float32 [n, 3, H, W] in −1…1.
        """

    @property
    def fingerprint(self) -> str:
        """Changes when what ``batch`` returns would."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents or pixels, and token ids int64 [n, T]."""

    def empty_ids(self) -> torch.Tensor:
        """Return the token ids of an empty caption, int64 [T], for those that are dropped."""
