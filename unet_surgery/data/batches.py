"""Batches of a run: which samples, with which noise, prepared ahead in threads.

B batch · C latent channels · H, W latent size · T tokens
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import torch
from torch import Tensor

from unet_surgery.data.keyed import KeyedNoise
from unet_surgery.data.order import Order

__all__ = ["Batch", "Batches", "GuidedSteps", "TrainingSet", "prepared"]


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
    guidance_B: Tensor | None = None
    """For the guidance, in (0, 1); None in a step that is not guided, which the host so knows without asking."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``, copied without waiting where its memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Return the batch in memory that a GPU can copy from by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = (getattr(self, f.name) for f in fields(self))
        return Batch(*(None if value is None else change(value) for value in values))


@dataclass(frozen=True, slots=True)
class GuidedSteps:
    """Which optimizer steps of a stage are guided: whole ones, decided by the position of their first sample."""

    share: float
    first: int
    """The position of the stage's first sample."""
    batch: int
    """Samples an optimizer step."""

    def uniforms(self, noise: KeyedNoise, start: int, count: int) -> Tensor | None:
        """Return a number in (0, 1) for each position from ``start``, or None if their step is not guided."""
        begins = start - (start - self.first) % self.batch
        if noise.uniforms("guided", begins, 1).item() >= self.share:
            return None
        return torch.from_numpy(noise.uniforms("guidance", start, count)[:, 0].copy())


@dataclass(frozen=True, slots=True)
class Batches:
    """The samples of a run by position: position p is the p-th sample since its beginning, over all processes."""

    samples: TrainingSet
    order: Order
    noise: KeyedNoise
    latent_shape: tuple[int, int, int]
    """C, H, W."""
    caption_drop: float = 0.0
    guided: GuidedSteps | None = None

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
            None if self.guided is None else self.guided.uniforms(self.noise, start, count),
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
