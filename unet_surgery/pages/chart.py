"""Curves and bars as inline SVG, without scripts; the colours are classes of the page's stylesheet.

Text is never smaller than on the page around it: a chart keeps its own height and takes the page's width by its
``viewBox``; labels of bars and the legend of curves are HTML beside the drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, isfinite, log10

from unet_surgery.pages.markup import markup
from unet_surgery.picture.palette import FONTS

__all__ = ["NUM_TONES", "STANDALONE", "Curve", "curves_svg", "standalone_svg", "tick_label", "ticks", "tone_class"]

WIDTH, HEIGHT = 640.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 16.0, 12.0, 36.0
NUM_TONES = 4
MAX_POINTS = 600
NUM_TICKS = 5
STANDALONE = (
    f"text{{font:12px {FONTS};fill:#57626d}}.rule{{stroke:#e3e7eb;fill:none}}"
    ".curve{fill:none;stroke-width:2;stroke-linejoin:round}.tone-0{stroke:#2f6fb0}"
    ".tone-1{stroke:#b3590f;stroke-dasharray:7 3}.tone-2{stroke:#2d7d46;stroke-dasharray:2 3}"
    ".tone-3{stroke:#a3246f;stroke-dasharray:10 3 2 3}"
    "@media (prefers-color-scheme:dark){text{fill:#a3afbb}.rule{stroke:#2c353f}.tone-0{stroke:#6fb1f2}"
    ".tone-1{stroke:#f0a35e}.tone-2{stroke:#6fcf8f}.tone-3{stroke:#f08cc4}}"
)


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line: ``values`` at ``steps``; values that are not finite (and, on a log axis, not positive) are gaps.

    ``tone`` is its colour, 0 … 3, as bars have theirs by their place; None: by the curve's place too.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    tone: int | None = None


def tone_class(curve: Curve, place: int) -> str:
    """Return the class that gives ``curve``, the ``place``-th, its colour and dashes."""
    return f"tone-{(place if curve.tone is None else curve.tone) % NUM_TONES}"


@dataclass(frozen=True, slots=True)
class _Axes:
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        height = log10(value) if self.log else value
        return HEIGHT - BOTTOM - (height - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def curves_svg(curves: Sequence[Curve], *, title: str, x_label: str, log: bool) -> str:
    """Return ``curves`` in one frame; each tone has a dash pattern too."""
    points = [_points(curve, log=log) for curve in curves]
    flat = [point for line in points for segment in line for point in segment]
    if not flat:
        return '<p class="note">no values</p>'
    first, last = min(x for x, _ in flat), max(x for x, _ in flat)
    low, high = min(y for _, y in flat), max(y for _, y in flat)
    y_ticks = _log_ticks(low, high) if log else ticks(low, high)
    axes = _Axes(
        (first, last if last > first else first + 1),
        (log10(y_ticks[0]), log10(y_ticks[-1])) if log else (y_ticks[0], y_ticks[-1]),
        log,
    )
    parts = [f'<svg class="chart" role="img" viewBox="0 0 {WIDTH:g} {HEIGHT:g}"><title>{markup(title)}</title>']
    for tick in y_ticks:
        y = axes.y(tick)
        parts.append(f'<path class="rule" d="M{LEFT:g},{y:.1f}H{WIDTH - RIGHT:g}"/>')
        parts.append(f'<text x="{LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    for tick in ticks(first, last):
        if axes.x_range[0] <= tick <= axes.x_range[1]:
            x, y = axes.x(tick), HEIGHT - BOTTOM + 18
            parts.append(f'<text x="{x:.1f}" y="{y:g}" text-anchor="middle">{tick_label(tick)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT:g}" y="{HEIGHT - 3:g}" text-anchor="end">{markup(x_label)}</text>')
    for k, line in enumerate(points):
        course = "".join(
            "M" + " L".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in segment) for segment in line if segment
        )
        parts.append(f'<path class="curve {tone_class(curves[k], k)}" d="{course}"/>')
    return "".join([*parts, "</svg>"])


def standalone_svg(curves: Sequence[Curve], *, title: str, x_label: str, log: bool) -> str:
    """Return ``curves`` as an SVG file of its own, with its legend, light or dark as the reader prefers."""
    chart = curves_svg(curves, title=title, x_label=x_label, log=log)
    if not chart.startswith("<svg"):
        text = '<text x="20" y="40">no values</text>'
        chart = f'<svg class="chart" role="img" viewBox="0 0 {WIDTH:g} {HEIGHT:g}">{text}</svg>'
    place, legend = LEFT, []
    for k, curve in enumerate(curves):
        tone = tone_class(curve, k)
        legend.append(f'<path class="curve {tone}" d="M{place:g},-10h28"/>')
        legend.append(f'<text x="{place + 34:g}" y="-6">{markup(curve.name)}</text>')
        place += 34 + 7 * len(curve.name) + 24
    head, _, rest = chart.partition(">")
    head = head.replace(f'viewBox="0 0 {WIDTH:g} {HEIGHT:g}"', f'viewBox="0 -24 {WIDTH:g} {HEIGHT + 24:g}"')
    head = head.replace("<svg", f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:g}" height="{HEIGHT + 24:g}"')
    return f"{head}><style>{STANDALONE}</style>{''.join(legend)}{rest}\n"


def _points(curve: Curve, *, log: bool) -> list[list[tuple[float, float]]]:
    """Return the curve's segments between gaps; of a long curve, the mean of each run of neighbours."""
    if len(curve.steps) != len(curve.values):
        raise ValueError(f"{len(curve.steps)} steps and {len(curve.values)} values")
    segments: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(curve.steps, curve.values, strict=True):
        if isfinite(y) and isfinite(x) and (y > 0 or not log):
            segments[-1].append((float(x), float(y)))
        elif segments[-1]:
            segments.append([])
    stride = ceil(len(curve.steps) / MAX_POINTS) or 1
    return [[_mean(s[k : k + stride]) for k in range(0, len(s), stride)] for s in segments]


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers, evenly spaced, from at most ``low`` to at least ``high``."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** floor(log10(span / NUM_TICKS))
    step = next(power * k for k in (1, 2, 5, 10) if span / (power * k) <= NUM_TICKS)
    first, last = floor(low / step), max(ceil(high / step), floor(low / step) + 1)
    return [k * step for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 times powers of ten around the range; powers of ten alone where it is wide."""
    factors = (1, 2, 5) if high / low < 100 else (1,)
    powers = range(floor(log10(low)) - 1, ceil(log10(high)) + 2)
    marks = [k * 10.0**power for power in powers for k in factors]
    below = max((m for m in marks if m <= low), default=marks[0])
    above = min((m for m in marks if m >= high and m > below), default=inf)
    return [m for m in marks if below <= m <= above]


def tick_label(value: float) -> str:
    text = f"{value:.4g}"
    return text if "e" in text or abs(value) < 10_000 else f"{value:,.0f}"
