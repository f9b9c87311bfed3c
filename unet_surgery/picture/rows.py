"""The heights of a U: one row for every skip, so that a teacher's skips are all level.

The outputs of the down side, top to bottom, and the layers of the up side, top to bottom, are as many as there are
skips, and the k-th of one feeds the k-th of the other. So both sides share rows, and only the space between two rows
has to suit both: a gap where both rows lie in one stage, room for two stages' edges where a stage ends between them,
and for an upsampler where an up stage does.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from unet_surgery.picture.fate import StageFate, Surgery

__all__ = ["CARD_PAD", "EMPTY_HEIGHT", "FLOW", "ROW_HEIGHT", "SAMPLER_HEIGHT", "Rows", "place_rows"]

ROW_HEIGHT = 26.0
ROW_GAP = 6.0
CARD_PAD = 11.0
FLOW = 13.0
"""The length of an arrow between two parts."""
SAMPLER_HEIGHT = 20.0
EMPTY_HEIGHT = 48.0
"""Of the card of a stage without layers: room for its label."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A row's occupant on one side: the number of its stage (none for conv_in), and whether a card surrounds it."""

    stage: int
    in_card: bool


@dataclass(frozen=True, slots=True)
class Rows:
    """The tops of the rows, in the order of the forward pass.

    ``down[i]`` has one for each layer of stage ``i`` and one for its sampler, ``up[i]`` one for each layer.
    """

    conv_in: float
    down: tuple[tuple[float, ...], ...]
    up: tuple[tuple[float, ...], ...]
    bottom: float
    """Where the lower of the two deepest cards ends."""


def place_rows(surgery: Surgery, top: float) -> Rows:
    """Return the rows of ``surgery``; the first begins at ``top``."""
    left = [_Place(-1, False)]
    for i, stage in enumerate(surgery.down):
        left += [_Place(i, True)] * len(stage.layers)
        left += [_Place(i, False)] * (stage.sampler is not None)
    right = [_Place(i, True) for i in reversed(range(len(surgery.up))) for _ in surgery.up[i].layers]
    tops = [top]
    for (a, b), (c, d) in zip(pairwise(left), pairwise(right), strict=True):
        tops.append(tops[-1] + ROW_HEIGHT + max(_left_gap(a, b), _right_gap(c, d)))
    end = tops[-1] + ROW_HEIGHT + CARD_PAD
    if not surgery.down[-1].layers:
        end = max(end, tops[-1] + ROW_HEIGHT + FLOW + EMPTY_HEIGHT)
    return Rows(top, _deal(tops[1:], surgery.down), _deal(tops[::-1], surgery.up), end)


def _deal(tops: list[float], stages: tuple[StageFate, ...]) -> tuple[tuple[float, ...], ...]:
    """Cut ``tops`` into one tuple a stage; only a down stage's sampler has a row of its own."""
    dealt, start = [], 0
    for stage in stages:
        end = start + len(stage.layers) + (stage.selector.startswith("down") and stage.sampler is not None)
        dealt.append(tuple(tops[start:end]))
        start = end
    return tuple(dealt)


def _left_gap(a: _Place, b: _Place) -> float:
    if a.in_card and b.in_card:
        return ROW_GAP
    if not a.in_card and not b.in_card:  # the stage between them has no layers
        return FLOW + EMPTY_HEIGHT + FLOW
    return FLOW + CARD_PAD


def _right_gap(a: _Place, b: _Place) -> float:
    return ROW_GAP if a.stage == b.stage else CARD_PAD + FLOW + SAMPLER_HEIGHT + FLOW + CARD_PAD
