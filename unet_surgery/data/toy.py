"""Toy-world pictures as training data, drawn when they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from unet_surgery.errors import DataError
from unet_surgery.toyworld.dice import integers, mixed, uniform
from unet_surgery.toyworld.draw import draw_many
from unet_surgery.toyworld.grammar import (
    Scene,
    caption,
    is_held_out,
    one_object_scenes,
    two_object_scenes,
    words,
)

__all__ = ["Objects", "Split", "ToyPictures", "scenes_of"]

Objects = Literal["one", "two", "both"]
Split = Literal["train", "held_out", "all"]

# Raise it when a picture of a given seed and number changes: it is part of every fingerprint.
VERSION = 1


@cache
def scenes_of(objects: Literal["one", "two"], split: Split) -> tuple[Scene, ...]:
    """Return the scenes of one or of two things that belong to ``split``, in the grammar's order."""
    scenes = one_object_scenes() if objects == "one" else two_object_scenes()
    return scenes if split == "all" else tuple(s for s in scenes if is_held_out(s) == (split == "held_out"))


class ToyPictures:
    """``count`` pictures with captions; number i is a pure function of (seed, i), whatever the count.

    ``two_share`` is the share of scenes of two things where ``objects`` is "both". The tokenizer is a
    ``CLIPTokenizer``.

    Raises:
        DataError: the tokenizer's longest text is shorter than a caption, or an argument is out of its range.
    """

    latents: Final = "pixels"

    def __init__(
        self,
        tokenizer: Any,
        count: int,
        seed: int,
        objects: Objects = "both",
        split: Split = "train",
        two_share: float = 0.5,
    ) -> None:
        if count < 1 or not 0 <= two_share <= 1:
            raise DataError(
                "toy pictures are counted from 1, their share of pairs from 0 to 1", found=f"{count}, {two_share}"
            )
        self._count = count
        self._seed = int(mixed([seed % 2**64], 0)[0])
        self._two_share = {"one": 0.0, "two": 1.0, "both": two_share}[objects]
        self._pools = scenes_of("one", split), scenes_of("two", split)
        self._ids = _Ids(tokenizer)
        said = (VERSION, count, seed, split, self._two_share, self._ids.fingerprint)
        self.fingerprint = hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def __len__(self) -> int:
        return self._count

    def scenes(self, indices: Sequence[int]) -> list[Scene]:
        """Return what the pictures show."""
        keys = self._keys(indices)
        two = uniform(keys, 0) < self._two_share
        one_pool, two_pool = self._pools
        return [
            two_pool[second] if is_two else one_pool[first]
            for is_two, first, second in zip(
                two.tolist(),
                integers(keys, 1, len(one_pool)).tolist(),
                integers(keys, 2, len(two_pool)).tolist(),
                strict=True,
            )
        ]

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Return what the pictures' captions say."""
        return [caption(scene) for scene in self.scenes(indices)]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return pixels, float32 [n, 3, 32, 32] in −1…1, and token ids, int64 [n, T]."""
        scenes = self.scenes(indices)
        pictures = draw_many(scenes, mixed(self._keys(indices), 3))
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        return pixels.contiguous(), torch.stack([self._ids(caption(scene)) for scene in scenes])

    def empty_ids(self) -> Tensor:
        """Return the token ids of an empty caption, int64 [T]."""
        return self._ids("").clone()

    def _keys(self, indices: Sequence[int]) -> np.ndarray[Any, np.dtype[np.uint64]]:
        numbers = np.asarray(indices, dtype=np.int64)
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < self._count):
            raise IndexError(f"picture {int(numbers.max())} of {self._count}")
        return numbers.astype(np.uint64) ^ np.uint64(self._seed)


class _Ids:
    """Captions as token ids, remembered: there are at most 18,001 of them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._length = int(tokenizer.model_max_length)
        self._known: dict[str, Tensor] = {}
        self._lock = Lock()  # tokenizers refuse two threads at once when padding is set
        needed = max(
            len(tokenizer(caption(scene)).input_ids) for scene in two_object_scenes()[::1080]
        )  # every relation
        if needed > self._length:
            raise DataError(
                "captions of the toy world do not fit the tokenizer",
                expected=f"room for {needed} tokens",
                found=f"model_max_length is {self._length}",
            )
        ids = [tokenizer(text).input_ids for text in (*words(), "")]
        self.fingerprint = hashlib.sha256(json.dumps([ids, self._length]).encode()).hexdigest()

    def __call__(self, text: str) -> Tensor:
        with self._lock:
            if text not in self._known:
                ids = self._tokenizer(text, padding="max_length", truncation=True, max_length=self._length).input_ids
                self._known[text] = torch.tensor(ids, dtype=torch.int64)
            return self._known[text]
