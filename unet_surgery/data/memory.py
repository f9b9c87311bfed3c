"""A small training set encoded once, and kept in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from unet_surgery.data.batches import TrainingSet
from unet_surgery.data.encode import encode_moments, in_half
from unet_surgery.errors import DataError

__all__ = ["MomentsInMemory", "encode_all"]


@dataclass(eq=False)
class MomentsInMemory:
    """Moments, float16 [N, 2C, h, w], and token ids, int64 [N, T], in this machine's memory."""

    moments: torch.Tensor
    ids: torch.Tensor
    empty: torch.Tensor
    fingerprint: str
    latents: Literal["moments", "pixels"] = "moments"

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self.moments[chosen], self.ids[chosen]

    def empty_ids(self) -> torch.Tensor:
        return self.empty


def encode_all(pictures: TrainingSet, vae: Any, *, batch: int = 256) -> MomentsInMemory:
    """Encode every sample of ``pictures``, which gives pixels, by ``vae``, which stays on its device.

    Raises:
        DataError: a latent is not finite in half precision; names the first sample.
    """
    if pictures.latents != "pixels":
        raise DataError("this set is encoded already", expected="pixels", found=pictures.latents)
    moments, ids = [], []
    for start in range(0, len(pictures), batch):
        pixels_B3HW, ids_BT = pictures.batch(range(start, min(start + batch, len(pictures))))
        halves, is_finite = in_half(encode_moments(vae, pixels_B3HW))
        if not is_finite.all():
            first = start + int((~is_finite).nonzero()[0])
            raise DataError("a latent is not finite in half precision", found=f"sample {first}")
        moments.append(halves.cpu())
        ids.append(ids_BT)
    digest = hashlib.sha256(pictures.fingerprint.encode())
    for name, weight in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return MomentsInMemory(torch.cat(moments), torch.cat(ids), pictures.empty_ids(), digest.hexdigest())
