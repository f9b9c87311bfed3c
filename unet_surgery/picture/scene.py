"""What is drawn where: a picture as frozen values, in pixels, y downwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unet_surgery.picture.fate import Fate
from unet_surgery.picture.textsize import text_width

__all__ = ["Box", "Card", "Gauge", "Line", "Point", "Rect", "Scene", "Shape", "Text"]

Point = tuple[float, float]
Shape = Literal["conv", "resnet", "attention", "down", "up"]

ASCENT, DESCENT = 0.78, 0.24
"""Of a font size: how far letters reach above and below the baseline."""


@dataclass(frozen=True, slots=True)
class Rect:
    """An upright rectangle."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    @property
    def middle(self) -> Point:
        return self.x + self.width / 2, self.y + self.height / 2

    def holds(self, other: Rect) -> bool:
        """True where ``other`` lies inside."""
        inside = self.x <= other.x and other.right <= self.right
        return inside and self.y <= other.y and other.bottom <= self.bottom

    def overlaps(self, other: Rect) -> bool:
        """True where the two share more than an edge."""
        across = self.x < other.right and other.x < self.right
        return across and self.y < other.bottom and other.y < self.bottom


@dataclass(frozen=True, slots=True)
class Text:
    """One line of text; ``y`` is its baseline. ``role`` is its class in the stylesheet."""

    x: float
    y: float
    content: str
    size: float
    role: str = "plain"
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False

    @property
    def extent(self) -> Rect:
        """What the text covers at most."""
        width = text_width(self.content, self.size, bold=self.bold)
        x = self.x - {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor] * width
        return Rect(x, self.y - ASCENT * self.size, width, (ASCENT + DESCENT) * self.size)


@dataclass(frozen=True, slots=True)
class Box:
    """A node. ``path`` is the teacher's module, empty in the legend; ``cells`` says which transformer blocks stay."""

    rect: Rect
    shape: Shape
    fate: Fate
    path: str = ""
    tooltip: str = ""
    labels: tuple[Text, ...] = ()
    cells: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Card:
    """The ground of a stage or the mid, with its selector, width and parameters."""

    rect: Rect
    fate: Fate
    name: str
    labels: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A connection: a straight line (2 points), a cubic Bézier curve (4), or one with a straight lead (5).

    Flows end in an arrowhead.
    """

    kind: Literal["flow", "kept", "removed", "moved"]
    points: tuple[Point, ...]
    source: str = ""
    target: str = ""


@dataclass(frozen=True, slots=True)
class Gauge:
    """A bar of which ``share`` is filled: what is left of the teacher."""

    rect: Rect
    share: float


@dataclass(frozen=True, slots=True)
class Scene:
    """A whole picture. ``title`` and ``words`` say in text what it shows; the legend's parts have no path."""

    width: float
    height: float
    title: str
    words: str
    cards: tuple[Card, ...]
    lines: tuple[Line, ...]
    boxes: tuple[Box, ...]
    gauges: tuple[Gauge, ...]
    texts: tuple[Text, ...]
