"""Feature pairs by similarity: each layer of the student with the layer of the teacher that it is most like.

Our reading of the "similarity-based layer match" of OFA-SD's stage 3, whose card gives no formula: linear CKA on
calibration batches, and the assignment in order that maximises its sum. Chosen once, before training, then frozen.

B batch, C channels, H height, W width; N rows (batch × positions); S student taps, K teacher taps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from unet_surgery.distill.pairs import stride_of
from unet_surgery.errors import RunError
from unet_surgery.lower.features import FeaturePair, Tap
from unet_surgery.runtime.taps import Tapped

__all__ = ["Similarity", "layer_taps", "linear_cka", "match_layers", "monotone_assignment"]


@dataclass(frozen=True, slots=True)
class Similarity:
    """The pairs that were chosen and the CKA of every student tap with every teacher tap: NaN where shapes differ."""

    pairs: tuple[FeaturePair, ...]
    student: tuple[Tap, ...]
    teacher: tuple[Tap, ...]
    cka_SK: Tensor


def match_layers(student: nn.Module, teacher: nn.Module, batches: Iterable[Sequence[Any]]) -> Similarity:
    """Return the layers of ``student`` paired with those of ``teacher`` by linear CKA over all rows of ``batches``.

    A batch holds the forward's arguments: latents [B, C, H, W], timesteps [B], embeddings [B, T, D]. The networks stay
    in the mode and on the device they are in. Meant for a student that still holds the teacher's weights.

    Raises:
        RunError: there are no batches, or no two layers have the same shape.
    """
    ours, theirs = layer_taps(student), layer_taps(teacher)
    tapped_student, tapped_teacher = Tapped(student, ours), Tapped(teacher, theirs)
    sums: _Sums | None = None
    channels: list[int] = []
    try:
        for batch in batches:
            with torch.no_grad():
                here, there = tapped_student(*batch)[1], tapped_teacher(*batch)[1]
            if sums is None:
                channels = [feature.shape[1] for feature in here]
                sums = _Sums(len(ours), len(theirs), _same_shapes(here, there))
            sums.add(here, there)
    finally:
        tapped_student.release()
        tapped_teacher.release()
    if sums is None:
        raise RunError("pairs by similarity need calibration batches, and there are none", where="pairs: similarity")
    cka_SK = sums.cka()
    matches = monotone_assignment(cka_SK)
    if not matches:
        raise RunError("no layer of the student has the shape of one of the teacher's", where="pairs: similarity")
    levels = sum(1 for _ in student.get_submodule("down_blocks").children())
    pairs = tuple(FeaturePair(ours[s], theirs[k], channels[s], stride_of(ours[s].module, levels)) for s, k in matches)
    return Similarity(pairs, ours, theirs, cka_SK)


def layer_taps(unet: nn.Module) -> tuple[Tap, ...]:
    """Return the output of every layer, and of the mid, in the order in which they run.

    A layer is a resnet with its attention, what ``layers_per_block`` counts and surgery removes; its output is the
    residual stream behind it. Stage outputs would leave nothing to choose (one of each shape a side), and every resnet
    and attention apart twice the memory for nearly the same features.
    """
    taps = []
    for side in ("down_blocks", "mid_block", "up_blocks"):
        if side == "mid_block":
            taps += [Tap("mid_block")] if getattr(unet, "mid_block", None) is not None else []
            continue
        for name, stage in unet.get_submodule(side).named_children():
            kind = "attentions" if hasattr(stage, "attentions") else "resnets"
            taps += [Tap(f"{side}.{name}.{kind}.{j}") for j, _ in enumerate(stage.get_submodule(kind).children())]
    return tuple(taps)


def linear_cka(x_NC: Tensor, y_NC: Tensor) -> Tensor:
    """Return the linear CKA of two sets of features of the same N rows (arXiv 1905.00414, section 3, linear kernel).

    ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of centred columns, from 0 to 1; it is blind to rotations, to scale and to the columns'
    order. 0 where one side is constant.
    """
    x, y = (features.double() - features.double().mean(0) for features in (x_NC, y_NC))
    return _ratio((y.T @ x).square().sum(), (x.T @ x).norm(), (y.T @ y).norm())


def monotone_assignment(scores_SK: Tensor) -> tuple[tuple[int, int], ...]:
    """Return pairs (s, k), both strictly growing, whose finite scores sum to the most; NaN can not be paired.

    Scores are not negative. Dynamic programming over prefixes, as one aligns two sequences; of equal sums the one that
    uses the earliest rows and columns.
    """
    scores: list[list[float]] = scores_SK.tolist()
    rows, columns = scores_SK.shape
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]  # of the rows from s on and the columns from k on
    for s, k in product(reversed(range(rows)), reversed(range(columns))):
        skipped = max(best[s + 1][k], best[s][k + 1])
        best[s][k] = max(skipped, scores[s][k] + best[s + 1][k + 1])  # in this order: max keeps its first beside a NaN
    pairs, s, k = [], 0, 0
    while s < rows and k < columns:
        if scores[s][k] + best[s + 1][k + 1] == best[s][k]:
            pairs.append((s, k))
            s, k = s + 1, k + 1
        elif best[s][k + 1] == best[s][k]:
            k += 1
        else:
            s += 1
    return tuple(pairs)


class _Sums:
    """Sums over rows that the CKA of every pair needs; in fp64, so that the means can be taken out afterwards."""

    def __init__(self, num_student: int, num_teacher: int, alike: list[tuple[int, int]]) -> None:
        self._shape = (num_student, num_teacher)
        self._alike = alike
        self._student: dict[int, Tensor] = {}
        self._teacher: dict[int, Tensor] = {}
        self._products: dict[tuple[int, int], Tensor] = {}

    def add(self, here: Sequence[Tensor], there: Sequence[Tensor]) -> None:
        """Add the features of one batch, [B, C, H, W] each."""
        x = {s: _rows(here[s]) for s in {s for s, _ in self._alike}}
        y = {k: _rows(there[k]) for k in {k for _, k in self._alike}}
        for sums, features in ((self._student, x), (self._teacher, y)):
            for i, rows in features.items():
                sums[i] = sums.get(i, 0.0) + rows.T @ rows
        for s, k in self._alike:
            self._products[s, k] = self._products.get((s, k), 0.0) + y[k].T @ x[s]

    def cka(self) -> Tensor:
        """Return the CKA of every pair [S, K], fp64 on the CPU, NaN where shapes differ."""
        cka_SK = torch.full(self._shape, float("nan"), dtype=torch.float64)
        own = {s: _centred(t).norm() for s, t in self._student.items()}
        other = {k: _centred(t).norm() for k, t in self._teacher.items()}
        for (s, k), products in self._products.items():
            cka_SK[s, k] = _ratio(_centred(products).square().sum(), own[s], other[k])
        return cka_SK


def _rows(feature_BCHW: Tensor) -> Tensor:
    """Return [N, 1 + C] in fp64: a column of ones, whose products are the number of rows and the columns' sums."""
    rows = feature_BCHW.movedim(1, -1).flatten(0, -2).double()
    return torch.cat([rows.new_ones(len(rows), 1), rows], 1)


def _centred(products: Tensor) -> Tensor:
    """Return Yᵀ X of the centred columns, from the products of rows that begin with a one."""
    return products[1:, 1:] - products[1:, :1] @ products[:1, 1:] / products[0, 0]


def _ratio(cross: Tensor, own: Tensor, other: Tensor) -> Tensor:
    scale = own * other
    return torch.where(scale > 0, cross / scale, torch.zeros_like(scale))


def _same_shapes(here: Sequence[Tensor], there: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(s, k) for s, k in product(range(len(here)), range(len(there))) if here[s].shape == there[k].shape]
