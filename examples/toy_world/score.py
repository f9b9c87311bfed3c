"""How often a U-Net draws what toy-world captions say, by the checker: shares with Wilson intervals.

    draw = lambda prompts, seed: sample(unet, parts, prompts, seed=seed, batch=250)  # unet_surgery.sample.draw
    score(draw, captions_of("one", 500) + captions_of("two", 500), seeds=[0])

``draw`` is an argument, so that anything that makes pictures can be scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unet_surgery.data.toy import Split, scenes_of
from unet_surgery.toyworld.checker import Verdict, judge
from unet_surgery.toyworld.dice import integers
from unet_surgery.toyworld.grammar import caption, parse

__all__ = ["captions_of", "score", "tally", "wilson"]

Z_95 = 1.959964

Draw = Callable[[Sequence[str], int], NDArray[np.uint8]]


def captions_of(objects: Literal["one", "two"], count: int, split: Split = "held_out", seed: int = 0) -> list[str]:
    """Return ``count`` captions drawn from the split: every scene before any comes again, in an order of ``seed``."""
    scenes = scenes_of(objects, split)
    turns = [
        integers(range(len(scenes)), seed + turn, 1 << 30).argsort(kind="stable")
        for turn in range(count // len(scenes) + 1)
    ]
    return [caption(scenes[i]) for i in np.concatenate(turns)[:count].tolist()]


def score(draw: Draw, captions: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Draw every caption with every seed and tally what is right; ``draw(captions, seed)`` gives [n, 32, 32, 3]."""
    pictures = np.concatenate([draw(captions, seed) for seed in seeds])
    return tally(pictures, list(captions) * len(seeds))


def tally(pictures: NDArray[np.uint8], captions: Sequence[str]) -> dict[str, Any]:
    """Return for all, one-object and two-object captions: count, share fully right, its interval, share per attribute.

    Raises:
        ValueError: not one caption a picture.
    """
    verdicts = [judge(picture, text) for picture, text in zip(pictures, captions, strict=True)]
    num_things = [len(parse(text).things) for text in captions]
    kinds: Mapping[str, set[int]] = {"all": {1, 2}, "one": {1}, "two": {2}}
    return {
        kind: _summary([verdict for verdict, num in zip(verdicts, num_things, strict=True) if num in nums])
        for kind, nums in kinds.items()
        if any(num in nums for num in num_things)
    }


def wilson(right: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Return the score interval of a share of ``right`` in ``total`` (Wilson 1927), 95 % by default."""
    share, width = right / total, z * z / total
    middle = (share + width / 2) / (1 + width)
    half = z / (1 + width) * sqrt(share * (1 - share) / total + width / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def _summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    right = sum(verdict.right for verdict in verdicts)
    return {
        "pictures": len(verdicts),
        "right": right / len(verdicts),
        "interval": wilson(right, len(verdicts)),
        "attributes": {
            name: float(np.mean([verdict.attributes[name] for verdict in verdicts])) for name in verdicts[0].attributes
        },
    }
