"""What stands around the U: the header with sizes before and after, and the legend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unet_surgery.errors import printable
from unet_surgery.lower import SurgeryPlan, quantity
from unet_surgery.picture.fate import Fate, Surgery
from unet_surgery.picture.layout import MARGIN, WIDTH
from unet_surgery.picture.scene import Box, Gauge, Line, Rect, Shape, Text
from unet_surgery.picture.textsize import fit, text_width

__all__ = ["HEADER_HEIGHT", "LEGEND_HEIGHT", "Header", "Legend", "draw_header", "draw_legend", "percentage", "subject"]

HEADER_HEIGHT = 104.0
LEGEND_HEIGHT = 24.0
TITLE_SIZES = (22.0, 19.0, 16.0, 14.0)
SUBTITLE_SIZE, SMALL, FIGURE = 13.0, 11.0, 15.0
GAUGE_WIDTH, GAUGE_GAP = 200.0, 28.0
SAMPLE = Rect(0, 0, 26, 14)
ENTRY_GAP = 18.0


@dataclass(frozen=True, slots=True)
class Header:
    """The texts and gauges above the U."""

    texts: tuple[Text, ...]
    gauges: tuple[Gauge, ...]


@dataclass(frozen=True, slots=True)
class Legend:
    """The samples below the U, and what they are called; its height depends on how many rows they need."""

    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    texts: tuple[Text, ...]
    bottom: float


def subject(plan: SurgeryPlan) -> tuple[str, str]:
    """Return the recipe's name (empty where nothing is removed by one) and the teacher, both safe to print."""
    name = printable(plan.recipe.get("name") or "")
    return name, "a local teacher" if plan.teacher_id == "local" else printable(plan.teacher_id)


def percentage(before: int, after: int) -> str:
    """Return the relative change: ``−62.4%``."""
    return f"{after / before - 1:+.1%}".replace("-", "−") if before else "–"


def draw_header(plan: SurgeryPlan, surgery: Surgery) -> Header:
    """Return title, teacher and sizes, in the upper :data:`HEADER_HEIGHT` pixels."""
    sizes = (
        ("parameters", plan.teacher.params, plan.student.params),
        ("MACs, conv + linear", plan.teacher.macs, plan.student.macs),
    )
    texts: list[Text] = []
    gauges: list[Gauge] = []
    first = WIDTH - MARGIN - len(sizes) * GAUGE_WIDTH - (len(sizes) - 1) * GAUGE_GAP
    for k, (label, before, after) in enumerate(sizes):
        x = first + k * (GAUGE_WIDTH + GAUGE_GAP)
        texts += _size(label, before, after, x)
        if before != after:
            gauges.append(Gauge(Rect(x, 76, GAUGE_WIDTH, 6), after / before))
    return Header((*_titles(plan, surgery, first - GAUGE_GAP - MARGIN), *texts), tuple(gauges))


def _titles(plan: SurgeryPlan, surgery: Surgery, room: float) -> Iterator[Text]:
    recipe, teacher = subject(plan)
    title = recipe or teacher
    size = next((s for s in TITLE_SIZES if text_width(title, s, bold=True) <= room), TITLE_SIZES[-1])
    yield Text(MARGIN, 46, fit(title, size, room, bold=True), size, "plain", bold=True)
    height, width = surgery.latent_size
    levels = f"{len(surgery.down)} level" + ("s" if len(surgery.down) > 1 else "")
    facts = f"{levels}, native latent {height} × {width}"
    if recipe:
        yield Text(MARGIN, 66, fit(f"of {teacher}", SUBTITLE_SIZE, room), SUBTITLE_SIZE, "muted")
    yield Text(MARGIN, 84 if recipe else 66, facts, SMALL, "muted")


def _size(label: str, before: int, after: int, x: float) -> Iterator[Text]:
    yield Text(x, 42, label, SMALL, "muted")
    if before != after:
        yield Text(x + GAUGE_WIDTH, 42, percentage(before, after), SMALL, "plain", "end", bold=True)
    figures = quantity(before) if before == after else f"{quantity(before)} → {quantity(after)}"
    yield Text(x, 64, figures, FIGURE, "plain", bold=True)


def draw_legend(surgery: Surgery, boxes: tuple[Box, ...], top: float) -> Legend:
    """Return a sample of every kind of thing that is drawn."""
    laid: list[tuple[_Entry, float, float]] = []
    x, y = MARGIN, top
    for entry in _entries(surgery, boxes):
        width = SAMPLE.width + 6 + text_width(entry.name, SMALL)
        if x > MARGIN and x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + LEGEND_HEIGHT
        laid.append((entry, x, y))
        x += width + ENTRY_GAP
    middles = [(entry, x, y + SAMPLE.height / 2) for entry, x, y in laid]
    return Legend(
        boxes=tuple(
            Box(Rect(x, y, SAMPLE.width, SAMPLE.height), e.shape, e.fate) for e, x, y in laid if isinstance(e, _Shape)
        ),
        lines=tuple(_sample_line(e, x, y) for e, x, y in middles if isinstance(e, _Stroke)),
        texts=tuple(Text(x + SAMPLE.width + 6, y + 0.36 * SMALL, e.name, SMALL, "muted") for e, x, y in middles),
        bottom=y + SAMPLE.height,
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    name: str
    shape: Shape
    fate: Fate = "kept"


@dataclass(frozen=True, slots=True)
class _Stroke:
    name: str
    kind: str


_Entry = _Shape | _Stroke


def _entries(surgery: Surgery, boxes: tuple[Box, ...]) -> Iterator[_Entry]:
    shapes, fates = {box.shape for box in boxes}, {box.fate for box in boxes}
    kinds = {skip.fate for skip in surgery.skips}
    deep = any(len(box.labels) > 1 for box in boxes)
    yield _Shape("resnet", "resnet")
    if "attention" in shapes:
        yield _Shape("attention (×: transformer blocks)" if deep else "attention", "attention")
    if shapes & {"down", "up"}:
        yield _Shape("sampler", "down")
    yield _Stroke("skip", "kept")
    if "moved" in kinds:
        yield _Stroke("skip with a new source", "moved")
    if "removed" in fates:
        yield _Shape("removed", "resnet", "removed")
    if "bypassed" in fates:
        yield _Shape("bypassed", "attention", "bypassed")


def _sample_line(entry: _Stroke, x: float, y: float) -> Line:
    if entry.kind == "kept":
        return Line("kept", ((x, y), (x + SAMPLE.width, y)))
    bend, high, low = x + SAMPLE.width / 2, y - 5, y + 5
    return Line("moved", ((x + 3, high), (bend, high), (bend, low), (x + SAMPLE.width, low)))
