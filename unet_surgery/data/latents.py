"""A finished latent cache as a training set: mapped into memory, read where it lies.

Shapes: n samples, C latent channels, h × w the latents' size, T tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from unet_surgery.checkpoint.identity import tokenizer_sha256, vae_sha256
from unet_surgery.data.arrowfile import ShardView, open_shard
from unet_surgery.data.cachefolder import read_facts
from unet_surgery.data.cacheplan import CacheFacts, ShardFacts
from unet_surgery.errors import DataError, first_few

if TYPE_CHECKING:
    from unet_surgery.runtime.parts import Parts

__all__ = ["CacheReport", "LatentCache", "check_cache"]


class LatentCache:
    """The samples of a cache. With flipped pictures it is twice as long: the second half is the first, flipped.

    Raises:
        DataError: the cache is unfinished, or a shard is missing or cut short (named); or, with ``model``, its VAE or
            tokenizer is not the one that made the cache.
    """

    latents: Literal["moments", "pixels"] = "moments"

    def __init__(self, folder: str | Path, model: Parts | None = None) -> None:
        self.folder = Path(folder)
        self.facts = read_facts(self.folder)
        settings = self.facts.settings
        if model is not None:
            _check_model(self.facts, model.folder, self.folder)
        self._views: list[ShardView] = []
        for name, shard in self.facts.shards.items():
            _check_size(self.folder / name, shard)
            views = open_shard(self.folder / name, settings)
            if sum(map(len, views)) != shard.rows:
                raise _damaged(self.folder / name, f"{shard.rows} rows", f"{sum(map(len, views))}")
            self._views += views
        self._starts = np.cumsum([0, *map(len, self._views)])
        content = [settings.moments_shape, settings.flip, self.facts.empty_ids]
        content += [shard.sha256 for shard in self.facts.shards.values()]
        self.fingerprint = hashlib.sha256(repr(content).encode()).hexdigest()

    def __len__(self) -> int:
        return self.facts.count * (1 + self.facts.settings.flip)

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return moments, float16 [n, 2C, h, w], and token ids, int64 [n, T]."""
        settings = self.facts.settings
        moments = np.empty((len(indices), settings.row_values), np.float16)
        ids = np.empty((len(indices), settings.num_tokens), np.int64)
        for place, index in enumerate(indices):
            view, row, side = self._find(index)
            moments[place] = view.moments[side][row]
            ids[place] = view.ids[row]
        return torch.from_numpy(moments.reshape(-1, *settings.moments_shape)), torch.from_numpy(ids)

    def empty_ids(self) -> torch.Tensor:
        return torch.tensor(self.facts.empty_ids, dtype=torch.int64)

    def caption(self, index: int) -> str:
        view, row, _ = self._find(index)
        return str(view.captions[row])

    def id(self, index: int) -> str:
        """Return what the sample is called in the source."""
        view, row, _ = self._find(index)
        return str(view.names[row])

    def _find(self, index: int) -> tuple[ShardView, int, int]:
        """Return the record batch that holds a sample, the row there, and 1 if it is the flipped one."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        side, index = divmod(index, self.facts.count)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._views[number], index - int(self._starts[number]), side


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What ``check_cache`` read: samples, shards, and their bytes."""

    num_samples: int
    num_shards: int
    num_bytes: int


def check_cache(folder: str | Path, *, progress: Callable[[int, int], None] | None = None) -> CacheReport:
    """Read a cache whole, and compare every shard with the sha256 that was recorded when it was written.

    ``progress`` is called with bytes done and in all.

    Raises:
        DataError: a shard is missing, cut short, or not what was written; names all of them.
    """
    root = Path(folder)
    facts = read_facts(root)
    total, done = sum(shard.num_bytes for shard in facts.shards.values()), 0
    damaged = []
    for name, shard in facts.shards.items():
        try:
            if _sha256(root / name) != shard.sha256:
                damaged.append(name)
        except OSError:
            damaged.append(name)
        done += shard.num_bytes
        if progress is not None:
            progress(done, total)
    if damaged:
        raise DataError(
            f"{len(damaged)} of {len(facts.shards)} shards are not what was written",
            where=str(root),
            found=first_few(damaged),
            hint="make the cache again",
        )
    LatentCache(root)
    return CacheReport(facts.count, len(facts.shards), total)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_model(facts: CacheFacts, pipeline: Path, folder: Path) -> None:
    made_by = facts.teacher.get("name")
    for what, ours, theirs in (
        ("VAE", facts.settings.vae, vae_sha256(pipeline)),
        ("tokenizer", facts.settings.tokenizer, tokenizer_sha256(pipeline)),
    ):
        if ours != theirs:
            raise DataError(
                f"the cache was made by another {what} than the model's",
                where=str(folder),
                expected=f"the {what} of {pipeline.name or pipeline} (sha256 {theirs[:12]}…)",
                found=f"that of {made_by} (sha256 {ours[:12]}…)",
                hint="make a cache with this model: unet-surgery cache … --model",
            )


def _check_size(path: Path, shard: ShardFacts) -> None:
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise _damaged(path, f"{shard.num_bytes} bytes", error.strerror or "nothing") from error
    if size != shard.num_bytes:
        raise _damaged(path, f"{shard.num_bytes} bytes", f"{size} bytes")


def _damaged(path: Path, expected: str, found: str) -> DataError:
    return DataError(
        "a shard of the cache is damaged",
        where=str(path),
        expected=expected,
        found=found,
        hint="make the cache again; unet-surgery cache --check names every damaged shard",
    )
