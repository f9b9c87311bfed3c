"""The U itself: down stages descend on the left, up stages rise on the right, the mid lies between them below."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from unet_surgery.graph import Stem
from unet_surgery.lower import quantity
from unet_surgery.picture.boxes import RESNET_WIDTH, attention_box, conv_box, resnet_box, sampler_box
from unet_surgery.picture.fate import StageFate, Surgery
from unet_surgery.picture.rows import CARD_PAD, EMPTY_HEIGHT, FLOW, ROW_HEIGHT, SAMPLER_HEIGHT, Rows, place_rows
from unet_surgery.picture.scene import Box, Card, Line, Point, Rect, Text
from unet_surgery.picture.textsize import text_width

__all__ = ["MARGIN", "WIDTH", "Drawn", "draw_u"]

WIDTH = 920.0
MARGIN = 20.0
LABEL_PAD = 12.0
LABEL_WIDTH = 120.0
LABEL_LINE = 13.5
BOX_GAP = 6.0
ATTENTION_WIDTH = 124.0
LAYER_WIDTH = RESNET_WIDTH + BOX_GAP + ATTENTION_WIDTH
INDENT, MAX_INDENT = 18.0, 54.0
MID_SPACE = 34.0
MID_HEAD = 30.0
TURN_DEPTH = 26.0
NAME_SIZE, LABEL_SIZE = 13.0, 11.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """The cards, boxes, lines and texts of a U, and where it ends."""

    cards: tuple[Card, ...]
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    texts: tuple[Text, ...]
    bottom: float


def draw_u(surgery: Surgery, top: float) -> Drawn:
    """Lay out ``surgery`` in :data:`WIDTH` pixels, from ``top`` downwards."""
    rows = place_rows(surgery, top + ROW_HEIGHT + FLOW + CARD_PAD)
    columns = _Columns(len(surgery.down))
    cards = [*_down_cards(surgery, rows, columns), *_up_cards(surgery, rows, columns)]
    boxes = [*_stem_boxes(surgery, rows, columns), *_down_boxes(surgery, rows, columns)]
    boxes += _up_boxes(surgery, rows, columns)
    bottom = rows.bottom + TURN_DEPTH
    if surgery.mid is not None:
        mid = _mid_card(surgery.mid, rows.bottom + MID_SPACE)
        cards.append(mid)
        boxes += _mid_boxes(surgery.mid, mid.rect)
        bottom = mid.rect.bottom
    lines = (*_flows(surgery, cards, boxes), *_skips(surgery, boxes, columns))
    return Drawn(tuple(cards), tuple(boxes), lines, tuple(_stem_texts(surgery, rows, columns)), bottom)


class _Columns:
    """Where the resnets of each level begin: the deeper the level, the nearer to the middle."""

    def __init__(self, num_levels: int) -> None:
        self._indent = min(INDENT, MAX_INDENT / max(num_levels - 1, 1))
        self._last = num_levels - 1

    def down(self, index: int) -> float:
        return MARGIN + LABEL_PAD + LABEL_WIDTH + BOX_GAP + index * self._indent

    def up(self, index: int) -> float:
        return WIDTH - self.down(self._last - index) - LAYER_WIDTH

    def down_card(self, index: int, top: float, bottom: float) -> Rect:
        return Rect(MARGIN, top, self.down(index) + LAYER_WIDTH + CARD_PAD - MARGIN, bottom - top)

    def up_card(self, index: int, top: float, bottom: float) -> Rect:
        left = self.up(index) - CARD_PAD
        return Rect(left, top, WIDTH - MARGIN - left, bottom - top)


def _down_cards(surgery: Surgery, rows: Rows, columns: _Columns) -> Iterator[Card]:
    above = rows.conv_in
    for i, (stage, tops) in enumerate(zip(surgery.down, rows.down, strict=True)):
        if stage.layers:
            top, bottom = tops[0] - CARD_PAD, tops[len(stage.layers) - 1] + ROW_HEIGHT + CARD_PAD
        else:
            top = above + ROW_HEIGHT + FLOW
            bottom = top + EMPTY_HEIGHT
        above = tops[-1] if tops else above
        rect = columns.down_card(i, top, bottom)
        yield Card(rect, stage.fate, stage.selector, _labels(stage, rect, MARGIN + LABEL_PAD, "start"))


def _up_cards(surgery: Surgery, rows: Rows, columns: _Columns) -> Iterator[Card]:
    for i, (stage, tops) in enumerate(zip(surgery.up, rows.up, strict=True)):
        rect = columns.up_card(i, tops[-1] - CARD_PAD, tops[0] + ROW_HEIGHT + CARD_PAD)
        yield Card(rect, stage.fate, stage.selector, _labels(stage, rect, WIDTH - MARGIN - LABEL_PAD, "end"))


def _labels(stage: StageFate, rect: Rect, x: float, side: Literal["start", "end"]) -> tuple[Text, ...]:
    """Return a stage's three lines, in the middle of its card's height."""
    first = rect.middle[1] - LABEL_LINE + 0.36 * NAME_SIZE
    return (
        Text(
            x, first, stage.selector, NAME_SIZE, "ghost-text" if stage.fate == "removed" else "plain", side, bold=True
        ),
        Text(x, first + LABEL_LINE, f"{stage.channels} channels", LABEL_SIZE, "muted", side),
        Text(x, first + 2 * LABEL_LINE, _sizes(stage), LABEL_SIZE, "muted", side),
    )


def _sizes(stage: StageFate) -> str:
    before, after = stage.before.params, stage.after.params
    return quantity(before) if before == after else f"{quantity(before)} → {quantity(after)}"


def _stem_boxes(surgery: Surgery, rows: Rows, columns: _Columns) -> Iterator[Box]:
    last = len(surgery.up) - 1
    yield conv_box(surgery.conv_in, columns.down(0), rows.conv_in, "conv_in")
    yield conv_box(surgery.conv_out, columns.up(last), rows.conv_in - CARD_PAD - FLOW - ROW_HEIGHT, "conv_out")


def _stem_texts(surgery: Surgery, rows: Rows, columns: _Columns) -> Iterator[Text]:
    stem: Stem = surgery.stem
    x, y = MARGIN + LABEL_PAD, rows.conv_in + ROW_HEIGHT / 2 - 2
    yield Text(x, y, "stem", NAME_SIZE, "plain", bold=True)
    yield Text(x, y + LABEL_LINE, quantity(surgery.stem_counts.params), LABEL_SIZE, "muted")
    above = rows.conv_in - BOX_GAP
    yield Text(columns.down(0), above, f"{stem.in_channels} → {stem.channels} channels", LABEL_SIZE, "muted")
    middle = above + BOX_GAP - CARD_PAD - FLOW - ROW_HEIGHT / 2 + 0.36 * LABEL_SIZE
    right = columns.up(len(surgery.up) - 1) + RESNET_WIDTH + 2 * BOX_GAP
    yield Text(right, middle, f"{stem.channels} → {stem.out_channels} channels", LABEL_SIZE, "muted")


def _down_boxes(surgery: Surgery, rows: Rows, columns: _Columns) -> Iterator[Box]:
    for i, (stage, tops) in enumerate(zip(surgery.down, rows.down, strict=True)):
        yield from _layer_boxes(stage, tops, columns.down(i))
        if stage.sampler is not None:
            inset = (ROW_HEIGHT - SAMPLER_HEIGHT) / 2
            rect = Rect(columns.down(i), tops[-1] + inset, RESNET_WIDTH, SAMPLER_HEIGHT)
            yield sampler_box(stage.sampler, rect, "down")


def _up_boxes(surgery: Surgery, rows: Rows, columns: _Columns) -> Iterator[Box]:
    for i, (stage, tops) in enumerate(zip(surgery.up, rows.up, strict=True)):
        yield from _layer_boxes(stage, tops, columns.up(i))
        if stage.sampler is not None:
            top = tops[-1] - CARD_PAD - FLOW - SAMPLER_HEIGHT
            yield sampler_box(stage.sampler, Rect(columns.up(i), top, RESNET_WIDTH, SAMPLER_HEIGHT), "up")


def _layer_boxes(stage: StageFate, tops: tuple[float, ...], x: float) -> Iterator[Box]:
    for layer, top in zip(stage.layers, tops, strict=False):  # a down stage's last row is its sampler's
        yield resnet_box(layer.resnet, Rect(x, top, RESNET_WIDTH, ROW_HEIGHT))
        if layer.attention is not None:
            rect = Rect(x + RESNET_WIDTH + BOX_GAP, top, ATTENTION_WIDTH, ROW_HEIGHT)
            yield attention_box(layer.attention, rect)


def _mid_card(mid: StageFate, top: float) -> Card:
    width = LABEL_PAD * 2 + LAYER_WIDTH + BOX_GAP + RESNET_WIDTH
    rect = Rect((WIDTH - width) / 2, top, width, MID_HEAD + ROW_HEIGHT + CARD_PAD)
    y, left, right = top + 20, rect.x + LABEL_PAD, rect.right - LABEL_PAD
    role = "ghost-text" if mid.fate == "removed" else "plain"
    beside = left + text_width(mid.selector, NAME_SIZE, bold=True) + BOX_GAP
    labels = (
        Text(left, y, mid.selector, NAME_SIZE, role, bold=True),
        Text(beside, y, f"{mid.channels} channels", LABEL_SIZE, "muted"),
        Text(right, y, _sizes(mid), LABEL_SIZE, "muted", "end"),
    )
    return Card(rect, mid.fate, mid.selector, labels)


def _mid_boxes(mid: StageFate, card: Rect) -> Iterator[Box]:
    """Yield resnet, attention, resnet, or what there is of them, in the middle of the card."""
    nodes = [
        (node, kind) for layer in mid.layers for node, kind in ((layer.resnet, "r"), (layer.attention, "a")) if node
    ]
    widths = [RESNET_WIDTH if kind == "r" else ATTENTION_WIDTH for _, kind in nodes]
    x = card.middle[0] - (sum(widths) + BOX_GAP * (len(widths) - 1)) / 2
    for (node, kind), width in zip(nodes, widths, strict=True):
        rect = Rect(x, card.y + MID_HEAD, width, ROW_HEIGHT)
        yield resnet_box(node, rect) if kind == "r" else attention_box(node, rect)
        x += width + BOX_GAP


def _skips(surgery: Surgery, boxes: list[Box], columns: _Columns) -> Iterator[Line]:
    places = {box.path: box.rect for box in boxes}
    for skip in surgery.skips:
        source, target = places[skip.source], places[skip.target]
        start, end = (source.right, source.middle[1]), (target.x, target.middle[1])
        points: tuple[Point, ...] = (start, end)
        if start[1] != end[1]:
            # level as far as attentions reach, so that it bends where no box hides it
            level = 0 if skip.source == "conv_in" else int(skip.source.split(".")[1])
            lead = columns.down(level) + LAYER_WIDTH
            bend = (lead + end[0]) / 2
            points = (start, (lead, start[1]), (bend, start[1]), (bend, end[1]), end)
        yield Line(skip.fate, points, skip.source, skip.target)


def _flows(surgery: Surgery, cards: list[Card], boxes: list[Box]) -> Iterator[Line]:
    """Yield the way of the hidden state through what the student keeps."""
    at = {card.name: card.rect for card in cards} | {box.path: box.rect for box in boxes}
    down = [stage for stage in surgery.down if stage.fate == "kept"]
    up = [stage for stage in surgery.up if stage.fate == "kept"]
    yield from _through([surgery.conv_in.path, *_stops(down)], at)
    yield from _bottom(at[down[-1].selector], at[up[0].selector], _kept_mid(surgery, at))
    yield from _through([*_stops(up), surgery.conv_out.path], at)


def _stops(stages: list[StageFate]) -> Iterator[str]:
    for stage in stages:
        yield stage.selector
        if stage.sampler is not None and stage.sampler.fate == "kept":
            yield stage.sampler.path


def _through(stops: list[str], at: dict[str, Rect]) -> Iterator[Line]:
    """Yield a vertical arrow from each stop to the next, in the column of the box among the two."""
    for a, b in pairwise(stops):
        here, there = at[a], at[b]
        x = min(here, there, key=lambda rect: rect.width).x + RESNET_WIDTH / 2
        ends = (here.bottom, there.y) if here.y < there.y else (here.y, there.bottom)
        yield Line("flow", ((x, ends[0]), (x, ends[1])), a, b)


def _kept_mid(surgery: Surgery, at: dict[str, Rect]) -> Rect | None:
    return at["mid"] if surgery.mid is not None and surgery.mid.fate == "kept" else None


def _bottom(down: Rect, up: Rect, mid: Rect | None) -> Iterator[Line]:
    """Yield the turn from the deepest kept down stage into the up side, through the mid where it is kept."""
    start, end = (down.right, down.bottom - CARD_PAD), (up.x, up.bottom - CARD_PAD)
    if mid is None:
        low = max(start[1], end[1]) + TURN_DEPTH
        yield Line("flow", (start, (start[0] + TURN_DEPTH, low), (end[0] - TURN_DEPTH, low), end))
        return
    left, right = WIDTH / 2 - TURN_DEPTH, WIDTH / 2 + TURN_DEPTH
    yield Line("flow", (start, (left, start[1]), (left, start[1]), (left, mid.y)))
    yield Line("flow", ((right, mid.y), (right, end[1]), (right, end[1]), end))
