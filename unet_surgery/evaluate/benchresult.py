"""What a bench is asked for, and what it finds: rows, and the JSON that a report reads. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from unet_surgery.evaluate.benchmodels import BenchModel
from unet_surgery.evaluate.timing import Spread
from unet_surgery.version import __version__

__all__ = ["BENCH_FORMAT", "BenchReport", "BenchRow", "BenchSettings", "PictureTime"]

BENCH_FORMAT = "unet-surgery-bench"
NOT_RUN: Mapping[str, Any] = {"device": "nothing was run", "cpu": None, "threads": None, "torch": None}


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """The arguments of :func:`unet_surgery.evaluate.bench.bench` that say how to measure.

    ``dtypes`` is empty where the device decides; ``steps`` is None where no pictures are drawn.
    """

    device: str = "auto"
    dtypes: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    random: bool = False
    base: str | None = None
    steps: int | None = None
    guidance: float = 7.5
    scheduler: str | None = None
    pictures: int = 3
    compiled: bool = False
    channels_last: bool = False
    rounds: int = 10
    warm_up: int = 2
    memory: bool = True

    @property
    def is_guided(self) -> bool:
        """True if a picture takes the U-Net twice a step: with its text, and without."""
        return self.guidance > 1


@dataclass(frozen=True, slots=True)
class PictureTime:
    """Seconds a picture: text encoder, all steps, VAE; of ``batch`` pictures drawn at once, divided by that many."""

    median: float
    low: float
    high: float
    runs: int
    steps: int
    guidance: float
    scheduler: str
    batch: int


@dataclass(frozen=True, slots=True)
class BenchRow:
    """A model in one setting. What was not measured is None; ``failed`` says what could not be, and why.

    ``unet_ms`` is one forward of ``batch`` samples, ``guided_ms`` one of twice as many, in milliseconds. MACs are of
    batch 1 at ``latent`` (height, width). ``peak_bytes`` is the memory of weights and forwards, as ``peak_is`` says.
    ``ratio_to_first`` compares ``unet_ms`` with the first model's in the same setting and at the same latent size, with
    ``ratio_interval`` (95 %) and whether that is narrow. ``compile_difference`` is how far compiled forwards are from
    eager ones, the most of these sizes. ``flop_share`` is of the machine's own matrix product.
    """

    model: str
    parameters: int
    macs_conv_linear: int
    macs_all: int
    latent: tuple[int, int]
    weights: str | None = None
    dtype: str | None = None
    batch: int | None = None
    compile: bool = False
    compile_difference: float | None = None
    channels_last: bool = False
    unet_ms: Spread | None = None
    guided_ms: Spread | None = None
    picture_s: PictureTime | None = None
    peak_bytes: int | None = None
    peak_is: str | None = None
    ratio_to_first: float | None = None
    ratio_interval: tuple[float, float] | None = None
    ratio_is_clear: bool | None = None
    flop_share: float | None = None
    failed: str | None = None

    @classmethod
    def of(cls, model: BenchModel) -> BenchRow:
        """Return what is known of a model without running it."""
        counts = model.counts
        return cls(model.name, counts.params, counts.macs, counts.macs_all, model.latent)

    @property
    def may_equal_first(self) -> bool:
        """True if the ratio is known well and may be 1: no difference was found, and more rounds may find none."""
        if self.ratio_interval is None or not self.ratio_is_clear:
            return False
        low, high = self.ratio_interval
        return low <= 1 <= high


@dataclass(frozen=True, slots=True)
class BenchReport:
    """A bench: the machine, and a row for each model in each setting, models in their order within a setting."""

    machine: Mapping[str, Any]
    rows: tuple[BenchRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return {
            "format": BENCH_FORMAT,
            "format_version": 1,
            "unet_surgery": __version__,
            "machine": dict(self.machine),
            "rows": [{**asdict(row), "latent": list(row.latent)} for row in self.rows],
        }
