"""Points in a plane as inline SVG: numbered, named where there is room, others' points of another shape than one's own.

The numbers lead to the table below the chart, so that nothing depends on colour, or on the names' fitting in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from unet_surgery.pages.chart import STANDALONE, tick_label, ticks
from unet_surgery.pages.markup import markup
from unet_surgery.picture.textsize import fit, text_width

__all__ = ["Point", "scatter_svg", "standalone_scatter"]

WIDTH, HEIGHT = 640.0, 360.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 16.0, 30.0, 52.0
PADDING = 0.08
RADIUS = 9.0
NAME_SIZE, NAME_ROOM = 12.0, 190.0
SCATTER = (
    ".axis{font-weight:600}.own circle{fill:#2f6fb0}.own text{fill:#fff}.others path{fill:#fff;stroke:#b3590f;"
    "stroke-width:1.5}.others text{fill:#b3590f}.mark text{font-size:11px}.spread{stroke:#57626d;stroke-width:1.5}"
    ".name{fill:#1b242d}"
)

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Point:
    """A named point, with the ends of its ± where it has one. ``kind`` says whose it is: measured, or published."""

    name: str
    x: float
    y: float
    kind: Literal["own", "published"] = "own"
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class _Axes:
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def scatter_svg(points: Sequence[Point], *, title: str, x_label: str, y_label: str) -> str:
    """Return ``points``, all finite and numbered from 1, in one frame.

    Raises:
        ValueError: there are none.
    """
    if not points:
        raise ValueError("no points")
    y_ends = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
    axes = _Axes(_padded([p.x for p in points]), _padded(y_ends))
    parts = [f'<svg class="chart" role="img" viewBox="0 0 {WIDTH:g} {HEIGHT:g}"><title>{markup(title)}</title>']
    parts += _frame(axes, x_label, y_label)
    places = [(axes.x(p.x), axes.y(p.y)) for p in points]
    for point, (x, _) in zip(points, places, strict=True):
        if point.low is not None and point.high is not None:
            low, high = axes.y(point.low), axes.y(point.high)
            parts.append(f'<path class="spread" d="M{x:.1f},{low:.1f}V{high:.1f}"/>')
    numbered = list(zip(range(1, len(points) + 1), points, places, strict=True))
    numbered.sort(key=lambda item: item[1].kind == "own")  # drawn last, over the others
    parts += [_mark(number, point, x, y) for number, point, (x, y) in numbered]
    names = _names([p for _, p, _ in reversed(numbered)], [place for *_, place in reversed(numbered)])
    return "".join([*parts, *names, "</svg>"])


def standalone_scatter(points: Sequence[Point], *, title: str, x_label: str, y_label: str) -> str:
    """Return the same as an SVG file of its own, in the light palette; it says which points are published."""
    chart = scatter_svg(points, title=title, x_label=x_label, y_label=y_label)
    lines = [f"{k}  {p.name}{'' if p.kind == 'own' else ' (published)'}" for k, p in enumerate(points, 1)]
    rows = (len(lines) + 1) // 2
    height = HEIGHT + 40 + 18 * rows
    places = [(20 + 310 * (k // rows), HEIGHT + 24 + 18 * (k % rows)) for k in range(len(lines))]
    key = "".join(
        f'<text x="{x:g}" y="{y:g}">{markup(fit(line, 12, 300))}</text>'
        for (x, y), line in zip(places, lines, strict=True)
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:g}" height="{height + 24:g}"'
    body = chart.replace("<svg", head, 1).replace(
        f'viewBox="0 0 {WIDTH:g} {HEIGHT:g}">',
        f'viewBox="0 -24 {WIDTH:g} {height + 24:g}"><style>{STANDALONE}{SCATTER}</style>'
        f'<rect x="0" y="-24" width="{WIDTH:g}" height="{height + 24:g}" fill="#fff"/>'
        f'<text class="axis" x="8" y="-4">{markup(fit(title, 12, WIDTH - 40))}</text>',
        1,
    )
    return body.removesuffix("</svg>") + key + "</svg>\n"


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * PADDING or abs(high) * PADDING or 1.0
    return low - room, high + room


def _frame(axes: _Axes, x_label: str, y_label: str) -> list[str]:
    parts = []
    for tick in ticks(*axes.y_range):
        if axes.y_range[0] <= tick <= axes.y_range[1]:
            y = axes.y(tick)
            parts.append(f'<path class="rule" d="M{LEFT:g},{y:.1f}H{WIDTH - RIGHT:g}"/>')
            parts.append(f'<text x="{LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    for tick in ticks(*axes.x_range):
        if axes.x_range[0] <= tick <= axes.x_range[1]:
            x = axes.x(tick)
            parts.append(f'<path class="rule" d="M{x:.1f},{TOP:g}V{HEIGHT - BOTTOM:g}"/>')
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18:g}" text-anchor="middle">{tick_label(tick)}</text>'
            )
    parts.append(f'<text class="axis" x="8" y="16">{markup(y_label)}</text>')
    right = f'x="{WIDTH - RIGHT:g}" y="{HEIGHT - 10:g}" text-anchor="end"'
    return [*parts, f'<text class="axis" {right}>{markup(x_label)}</text>']


def _mark(number: int, point: Point, x: float, y: float) -> str:
    text = f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{number}</text>'
    said = f"<title>{markup(point.name)}{'' if point.kind == 'own' else ' (published)'}</title>"
    if point.kind == "own":
        return f'<g class="mark own">{said}<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS:g}"/>{text}</g>'
    r = RADIUS + 3
    corners = f"M{x:.1f},{y - r:.1f}L{x + r:.1f},{y:.1f}L{x:.1f},{y + r:.1f}L{x - r:.1f},{y:.1f}Z"
    return f'<g class="mark others">{said}<path d="{corners}"/>{text}</g>'


def _names(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[str]:
    """Write each name beside its mark where it covers nothing; one that finds no place is in the table only."""
    r = RADIUS + 4
    taken: list[Box] = [(x - r, y - r, x + r, y + r) for x, y in places]
    parts = []
    for point, (x, y) in zip(points, places, strict=True):
        text = fit(point.name, NAME_SIZE, NAME_ROOM)
        wide = text_width(text, NAME_SIZE)
        spots = ((x + r + 2, y + 4), (x - r - 2 - wide, y + 4), (x - wide / 2, y - r - 4), (x - wide / 2, y + r + 13))
        for left, base in spots:
            box = (left, base - NAME_SIZE + 1, left + wide, base + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 6 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                parts.append(f'<text class="name" x="{left:.1f}" y="{base:.1f}">{markup(text)}</text>')
                break
    return parts


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
