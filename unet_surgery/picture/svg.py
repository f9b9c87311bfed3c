"""A scene as SVG text: standalone, no scripts, nothing from elsewhere, the same bytes for the same scene."""

from __future__ import annotations

import html
from collections.abc import Iterator
from math import hypot

from unet_surgery.picture.palette import stylesheet
from unet_surgery.picture.scene import Box, Card, Gauge, Line, Point, Rect, Scene, Text

__all__ = ["to_svg"]

PAGE_RADIUS, CARD_RADIUS = 14.0, 8.0
RADII = {"resnet": 3.0, "attention": 10.0, "conv": 0.0}
SLANT = 8.0
"""How much a sampler narrows towards its coarser side."""
HEAD_LENGTH, HEAD_HALF = 7.0, 3.5
DOT_RADIUS = 2.75
CELL_HEIGHT, CELL_GAP, CELL_INSET = 3.0, 1.5, 10.0


def to_svg(scene: Scene) -> str:
    """Return ``scene`` as an SVG document in ASCII; its page is opaque, so it can lie on any ground."""
    size = f"{_number(scene.width)} {_number(scene.height)}"
    sides = f'width="{_number(scene.width)}" height="{_number(scene.height)}"'
    removed = {card.name for card in scene.cards if card.fate == "removed"}
    page = Rect(0.5, 0.5, scene.width - 1, scene.height - 1)
    document = "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {size}" {sides}>',
            f"<title>{_escaped(scene.title)}</title>",
            f"<desc>{_escaped(scene.words)}</desc>",
            f"<style>\n{stylesheet()}</style>",
            f'<rect class="page" {_sides(page)} rx="{_number(PAGE_RADIUS)}"/>',
            *(_card(card) for card in scene.cards),
            *(_line(line) for line in scene.lines),
            *(_box(box, alone=_stage_of(box.path) in removed) for box in scene.boxes),
            *(part for gauge in scene.gauges for part in _gauge(gauge)),
            *(_text(text) for text in scene.texts),
            "</svg>\n",
        )
    )
    return document.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _stage_of(path: str) -> str:
    """Return the selector of the stage that a module path lies in; a sampler lies between the cards."""
    parts = path.split(".")
    if parts[0] == "mid_block":
        return "mid"
    return f"{parts[0].removesuffix('_blocks')}.{parts[1]}" if len(parts) > 1 else ""


def _card(card: Card) -> str:
    shape = f'<rect class="card {card.fate}" {_sides(card.rect)} rx="{_number(CARD_RADIUS)}"/>'
    labels = "".join(map(_text, card.labels))
    return f"<g data-part={_quoted(card.name)}>{shape}{labels}</g>"


def _box(box: Box, *, alone: bool) -> str:
    kind = "sampler" if box.shape in ("down", "up") else box.shape
    classes = f"node {kind} {box.fate}" if box.path else f"node legend {kind} {box.fate}"
    inside = "".join(map(_text, box.labels)) + "".join(_cells(box))
    shape = _outline(box, classes)
    if not box.path:
        return shape
    on_page = ' class="gone"' if alone or box.shape in ("down", "up") else ""
    title = f"<title>{_escaped(box.tooltip)}</title>"
    return f'<g{on_page} data-path={_quoted(box.path)} data-fate="{box.fate}">{title}{shape}{inside}</g>'


def _outline(box: Box, classes: str) -> str:
    rect = box.rect
    if box.shape in RADII:
        return f'<rect class="{classes}" {_sides(rect)} rx="{_number(RADII[box.shape])}"/>'
    slant = min(SLANT, rect.width / 4)
    above, below = (0.0, slant) if box.shape == "down" else (slant, 0.0)
    corners = (
        (rect.x + above, rect.y),
        (rect.right - above, rect.y),
        (rect.right - below, rect.bottom),
        (rect.x + below, rect.bottom),
    )
    return f'<path class="{classes}" d="M{" L".join(map(_point, corners))} Z"/>'


