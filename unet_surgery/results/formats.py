"""What the other commands' JSON says, as far as a report shows it: keys of later versions are ignored.

Checked once, here: types, finite numbers, sizes. Texts are what a file claims, and are escaped where they are shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unet_surgery.errors import DataError, printable

__all__ = [
    "Bench",
    "BenchRow",
    "Generation",
    "Images",
    "Machine",
    "Protocol",
    "Score",
    "Scores",
    "Training",
    "parsed",
]

MAX_ROWS = 1000
MAX_LINES = 1_000_000

Text = Annotated[str, Field(max_length=2000)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Positive = Annotated[float, Field(gt=0, le=1e15)]
Side = Annotated[int, Field(ge=1, le=10**6)]

Model = TypeVar("Model", bound="_Read")


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, strict=True)


class Network(_Read):
    """A model as generation.json names it."""

    name: Text
    parameters: Count | None = None
    sha256: Text | None = None


class Prompts(_Read):
    name: Text
    sha256: Text | None = None
    count: Count | None = None


class Scheduler(_Read):
    class_name: Text = Field(alias="class")
    options: dict[str, Any] = Field(default_factory=dict)


class Stream(_Read):
    """Of ``--seeding stream``: what the noise of a picture depends on."""

    batch: Count
    device: Text


class Generation(_Read):
    """generation.json."""

    model: Network
    prompts: Prompts
    preset: Text | None = None
    width: Side
    height: Side
    drawn_width: Side | None = None
    drawn_height: Side | None = None
    resize: Text | None = None
    jpeg: Count | None = None
    scheduler: Scheduler
    steps: Count
    guidance: float
    negative: Text = ""
    seed: int
    seeding: Text | None = None
    stream: Stream | None = None
    strength: float | None = None
    init: Any = None
    masks: Any = None
    images: Count | None = None


class Weights(_Read):
    name: Text
    sha256: Text | None = None


class Reference(_Read):
    name: Text
    sha256: Text | None = None
    count: Count | None = None
    resolution: Any = None
    change: Text | None = None


class Protocol(_Read):
    """How a score was computed."""

    implementation: Text
    weights: Weights | None = None
    reference: Reference | None = None
    resolution: Any = None
    resize: Text | None = None
    count: Count
    error_is: Text | None = None
    dtype: Text | None = None


class Score(_Read):
    metric: Annotated[str, Field(max_length=100, min_length=1)]
    value: float
    error: Annotated[float, Field(ge=0)] | None = None
    interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    protocol: Protocol


class Images(_Read):
    """The pictures that were scored."""

    folder: Text
    count: Count
    width: Side
    height: Side
    generation: Generation | None = None


class Scores(_Read):
    """The JSON of ``unet-surgery score``."""

    images: Images
    scores: Annotated[list[Score], Field(max_length=MAX_ROWS)]


class Machine(_Read):
    device: Text
    cpu: Text | None = None
    threads: Count | None = None
    torch: Text | None = None


class Span(_Read):
    """A median with its spread."""

    median: Positive
    low: Positive
    high: Positive
    runs: Count | None = None


class BenchRow(_Read):
    """A model in a setting; one that was only counted has no setting, and one that failed says why."""

    model: Text
    parameters: Count
    macs_conv_linear: Count | None = None
    macs_all: Count | None = None
    latent: Annotated[list[Side], Field(min_length=2, max_length=2)]
    dtype: Text | None = None
    batch: Side | None = None
    compile: bool = False
    unet_ms: Span | None = None
    picture_s: dict[str, Any] | None = None
    peak_bytes: Count | None = None
    ratio_to_first: Positive | None = None
    ratio_is_clear: bool | None = None
    failed: Text | None = None

    @property
    def median(self) -> float:
        """Milliseconds of a forward; of a row that has been timed."""
        assert self.unet_ms is not None
        return self.unet_ms.median


class Bench(_Read):
    """The JSON of ``unet-surgery bench``."""

    machine: Machine
    rows: Annotated[list[BenchRow], Field(max_length=MAX_ROWS)]


class Training(_Read):
    """training.json of a distilled student: its run file, and the lines of metrics.jsonl."""

    run: dict[str, Any]
    metrics: Annotated[list[dict[str, Any]], Field(max_length=MAX_LINES)]


def parsed(kind: type[Model], data: dict[str, Any], where: Path) -> Model:
    """Return ``data`` as ``kind``.

    Raises:
        DataError: it is not; names the first key that is wrong.
    """
    version = data.get("format_version")
    if version != 1:
        raise DataError(
            "this version of the format is not known", where=str(where), expected="format_version 1",
            found=printable(version), hint="a newer unet-surgery reads it",
        )  # fmt: skip
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{printable(place)} has a wrong value",
            where=str(where),
            expected=printable(first["msg"]),
            found="nothing" if first["type"] == "missing" else printable(first["input"]),
        ) from None
