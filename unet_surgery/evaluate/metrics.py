"""The metrics: what each needs, what it is called, and the form in which scores are kept.

The name of a metric says how it was computed *and* with which weights: with others than the published ones the same
formula is called by its general name.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unet_surgery.checkpoint.scorecard import SCORES_FORMAT
from unet_surgery.errors import DataError, UsageError, printable
from unet_surgery.version import __version__

__all__ = ["METRICS", "Metric", "Score", "ScoreReport", "chosen_metrics"]

FORMAT_VERSION = 1

Network = Literal["inception", "clip", "hps", "hps-v2.1"]


@dataclass(frozen=True, slots=True)
class Metric:
    """``general`` is its name where the weights are not the published ones; ``error`` says what its ± is.

    ``label`` is its name where people read it.
    """

    name: str
    general: str
    label: str
    lower_is_better: bool
    network: Network | None
    implementation: str
    resize: str | None
    error: str
    min_pictures: int = 1
    reference: Literal["none", "moments", "pictures"] = "none"
    captions: bool = False

    def called(self, published: bool) -> str:
        return self.name if published else self.general


CROPPED = "shorter side to the model's by PIL's bicubic, middle cut out"
PADDED = "longer side to the model's, bicubic and antialiased (as torchvision since 0.17) in floating point, on black"
_HPS_ERROR = "standard deviation of the means of 80 pictures each"

METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "fid", "frechet-distance", "FID", True,
            "inception", "as pytorch-fid 0.3.0",
            "bilinear to 299×299, half-pixel centres, no antialiasing", "none", 2048, "moments",
        ),
        Metric(
            "is", "exp-class-information", "IS", False,
            "inception", "as torch-fidelity 0.4.0, 10 splits, shuffled with seed 2020",
            "TensorFlow 1's bilinear to 299×299", "standard deviation over 10 splits", 10,
        ),
        Metric(
            "kid", "kernel-distance", "KID", True,
            "inception",
            "as torch-fidelity 0.4.0, 100 subsets of 1000, cubic kernel, seed 2020",
            "TensorFlow 1's bilinear to 299×299", "standard deviation over 100 subsets", 1000, "pictures",
        ),
        Metric(
            "clip", "caption-cosine", "CLIP score", False,
            "clip", "mean cosine, as BK-SDM's script with open_clip", CROPPED,
            "standard error of the mean", captions=True,
        ),
        Metric(
            "hpsv2", "preference-cosine", "HPSv2", False,
            "hps", "100 · mean cosine, as hpsv2 1.2.0 under torchvision 0.17 or later, weights v2.0", PADDED,
            _HPS_ERROR, captions=True,
        ),
        Metric(
            "hpsv2.1", "preference-cosine-v2.1", "HPSv2.1", False,
            "hps-v2.1", "100 · mean cosine, as hpsv2 1.2.0 under torchvision 0.17 or later, weights v2.1",
            PADDED, _HPS_ERROR, captions=True,
        ),
        Metric(
            "toy", "toy", "share right", False,
            None, "share of pictures that the toy world's checker passes", None, "95 % Wilson interval",
            captions=True,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Score:
    """One number, its ±, and all that one has to know to compare it. ``interval`` is for what is not symmetric."""

    metric: str
    value: float
    error: float | None
    protocol: dict[str, Any]
    interval: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        shown = {"metric": self.metric, "value": self.value, "error": self.error}
        if self.interval is not None:
            shown["interval"] = list(self.interval)
        return {**shown, "protocol": self.protocol}


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """The scores of a folder of pictures. ``refused`` are the metrics that were asked for and not computed, and why."""

    images: dict[str, Any]
    scores: tuple[Score, ...]
    refused: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": SCORES_FORMAT,
            "format_version": FORMAT_VERSION,
            "unet_surgery": __version__,
            "images": self.images,
            "scores": [score.to_json() for score in self.scores],
            "refused": self.refused,
            "warnings": list(self.warnings),
        }


def chosen_metrics(
    names: Sequence[str], *, reference: str | Path | None = None, reference_resolution: int | None = None
) -> tuple[Metric, ...]:
    """Return the metrics of these names, each once, in the order given.

    Raises:
        UsageError: there is none, or no such metric (offers the nearest name); or one lacks the reference it needs.
    """
    chosen: dict[str, Metric] = {}
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            raise UsageError(
                f"there is no metric {printable(name)!r}",
                expected=", ".join(METRICS),
                hint=f"did you mean {near[0]!r}?" if near else None,
            )
        chosen[name] = METRICS[name]
    if not chosen:
        raise UsageError("no metrics were named", expected=", ".join(METRICS))
    _check_reference(tuple(chosen.values()), reference, reference_resolution)
    return tuple(chosen.values())


def _check_reference(chosen: Sequence[Metric], reference: str | Path | None, resolution: int | None) -> None:
    needy = [metric for metric in chosen if metric.reference != "none"]
    if needy and reference is None:
        raise UsageError(
            f"{needy[0].name} compares with a reference, and there is none",
            expected="--reference STATS.npz or FOLDER",
            hint="unet-surgery stats makes statistics; or leave the metric out",
        )
    if resolution is not None and resolution < 1:
        raise UsageError("--reference-resolution is a side in pixels", found=str(resolution))
    if reference is not None and not needy:
        raise UsageError(
            "no metric that was asked for compares with a reference",
            expected="fid or kid among --metrics",
            found=f"--reference {printable(str(reference))}",
            hint="leave --reference out, or add the metric",
        )
    if reference is not None:
        _check_place(Path(reference))
    of_pictures = [metric.name for metric in chosen if metric.reference == "pictures"]
    if of_pictures and reference is not None and not Path(reference).is_dir():
        raise UsageError(
            f"{of_pictures[0]} compares with pictures, not with their statistics",
            expected="--reference FOLDER",
            found=printable(str(reference)),
        )


def _check_place(reference: Path) -> None:
    """Check that a reference is there, and may be one."""
    if not reference.is_dir() and reference.suffix != ".npz":
        raise UsageError(
            "a reference is a folder of pictures, or statistics",
            where=printable(str(reference)),
            expected="--reference FOLDER, or a file .npz of unet-surgery stats or pytorch-fid",
        )
    if not reference.exists():
        raise DataError("the reference is not there", where=str(reference), expected="what --reference names")
