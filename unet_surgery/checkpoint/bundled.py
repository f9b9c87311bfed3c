"""Built-in teachers, so that all runs without a network: some trained and shipped whole, most made with random weights.

A folder of ``_teachers`` that holds its U-Net's weights is *shipped*: it is used where it lies, and never written to.
Of the others only configs are bundled, and weights are made on the user's machine. ``tiny-random`` is a whole small
pipeline; the others are full-size U-Net folders. Their weights are uniform, scaled as torch's default initialisation
(bound 1/√fan_in), each tensor seeded by its name, norms near 1 and biases near 0: a forward is finite and no two
tensors are equal.
"""

from __future__ import annotations

import importlib.resources
import os
import zlib
from collections.abc import Mapping
from math import prod, sqrt
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.components import INDEX
from unet_surgery.checkpoint.header import encode_header
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.layout import UNET_BASE
from unet_surgery.checkpoint.licence import CARD
from unet_surgery.checkpoint.staging import Staging
from unet_surgery.checkpoint.tensorfile import METADATA
from unet_surgery.errors import OutputError
from unet_surgery.graph import build, parse_config
from unet_surgery.lower import shapes_of

__all__ = ["FAMILY_TEACHERS", "bundled_folder", "bundled_names", "is_shipped", "make_bundled"]

SHAPES = "shapes.json"
SEED = 0
BLOCK_VALUES = 1 << 22
SMALL = 0.02

FAMILY_TEACHERS = {"sd1": "sd-v1-random", "sd2": "sd-v2-random", "sdxl": "sdxl-random"}
"""The built-in teacher that stands for each family in tables."""

Shapes = Mapping[str, tuple[int, ...]]


def bundled_names() -> list[str]:
    """Return the names of the built-in teachers."""
    return sorted(path.name for path in _root().iterdir() if path.is_dir())


def bundled_folder(name: str) -> Path:
    """Return the folder of a built-in teacher: whole where it is shipped, else configs, which are enough to plan."""
    return _root() / name


def is_shipped(name: str) -> bool:
    """True if the built-in teacher ``name`` comes with its weights."""
    return any((bundled_folder(name) / unet / f"{UNET_BASE}.safetensors").is_file() for unet in ("unet", ""))


def make_bundled(name: str, target: Path, progress: disk.Progress) -> None:
    """Write the built-in teacher ``name``, one that is not shipped, with random weights as the folder ``target``.

    Raises:
        OutputError: no room, or the folder cannot be written.
    """
    source = bundled_folder(name)
    files = _weights(source)
    total = 4 * sum(prod(shape) for shapes in files.values() for shape in shapes.values())
    with Staging(target) as staging:
        free = disk.free_bytes(staging.folder)
        if free < total * 1.01:
            raise OutputError(
                f"there is no room for {name}",
                where=str(target.parent),
                expected=f"{total / 1e9:.2f} GB",
                found=f"{free / 1e9:.2f} GB free",
                hint="set UNET_SURGERY_CACHE to a folder on another disk",
            )
        on_bytes = disk.counting(progress, total)
        disk.write_file(staging.folder / CARD, (_root() / CARD).read_bytes())
        for path in sorted(p for p in source.rglob("*") if p.name != SHAPES):
            copy = staging.folder / path.relative_to(source)
            if path.is_dir():
                disk.make_folder(copy)
            else:
                disk.write_file(copy, path.read_bytes())
        for file, shapes in files.items():
            _write_random(staging.folder / file, shapes, on_bytes)
        staging.commit()


def _root() -> Path:
    return Path(str(importlib.resources.files("unet_surgery"))) / "_teachers"


def _weights(source: Path) -> dict[str, Shapes]:
    """Return weights file → its tensors: the U-Net's from its graph, the others' as bundled."""
    unet = "unet/" if (source / INDEX).is_file() else ""
    config = read_object(source / f"{unet}config.json")
    files: dict[str, Shapes] = {f"{unet}{UNET_BASE}.safetensors": shapes_of(build(parse_config(config)))}
    if (source / SHAPES).is_file():
        for file, shapes in read_object(source / SHAPES).items():
            files[file] = {tensor: tuple(shape) for tensor, shape in shapes.items()}
    return files


def _write_random(path: Path, shapes: Shapes, on_bytes: disk.OnBytes) -> None:
    import numpy as np

    fd = disk.create(path)
    try:
        names = sorted(shapes)
        disk.write(fd, encode_header([(name, "F32", shapes[name]) for name in names], METADATA))
        for name in names:
            shape = shapes[name]
            generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence([SEED, zlib.crc32(name.encode())])))
            centre = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
            bound = SMALL if len(shape) == 1 else 1 / sqrt(prod(shape[1:]))
            for start in range(0, prod(shape), BLOCK_VALUES):
                values = generator.random(min(BLOCK_VALUES, prod(shape) - start), dtype=np.float32)
                values *= 2 * bound
                values += centre - bound
                disk.write(fd, values.astype("<f4", copy=False).data.cast("B"))
                on_bytes(values.nbytes)
        disk.fsync(fd)
    finally:
        os.close(fd)
