"""A reader of toy-world pictures: what is in one, from its pixels alone, and whether a caption is true of it.

The colours say which background and which things there are. Of each thing the share of every pixel it covers is
estimated, which gives its area and middle; of the three shapes with that area and middle the one that covers the same
pixels best is its shape. At last the picture is drawn again from the reading: what differs is mess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from unet_surgery.toyworld.draw import ANCHORS, PALETTE, RADII, SIDE, TRIANGLE_REACH, areas, coverage
from unet_surgery.toyworld.grammar import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, parse

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Reading", "Seen", "Verdict", "judge", "read"]

ATTRIBUTES = ("background", "count", "colour", "size", "shape", "place", "clean")

# Two large things leave 60 % of the background.
MIN_BACKGROUND_SHARE = 0.4
# In RGB; half of the least distance of two colours of the palette is 51, and a network's colours are a little off.
MAX_COLOUR_DISTANCE = 60.0
# Pixels whose four neighbours are of their colour too: a small triangle has 25, the fringe of another colour none.
MIN_CORE_PIXELS = 9
# How far beyond its core a thing may reach: the eroded pixel, the anti-aliased one and one of blur.
REACH_PIXELS = 3
MIN_OVERLAP = 0.8
# Blur and noise widen the borders of things; a steeper cover takes most of that back.
SHARPEN = 1.8
# A pixel is mess when its mean difference from the picture drawn again is above this, of 255.
MESS_DIFFERENCE = 50.0
MAX_MESS_SHARE = 0.03
# The size is large above the geometric mean of the radii.
SIZE_BORDER = (RADII["small"] * RADII["large"]) ** 0.5
# Positions are 7 apart and move by 0.9; relations are 15 apart along, 4 across.
MAX_FROM_ANCHOR = 3.4
MIN_APART = 5.0

_NAMES = (*BACKGROUNDS, *COLOURS)
_COLOURS = np.array([PALETTE[name] for name in _NAMES], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Seen:
    """A thing found in a picture: the middle of its box in pixels; ``shape`` is None where none fits."""

    size: str
    colour: str
    shape: str | None
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows. ``mess``: the share of its pixels that the reading does not explain."""

    background: str | None
    things: tuple[Seen, ...]
    mess: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which attributes of a caption a picture has; ``right``: all of them.

    ``colour``, ``size`` and ``shape`` are of all things of the caption together; with another number of things in the
    picture they and ``place`` are wrong.
    """

    attributes: dict[str, bool]
    right: bool


def judge(picture: NDArray[np.uint8], caption: str) -> Verdict:
    """Compare a picture, [32, 32, 3], with a caption of the toy world.

    Raises:
        ValueError: the caption is none, or the picture has another shape or dtype.
    """
    scene = parse(caption)
    reading = read(picture)
    found = dict.fromkeys(ATTRIBUTES, False)
    found["background"] = reading.background == scene.background
    found["count"] = len(reading.things) == len(scene.things)
    found["clean"] = reading.mess <= MAX_MESS_SHARE
    if found["count"]:
        orders = [reading.things] if len(scene.things) == 1 else [reading.things, reading.things[::-1]]
        compared = [_compare(scene, things) for things in orders]
        best: dict[str, bool] = max(compared, key=_num_right)
        found |= best
    return Verdict(found, all(found.values()))


def read(picture: NDArray[np.uint8]) -> Reading:
    """Return what ``picture``, [32, 32, 3], shows.

    Raises:
        ValueError: the picture has another shape or dtype.
    """
    if picture.shape != (SIDE, SIDE, 3) or picture.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 [{SIDE}, {SIDE}, 3], not {picture.dtype} {list(picture.shape)}")
    pixels = picture.astype(np.float32)
    squared = (pixels**2).sum(axis=2)[..., None] - 2 * (pixels @ _COLOURS.T) + (_COLOURS**2).sum(axis=1)
    nearest = np.where(squared.min(axis=2) <= MAX_COLOUR_DISTANCE**2, squared.argmin(axis=2), len(_NAMES))
    counts = np.bincount(nearest.ravel(), minlength=len(_NAMES) + 1)
    ground = int(counts[: len(BACKGROUNDS)].argmax())
    if counts[ground] < MIN_BACKGROUND_SHARE * SIDE * SIDE:
        return Reading(None, (), 1.0)
    cores = {
        name: core
        for number, name in enumerate(_NAMES)
        if number >= len(BACKGROUNDS) and counts[number] >= MIN_CORE_PIXELS
        if (core := _eroded(nearest == number)).sum() >= MIN_CORE_PIXELS
    }
    again = np.broadcast_to(_COLOURS[ground], pixels.shape).copy()
    things = []
    for colour, cover in _covers(pixels, _COLOURS[ground], cores).items():
        seen, drawn = _fit(colour, cover)
        things.append(seen)
        again += (np.array(PALETTE[colour], dtype=np.float32) - again) * drawn[..., None]
    mess = float((np.abs(pixels - again).mean(axis=2) > MESS_DIFFERENCE).mean())
    return Reading(BACKGROUNDS[ground], tuple(things), mess)


def _covers(
    pixels: NDArray[np.float32], ground: NDArray[np.float32], cores: dict[str, NDArray[np.bool_]]
) -> dict[str, NDArray[np.float32]]:
    """Return colour → the share of each pixel that the thing of that colour covers, [32, 32].

    A pixel near two things belongs to the one whose blend with the background explains it better.
    """
    covers, residuals = {}, {}
    for colour, core in cores.items():
        towards = np.array(PALETTE[colour], dtype=np.float32) - ground
        cover = np.clip(((pixels - ground) @ towards) / (towards @ towards), 0, 1)
        sharp = np.clip((cover - 0.5) * SHARPEN + 0.5, 0, 1)
        residual = ((pixels - ground - cover[..., None] * towards) ** 2).sum(axis=2)
        near = core
        for _ in range(REACH_PIXELS):
            near = ~_eroded(~near)
        covers[colour] = np.where(near, sharp, 0)
        residuals[colour] = np.where(near, residual, np.inf)
    if len(covers) > 1:
        best = np.stack(list(residuals.values())).argmin(axis=0)
        covers = {colour: np.where(best == k, cover, 0) for k, (colour, cover) in enumerate(covers.items())}
    return covers


def _fit(colour: str, cover: NDArray[np.float32]) -> tuple[Seen, NDArray[np.float32]]:
    """Return the thing that covers the pixels so, and the cover of that thing when drawn."""
    area = float(cover.sum())
    along = np.arange(SIDE) + 0.5
    x, y = float((cover.sum(axis=0) * along).sum()) / area, float((cover.sum(axis=1) * along).sum()) / area
    radii = np.array([(area / areas(shape)) ** 0.5 for shape in SHAPES])
    # A triangle's middle lies a quarter of its reach below its box's.
    lower = np.array(
        [0.25 * TRIANGLE_REACH * r if shape == "triangle" else 0.0 for shape, r in zip(SHAPES, radii, strict=True)]
    )
    drawn = coverage(np.arange(len(SHAPES)), np.full(len(SHAPES), x), y - lower, radii)
    overlap = np.minimum(drawn, cover).sum(axis=(1, 2)) / np.maximum(drawn, cover).sum(axis=(1, 2))
    best = int(overlap.argmax())
    size = "large" if radii[best] > SIZE_BORDER else "small"
    shape = SHAPES[best] if overlap[best] >= MIN_OVERLAP else None
    return Seen(size, colour, shape, x, y - float(lower[best])), drawn[best]


def _num_right(found: dict[str, bool]) -> int:
    return sum(found.values())


def _compare(scene: Scene, things: Sequence[Seen]) -> dict[str, bool]:
    pairs: list[tuple[Thing, Seen]] = list(zip(scene.things, things, strict=True))
    return {
        "colour": all(thing.colour == seen.colour for thing, seen in pairs),
        "size": all(thing.size == seen.size for thing, seen in pairs),
        "shape": all(thing.shape == seen.shape for thing, seen in pairs),
        "place": scene.place == (_position(things[0]) if len(things) == 1 else _relation(*things)),
    }


def _position(seen: Seen) -> str | None:
    distances = {name: ((seen.x - x) ** 2 + (seen.y - y) ** 2) ** 0.5 for name, (x, y) in ANCHORS.items()}
    name = min(distances, key=lambda name: distances[name])
    return name if distances[name] <= MAX_FROM_ANCHOR else None


def _relation(first: Seen, second: Seen) -> str | None:
    """Return how ``first`` lies to ``second``; None where they lie aslant or on each other."""
    dx, dy = first.x - second.x, first.y - second.y
    if max(abs(dx), abs(dy)) < max(MIN_APART, 1.5 * min(abs(dx), abs(dy))):
        return None
    if abs(dy) > abs(dx):
        return "above" if dy < 0 else "below"
    return "left of" if dx < 0 else "right of"


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels whose four neighbours are in ``mask`` too; beyond the border all are."""
    wide = np.pad(mask, 1, constant_values=True)
    inner: NDArray[np.bool_] = mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return inner
