"""Pictures of scenes: 32 × 32, anti-aliased, each a pure function of a scene and a seed.

Only additions, multiplications, divisions, minima and square roots of IEEE numbers, in a stated order: the bytes are
the same on every platform. Lengths are in pixels; x grows to the right, y downwards; (0, 0) is the upper left corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from unet_surgery.toyworld.dice import uniform
from unet_surgery.toyworld.grammar import SHAPES, Scene

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ANCHORS", "PALETTE", "RADII", "SIDE", "areas", "coverage", "draw", "draw_many"]

SIDE = 32
SUPERSAMPLE = 2

# Any two are at least 100 apart in RGB, of 441 from black to white.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 48, 44),
    "yellow": (250, 206, 52),
    "green": (44, 168, 84),
    "blue": (36, 112, 236),
    "purple": (142, 58, 200),
    "pink": (250, 136, 186),
    "white": (250, 248, 244),
    "gray": (150, 152, 158),
    "navy": (20, 30, 84),
    "brown": (110, 70, 44),
}

RADII = {"small": 5.3, "large": 7.5}
ANCHORS: dict[str, tuple[float, float]] = {
    "left": (9.0, 16.0),
    "right": (23.0, 16.0),
    "top": (16.0, 9.0),
    "bottom": (16.0, 23.0),
    "center": (16.0, 16.0),
}
PAIR_ANCHORS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "above": ((16.0, 8.1), (16.0, 23.9)),
    "below": ((16.0, 23.9), (16.0, 8.1)),
    "left of": ((8.1, 16.0), (23.9, 16.0)),
    "right of": ((23.9, 16.0), (8.1, 16.0)),
}
SIZE_JITTER = 0.03
JITTER = 0.9
PAIR_JITTER_ALONG, PAIR_JITTER_ACROSS = 0.25, 2.0

# What reads as one size: a square of a circle's radius would look larger, a triangle smaller.
SQUARE_HALF = 0.88
TRIANGLE_REACH = 1.2
SIN_60 = 0.8660254037844386


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the things of a batch of scenes lie, in slots: [n] arrays, ``shapes`` as numbers of ``SHAPES``."""

    shapes: NDArray[np.int64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    radii: NDArray[np.float64]


def draw(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """Return the picture, [32, 32, 3]; the seed moves and resizes its things a little."""
    picture: NDArray[np.uint8] = draw_many([scene], [seed])[0]
    return picture


def draw_many(scenes: Sequence[Scene], seeds: Sequence[int] | NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Return the pictures, [n, 32, 32, 3]; each is what ``draw`` makes of its scene and its seed (0 … 2⁶⁴ − 1).

    Raises:
        ValueError: not one seed a scene.
    """
    if len(scenes) != len(seeds):
        raise ValueError(f"{len(scenes)} scenes and {len(seeds)} seeds")
    keys = np.asarray(seeds, dtype=np.uint64)
    pictures = np.array([PALETTE[scene.background] for scene in scenes], dtype=np.float32).reshape(-1, 1, 1, 3)
    pictures = np.repeat(np.repeat(pictures, SIDE, axis=1), SIDE, axis=2)
    for slot in (0, 1):
        rows = np.array([i for i, scene in enumerate(scenes) if len(scene.things) > slot], dtype=np.int64)
        if not rows.size:
            continue
        chosen = [scenes[i] for i in rows]
        layout = _layout(chosen, keys[rows], slot)
        cover = coverage(layout.shapes, layout.x, layout.y, layout.radii)[..., None]
        colours = np.array([PALETTE[s.things[slot].colour] for s in chosen], dtype=np.float32).reshape(-1, 1, 1, 3)
        pictures[rows] += (colours - pictures[rows]) * cover
    rounded: NDArray[np.uint8] = np.floor(pictures + np.float32(0.5)).astype(np.uint8)
    return rounded


def coverage(
    shapes: NDArray[np.int64], x: NDArray[np.float64], y: NDArray[np.float64], radii: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return how much of each pixel a shape covers, [n, 32, 32] in 0…1.

    ``x`` and ``y`` are the centres of the shapes' bounding boxes; a triangle stands on its base.
    """
    grid = (np.arange(SIDE * SUPERSAMPLE, dtype=np.float32) + np.float32(0.5)) / np.float32(SUPERSAMPLE)
    cover = np.empty((len(shapes), SIDE, SIDE), dtype=np.float32)
    for number, shape in enumerate(SHAPES):
        rows = np.flatnonzero(shapes == number)
        if not rows.size:
            continue
        dx = grid[None, None, :] - x[rows].astype(np.float32)[:, None, None]
        dy = grid[None, :, None] - y[rows].astype(np.float32)[:, None, None]
        outside = _distance(shape, dx, dy, radii[rows].astype(np.float32)[:, None, None])
        fine = np.clip(np.float32(0.5) - outside * np.float32(SUPERSAMPLE), np.float32(0), np.float32(1))
        above, below = fine[:, 0::2], fine[:, 1::2]
        cover[rows] = ((above[..., 0::2] + above[..., 1::2]) + (below[..., 0::2] + below[..., 1::2])) / np.float32(4)
    return cover


def areas(shape: str) -> float:
    """Return a shape's area divided by its radius squared."""
    if shape == "circle":
        return 3.141592653589793
    if shape == "square":
        return (2 * SQUARE_HALF) ** 2
    return 1.5 * SIN_60 * TRIANGLE_REACH**2


def _distance(
    shape: str, dx: NDArray[np.float32], dy: NDArray[np.float32], radius: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return how far a point lies outside the shape (inside: negative), exact along its sides."""
    if shape == "circle":
        distance: NDArray[np.float32] = np.sqrt(dx * dx + dy * dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - radius * np.float32(SQUARE_HALF)
    else:  # equilateral: three lines half a reach from its middle, which lies a quarter below its box's
        reach = radius * np.float32(TRIANGLE_REACH)
        dy = dy - reach * np.float32(0.25)
        distance = np.maximum(dy, np.abs(dx) * np.float32(SIN_60) - dy * np.float32(0.5)) - reach * np.float32(0.5)
    return distance


def _layout(scenes: Sequence[Scene], keys: NDArray[np.uint64], slot: int) -> _Layout:
    jitter_x, jitter_y, jitter_size = (2 * uniform(keys, 3 * slot + k) - 1 for k in range(3))
    anchors, reach = [], []
    for scene in scenes:
        if len(scene.things) == 1:
            anchors.append(ANCHORS[scene.place])
            reach.append((JITTER, JITTER))
        else:
            anchors.append(PAIR_ANCHORS[scene.place][slot])
            upright = scene.place in {"above", "below"}
            along, across = PAIR_JITTER_ALONG, PAIR_JITTER_ACROSS
            reach.append((across, along) if upright else (along, across))
    at, by = np.array(anchors), np.array(reach)
    things = [scene.things[slot] for scene in scenes]
    radii = np.array([RADII[thing.size] for thing in things]) * (1 + SIZE_JITTER * jitter_size)
    shapes = np.array([SHAPES.index(thing.shape) for thing in things])
    return _Layout(shapes, at[:, 0] + by[:, 0] * jitter_x, at[:, 1] + by[:, 1] * jitter_y, radii)