def _cells(box: Box) -> Iterator[str]:
    """Yield one small cell a transformer block along the lower edge, hollow where it is removed."""
    if not box.cells:
        return
    count = len(box.cells)
    room = box.rect.width - 2 * CELL_INSET
    width = (room - CELL_GAP * (count - 1)) / count
    for k, kept in enumerate(box.cells):
        cell = Rect(
            box.rect.x + CELL_INSET + k * (width + CELL_GAP), box.rect.bottom - CELL_HEIGHT - 3, width, CELL_HEIGHT
        )
        yield f'<rect class="{"cell" if kept else "cell out"}" {_sides(cell)}/>'


def _line(line: Line) -> str:
    kind = "flow" if line.kind == "flow" else f"skip {line.kind}"
    start = line.points[0]
    ends = f" data-from={_quoted(line.source)} data-to={_quoted(line.target)}" if line.target else ""
    path = f'<path class="{kind}"{ends} d="{_course(line.points)}"/>'
    if line.kind == "flow":
        return path + _head(line.points[-2], line.points[-1])
    if line.kind == "moved":
        x, y = start[0] + DOT_RADIUS, start[1]  # beside its box, not under it
        return f'{path}<circle class="dot" cx="{_number(x)}" cy="{_number(y)}" r="{_number(DOT_RADIUS)}"/>'
    return path


def _course(points: tuple[Point, ...]) -> str:
    """Return a path through two points, or along a curve that four points give; a fifth leads straight to it."""
    text = list(map(_point, points))
    lead = "" if len(points) < 5 else f"M{text.pop(0)} "
    return f"{lead}{'L' if lead else 'M'}{text[0]} {'L' if len(text) == 2 else 'C'}{' '.join(text[1:])}"


def _head(before: Point, tip: Point) -> str:
    """Return an arrowhead at ``tip``, coming from ``before``."""
    dx, dy = tip[0] - before[0], tip[1] - before[1]
    length = hypot(dx, dy) or 1.0
    dx, dy = dx / length, dy / length
    base = (tip[0] - dx * HEAD_LENGTH, tip[1] - dy * HEAD_LENGTH)
    corners = (
        tip,
        (base[0] - dy * HEAD_HALF, base[1] + dx * HEAD_HALF),
        (base[0] + dy * HEAD_HALF, base[1] - dx * HEAD_HALF),
    )
    return f'<path class="head" d="M{" L".join(map(_point, corners))} Z"/>'


def _gauge(gauge: Gauge) -> Iterator[str]:
    rect = gauge.rect
    filled = Rect(rect.x, rect.y, rect.width * min(max(gauge.share, 0.0), 1.0), rect.height)
    yield f'<rect class="track" {_sides(rect)} rx="{_number(rect.height / 2)}"/>'
    yield f'<rect class="filled" {_sides(filled)} rx="{_number(rect.height / 2)}"/>'


ON_NODES = ("resnet", "attention", "sampler", "conv")


def _text(text: Text) -> str:
    role = f"on-{text.role}" if text.role in ON_NODES else text.role
    classes = f"{role} bold" if text.bold else role
    anchor = "" if text.anchor == "start" else f' text-anchor="{text.anchor}"'
    place = f'x="{_number(text.x)}" y="{_number(text.y)}" font-size="{_number(text.size)}"'
    return f'<text class="{classes}" {place}{anchor}>{_escaped(text.content)}</text>'


def _sides(rect: Rect) -> str:
    names = (("x", rect.x), ("y", rect.y), ("width", rect.width), ("height", rect.height))
    return " ".join(f'{name}="{_number(value)}"' for name, value in names)


def _point(point: Point) -> str:
    return f"{_number(point[0])},{_number(point[1])}"


def _number(value: float) -> str:
    """Return a coordinate to a hundredth of a pixel, without trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _escaped(content: str) -> str:
    return html.escape(content, quote=False)


def _quoted(value: str) -> str:
    """Return an attribute's value in its quotes. (xml.sax.saxutils does the same, and imports an HTTP client.)"""
    return f'"{html.escape(value)}"'
