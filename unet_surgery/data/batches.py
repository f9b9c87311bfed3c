"""Batches of a run: which samples, with which noise, prepared ahead in threads.

B batch · C latent channels · H, W latent size · T tokens
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import torch
from torch import Tensor

from unet_surgery.data.keyed import KeyedNoise
from unet_surgery.data.order import Order

__all__ = ["Batch", "Batches", "TrainingSet", "prepared"]


class TrainingSet(Protocol):
    """Samples by index: pictures or their latents, and the token ids of their captions."""

    @property
    def latents(self) -> Literal["moments", "pixels"]:
        """What ``batch`` gives: the VAE's posterior [n, 2C, h, w], means then deviations, unscaled, float16.

        Or pixels [n, 3, H, W] from -1 to 1, float32, which are still to be encoded.
        """

    @property
    def fingerprint(self) -> str:
        """Changes when what ``batch`` gives for an index does."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images as said above and token ids, int64 [n, T]; called from several threads."""

    def empty_ids(self) -> Tensor:
        """Return the token ids of an empty caption, int64 [T]."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward takes."""

    images: Tensor
    """Moments or pixels, as the :class:`TrainingSet` has them."""
    token_ids_BT: Tensor
    posterior_BCHW: Tensor
    noise_BCHW: Tensor
    offset_BC: Tensor
    uniforms_B2: Tensor
    """For the timestep: its place, and which of two distributions it is of."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``, copied without waiting where its memory is pinned."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def pinned(self) -> Batch:
        """Return the batch in memory that a GPU can copy from by itself."""
        return Batch(*(getattr(self, f.name).pin_memory() for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Batches:
    """The samples of a run by position: position p is the p-th sample since its beginning, over all processes."""

    samples: TrainingSet
    order: Order
    noise: KeyedNoise
    latent_shape: tuple[int, int, int]
    """C, H, W."""
    caption_drop: float = 0.0

    def at(self, start: int, count: int) -> Batch:
        """Return the positions ``start`` … ``start + count - 1``: always the same, whoever asks."""
        images, token_ids_BT = self.samples.batch(self.order.indices(start, count))
        if self.caption_drop > 0:
            drop = self.noise.uniforms("caption", start, count)[:, 0] < self.caption_drop
            token_ids_BT = torch.where(torch.from_numpy(drop)[:, None], self.samples.empty_ids(), token_ids_BT)
        return Batch(
            images,
            token_ids_BT,
            torch.from_numpy(self.noise.normals("posterior", start, count, self.latent_shape)),
            torch.from_numpy(self.noise.normals("noise", start, count, self.latent_shape)),
            torch.from_numpy(self.noise.normals("offset", start, count, self.latent_shape[:1])),
            torch.from_numpy(self.noise.uniforms("timestep", start, count, 2).copy()),
        )


def prepared(
    batches: Batches, starts: Iterable[int], count: int, device: torch.device, *, workers: int = 2
) -> Generator[Batch]:
    """Yield the batches at ``starts`` in order, on ``device``, each made ahead of time by one of ``workers`` threads.

    Raises what making a batch raises. Close the generator to let go of the threads.
    """
    pins = device.type == "cuda"

    def make(start: int) -> Batch:
        batch = batches.at(start, count)
        return batch.pinned() if pins else batch

    pool = ThreadPoolExecutor(workers, thread_name_prefix="batches")
    waiting: deque[Future[Batch]] = deque()
    coming = iter(starts)
    try:
        for start in coming:
            waiting.append(pool.submit(make, start))
            if len(waiting) > workers:
                break
        while waiting:
            batch = waiting.popleft().result()
            for start in coming:
                waiting.append(pool.submit(make, start))
                break
            yield batch.to(device)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
