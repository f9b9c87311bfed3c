"""How often a U-Net draws what toy-world captions say, by the checker: shares with 95 % Wilson intervals.

    python examples/toy_world/score.py FOLDER --captions 500 --objects one --held-out

``FOLDER`` is a pipeline whose U-Net was trained on the toy world, or a teacher's name. What is printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from unet_surgery.data.toy import Split, scenes_of
from unet_surgery.errors import SurgeryError
from unet_surgery.evaluate.toy import shares, verdicts
from unet_surgery.hub import fetch_teacher, resolve_teacher
from unet_surgery.runtime.load import load_unet
from unet_surgery.runtime.parts import Parts, load_parts
from unet_surgery.sample.draw import sample
from unet_surgery.sample.interval import wilson
from unet_surgery.toyworld.checker import Verdict
from unet_surgery.toyworld.dice import integers
from unet_surgery.toyworld.grammar import caption, parse

__all__ = ["captions_of", "drawing", "load_pipeline", "score", "tally", "wilson"]

BATCH = 64

Draw = Callable[[Sequence[str], int], NDArray[np.uint8]]


def main() -> int:
    options = parse_options()
    kinds: tuple[Literal["one", "two"], ...] = ("one", "two") if options.objects == "both" else (options.objects,)
    split: Split = "held_out" if options.held_out else "all"
    captions = [text for kind in kinds for text in captions_of(kind, options.captions, split)]
    try:
        unet, parts = load_pipeline(options.folder, options.device)
        draw = drawing(unet, parts, steps=options.steps, guidance=options.guidance, progress=say)
        found = score(draw, captions, options.seeds)
    except SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    said = {"captions": options.captions, "split": split, "steps": options.steps, "guidance": options.guidance}
    text = json.dumps({**said, "seeds": options.seeds, "scores": found}, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", "utf-8")
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", help="a pipeline's folder, or a teacher's name such as toy")
    parser.add_argument("--captions", type=int, default=500, help="of each kind; every one there is before any again")
    parser.add_argument("--objects", choices=["one", "two", "both"], default="both")
    parser.add_argument("--held-out", action="store_true", help="captions that training never saw; else of all")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the JSON there as well")
    return parser.parse_args()


def say(done: int, count: int) -> None:
    if done == count or done % (4 * BATCH) == 0:
        print(f"{done} of {count} pictures", file=sys.stderr, flush=True)


def load_pipeline(name: str, device: str = "cpu") -> tuple[Any, Parts]:
    """Return the U-Net and the other parts of a pipeline's folder or a teacher's name, in fp32.

    Raises:
        SurgeryError: there is no such pipeline, or it is not whole.
    """
    folder = fetch_teacher(resolve_teacher(name), progress=lambda _done, _all: None).folder
    unet = torch.nn.Module.to(load_unet(folder), device=device, dtype=torch.float32).eval()
    return unet, load_parts(folder, device=device)


def drawing(
    unet: Any,
    parts: Parts,
    *,
    steps: int = 20,
    guidance: float = 2.0,
    progress: Callable[[int, int], None] | None = None,
) -> Draw:
    """Return what draws captions with a seed: the same noise for the same caption number, whatever the U-Net."""

    def draw(captions: Sequence[str], seed: int) -> NDArray[np.uint8]:
        return sample(unet, parts, captions, seed=seed, steps=steps, guidance=guidance, batch=BATCH, progress=progress)

    return draw


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
    found = verdicts(pictures, captions)
    num_things = [len(parse(text).things) for text in captions]
    kinds: Mapping[str, set[int]] = {"all": {1, 2}, "one": {1}, "two": {2}}
    return {
        kind: _summary([verdict for verdict, num in zip(found, num_things, strict=True) if num in nums])
        for kind, nums in kinds.items()
        if any(num in nums for num in num_things)
    }


def _summary(found: Sequence[Verdict]) -> dict[str, Any]:
    right = sum(verdict.right for verdict in found)
    return {
        "pictures": len(found),
        "num_right": right,
        "right": right / len(found),
        "interval": wilson(right, len(found)),
        "attributes": shares(found),
    }


if __name__ == "__main__":
    raise SystemExit(main())
