"""Weights, pictures and a vocabulary made from seeds by numpy alone, so that two environments make the same ones.

The tests import it, and tools/parity.py does in an environment that has neither this package nor what it needs.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = [
    "CAPTIONS",
    "CLIP_CONFIG",
    "FROM_FILES",
    "MERGES",
    "SIZES",
    "SPLITS",
    "SUBSETS",
    "SUBSET_SIZE",
    "digest_of",
    "gaussian",
    "gzipped_vocabulary",
    "logits",
    "pictures",
    "seeded_tensors",
    "unlike_pictures",
    "vocabulary",
    "write_pictures",
    "write_vocabulary",
]  # fmt: skip

SIZES = ((64, 48), (299, 299), (320, 400))
"""Width and height of the pictures that features are compared on."""

FROM_FILES = (5, 48, 48)
"""How many pictures of which size are scored from their files: as few as tests can afford."""
SPLITS, SUBSETS, SUBSET_SIZE = 2, 3, 4
"""And into what they are cut: of IS and KID."""

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 28, "layers": 2, "width": 44, "head_width": 22, "mlp_ratio": 4.3637, "patch_size": 14,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 0, "width": 32, "heads": 2, "layers": 2},
}  # fmt: skip
"""In the form of ViT-g-14's, with its odd widths of heads and MLPs; the vocabulary's size is filled in."""

MERGES = (
    "t h", "th e</w>", "h o", "ho u", "s e</w>", "hou se</w>", "r e", "re d</w>", "l a", "k e</w>", "la ke</w>",
    "o f</w>", "p h", "ph o", "pho t", "phot o</w>", "d o", "do g</w>", "c a", "ca t</w>", "a n", "an d</w>", "' s</w>",
    "1 2",
)  # fmt: skip

CAPTIONS = (
    "a photo of the red house",
    "A  Photo of THE red\thouse by a lake.",
    "the dog's cat, 12 cats and 3 dogs!",
    "red",
    "&lt;the lake&gt; &amp;amp; the house",
    "the red house and the lake " * 30,
    "“the dog’s” café – naïve",
    "ＦＵＬＬ width the ﬁn",
)
"""Those with anything but ASCII, or with an ampersand, go through ftfy in open_clip."""


def seeded_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return fp32 arrays by name: each is drawn with a seed of its own name, and scaled so that signals keep theirs."""
    return {name: _tensor(name, shape) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...]) -> Any:
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    values = random.standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return (0.75 + 0.25 * np.tanh(values)).astype(np.float32)
    if name.endswith("logit_scale"):
        return np.full(shape, 4.6, dtype=np.float32)
    if len(shape) < 2:
        is_gain = name.endswith("weight")
        return (0.1 * values + (1 if is_gain else 0)).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    gain = 0.02 if name == "fc.weight" else 1  # so that more than one class is likely
    return (values * np.float32(gain * (2 / fan_in) ** 0.5)).astype(np.float32)


def pictures(count: int, width: int, height: int, seed: int = 0) -> Any:
    """Return uint8 [count, height, width, 3]: coarse colours, fine grain."""
    random = np.random.default_rng((seed, width, height))
    coarse = random.integers(0, 256, (count, 8, 8, 3))
    rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
    grain = random.integers(-40, 41, (count, height, width, 3))
    return np.clip(coarse[:, rows][:, :, columns] + grain, 0, 255).astype(np.uint8)


def unlike_pictures(seed: int) -> Any:
    """Return those of FROM_FILES: each brighter than the one before, for alike ones are one class to random weights."""
    values = pictures(*FROM_FILES, seed)
    return (values * np.linspace(0, 1, len(values))[:, None, None, None]).astype(np.uint8)


def write_pictures(folder: Path, values: Any) -> list[Path]:
    """Write PNGs named by their index."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:05d}.png" for index in range(len(values))]
    for path, value in zip(paths, values, strict=True):
        Image.fromarray(value).save(path)
    return paths


def logits(count: int, classes: int = 1008) -> Any:
    """Return fp32 [count, classes] with peaks."""
    random = np.random.default_rng(7)
    values = random.standard_normal((count, classes), dtype=np.float32)
    values[np.arange(count), random.integers(0, 40, count)] += 8
    return values


def gaussian(count: int, size: int, seed: int) -> Any:
    """Return fp64 features [count, size] of unequal variances, correlated."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((size, size)) / size**0.5
    return random.standard_normal((count, size)) * np.linspace(0.1, 3, size) @ mix + 0.1 * seed


def vocabulary() -> list[str]:
    """Return the tokens of the small byte-pair vocabulary in the order of their ids, the two special ones last."""
    letters = _letters()
    merged = [merge.replace(" ", "") for merge in MERGES]
    return [*letters, *(f"{letter}</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]


def _letters() -> list[str]:
    """Return what stands for each byte: itself where it can be seen, else a letter from 256 on; CLIP's order."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) for byte in seen] + [chr(256 + i) for i in range(len(unseen))]


def write_vocabulary(folder: Path) -> None:
    """Write it as transformers' CLIPTokenizer reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {token: index for index, token in enumerate(vocabulary())}
    (folder / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", "utf-8")


def gzipped_vocabulary() -> bytes:
    """Return it as open_clip's SimpleTokenizer reads it."""
    data = io.BytesIO()
    with gzip.GzipFile(fileobj=data, mode="wb", mtime=0) as file:
        file.write(("#version: 0.2\n" + "\n".join(MERGES)).encode())
    return data.getvalue()


def digest_of(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
