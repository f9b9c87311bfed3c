"""What there is in the toy world, and the captions that say it.

One thing: "a small red circle at the left on a white background". Two things of different colours: "a small red circle
above a large blue square on a white background". ``caption`` and ``parse`` are inverse to each other, and both kinds
of scenes can be listed whole: 720 and 17,280.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass
from functools import cache

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "POSITIONS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Scene",
    "Thing",
    "caption",
    "is_held_out",
    "one_object_scenes",
    "parse",
    "two_object_scenes",
    "words",
]

SIZES = ("small", "large")
COLOURS = ("red", "yellow", "green", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = ("white", "gray", "navy", "brown")
POSITIONS = ("left", "right", "top", "bottom", "center")
RELATIONS = ("above", "below", "left of", "right of")
MIRRORED = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing of a scene; its words are in ``SIZES``, ``COLOURS`` and ``SHAPES``."""

    size: str
    colour: str
    shape: str

    def __post_init__(self) -> None:
        _known(self.size, SIZES)
        _known(self.colour, COLOURS)
        _known(self.shape, SHAPES)


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing at a position (``place`` in ``POSITIONS``), or two in a relation (``place`` in ``RELATIONS``)."""

    things: tuple[Thing, ...]
    place: str
    background: str

    def __post_init__(self) -> None:
        _known(self.background, BACKGROUNDS)
        if len(self.things) not in {1, 2}:
            raise ValueError(f"a scene holds one or two things, not {len(self.things)}")
        _known(self.place, POSITIONS if len(self.things) == 1 else RELATIONS)
        if len(self.things) == 2 and self.things[0].colour == self.things[1].colour:
            raise ValueError(f"two things of one colour, {self.things[0].colour}")


_PATTERN = re.compile(
    r"a (?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+) "
    r"(?:(?:at|in) the (?P<position>\w+)|"
    r"(?P<relation>above|below|left of|right of) a (?P<size2>\w+) (?P<colour2>\w+) (?P<shape2>\w+)) "
    r"on a (?P<background>\w+) background"
)


def caption(scene: Scene) -> str:
    """Return the one sentence that says what ``scene`` is."""
    first = _named(scene.things[0])
    if len(scene.things) == 2:
        return f"{first} {scene.place} {_named(scene.things[1])} on a {scene.background} background"
    preposition = "in" if scene.place == "center" else "at"
    return f"{first} {preposition} the {scene.place} on a {scene.background} background"


def parse(text: str) -> Scene:
    """Return the scene that ``text`` says: the inverse of ``caption``.

    Raises:
        ValueError: ``text`` is no caption of this grammar.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"not a caption of the toy world: {text!r}")
    things = [Thing(match["size"], match["colour"], match["shape"])]
    if match["relation"]:
        things.append(Thing(match["size2"], match["colour2"], match["shape2"]))
    scene = Scene(tuple(things), match["relation"] or match["position"], match["background"])
    if caption(scene) != text:  # "in the left"
        raise ValueError(f"not a caption of the toy world: {text!r}")
    return scene


@cache
def one_object_scenes() -> tuple[Scene, ...]:
    """Return all 720 scenes of one thing."""
    return tuple(
        Scene((thing,), position, background)
        for background in BACKGROUNDS
        for position in POSITIONS
        for thing in _things()
    )


@cache
def two_object_scenes() -> tuple[Scene, ...]:
    """Return all 17,280 scenes of two things; each picture has two captions, from either thing."""
    return tuple(
        Scene((first, second), relation, background)
        for background in BACKGROUNDS
        for relation in RELATIONS
        for first, second in itertools.product(_things(), repeat=2)
        if first.colour != second.colour
    )


def is_held_out(scene: Scene) -> bool:
    """Say whether ``scene`` is of the tenth that training never sees, by SHA-256 of its caption.

    The two captions of one picture ("A above B", "B below A") are held out together.
    """
    text = caption(scene)
    if len(scene.things) == 2:
        text = min(text, caption(Scene(scene.things[::-1], MIRRORED[scene.place], scene.background)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def words() -> tuple[str, ...]:
    """Return every word of the captions, sorted."""
    relations = itertools.chain.from_iterable(relation.split() for relation in RELATIONS)
    said = {"a", "at", "in", "the", "on", "background", *relations, *POSITIONS}
    return tuple(sorted(said.union(SIZES, COLOURS, SHAPES, BACKGROUNDS)))


def _things() -> list[Thing]:
    return [Thing(*parts) for parts in itertools.product(SIZES, COLOURS, SHAPES)]


def _named(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def _known(word: str, choices: tuple[str, ...]) -> None:
    if word not in choices:
        raise ValueError(f"{word!r} is none of {', '.join(choices)}")
