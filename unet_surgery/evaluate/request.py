"""What a generation is asked for, and what comes of it: arguments and a preset's defaults become one plan."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from unet_surgery.data.prompts import PromptSet, read_prompts
from unet_surgery.errors import DataError, OutputError, UsageError, printable
from unet_surgery.sample.keep import Keeping
from unet_surgery.sample.presets import find_preset
from unet_surgery.sample.schedulers import check_scheduler_name, strength_steps

__all__ = [
    "GenerateRequest",
    "GenerateResult",
    "Protocol",
    "check_grids",
    "grids_folder",
    "plan_prompts",
    "plan_protocol",
]

T = TypeVar("T")

SEEDINGS = ("keyed", "stream")
STRENGTH = 0.8
"""Of image to image where none is given, as diffusers' pipeline has it. Inpainting has 1."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """The arguments of :func:`unet_surgery.evaluate.generate.generate`, as they came."""

    model: str
    prompts: str | Path | None
    out: Path
    preset: str | None = None
    base: str | None = None
    column: str | None = None
    limit: int | None = None
    size: int | tuple[int, int] | None = None
    resize: int | tuple[int, int] | None = None
    resize_filter: str = "bicubic"
    jpeg: int | None = None
    full_size: Path | None = None
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    seed: int | None = None
    seeding: str = "keyed"
    batch: int = 8
    init: Path | None = None
    masks: Path | None = None
    strength: float | None = None
    teacher: str | None = None
    grids: int = 8
    device: str = "auto"
    dtype: str | None = None
    compiled: bool = False
    channels_last: bool = False
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A generated folder: ``finished`` says whether all parts of it are there.

    ``num_there`` of ``num_pictures`` are; ``num_drawn`` of them were drawn by this call, in ``seconds``. ``grids`` are
    the files that show them beside the teacher's.
    """

    folder: Path
    finished: bool
    num_pictures: int
    num_there: int
    num_drawn: int
    seconds: float
    grids: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Protocol:
    """How pictures are drawn and kept, nothing open but what the model says itself (None)."""

    preset: str | None
    size: tuple[int, int] | None
    """(height, width)"""
    keeping: Keeping
    scheduler: str | None
    steps: int
    guidance: float
    seed: int
    strength: float | None


def plan_protocol(request: GenerateRequest) -> Protocol:
    """Return the protocol that is asked for: options over the preset's, and these over general defaults.

    ``resize`` and ``jpeg`` of 0 take away what a preset says.

    Raises:
        UsageError: an argument has no sense, or there is no such preset, scheduler, filter or seeding.
    """
    preset = None if request.preset is None else find_preset(request.preset)
    _check_numbers(request)
    steps = _or(request.steps, preset.steps if preset else 25)
    scheduler = _or(request.scheduler, preset.scheduler if preset else None)
    if scheduler is not None:
        check_scheduler_name(scheduler)
    kept = _pair(_or(request.resize, preset.resize if preset else None) or None)
    jpeg = _or(request.jpeg, preset.jpeg if preset else None) or None
    size = _pair(_or(request.size, preset.size if preset else None))
    if size is not None and min(size) < 1:
        raise UsageError("size is of sides of 1 pixel or more", found=f"{size[1]}×{size[0]}")
    strength = _strength(request, size)
    if strength is not None:
        strength_steps(steps, strength)
    return Protocol(
        request.preset,
        size,
        Keeping(None if kept is None else (kept[1], kept[0]), request.resize_filter, jpeg),
        scheduler,
        steps,
        _or(request.guidance, preset.guidance if preset else 7.5),
        _or(request.seed, preset.seed if preset else 0),
        strength,
    )


def plan_prompts(request: GenerateRequest) -> PromptSet:
    """Return the prompts that are asked for; those of ``init``'s metadata where none are named.

    Raises:
        UsageError: none are named; says which file a preset needs, and where it comes from.
        DataError: they cannot be read, or are not as many as the preset's.
    """
    preset = None if request.preset is None else find_preset(request.preset)
    prompts = request.init if request.prompts is None else request.prompts
    if prompts is None:
        raise UsageError(
            f"the preset {preset.name} needs its prompts" if preset else "prompts are needed",
            expected=f"{preset.prompts} ({preset.count:,} prompts)" if preset else "a text, or a file of them",
            hint="name it: --prompts FILE",
        )
    found = read_prompts(prompts, column=request.column, limit=request.limit)
    if preset is not None and request.limit is None and found.num_before_limit != preset.count:
        raise DataError(
            f"these are not the prompts of the preset {preset.name}",
            where=str(prompts),
            expected=f"{preset.count:,} prompts: {preset.prompts}",
            found=f"{found.num_before_limit:,}",
            hint="for the first N of a set: --limit N; for prompts of your own: the same options without --preset",
        )
    if request.limit is not None and found.num_before_limit < request.limit:
        raise DataError(
            "there are fewer prompts than --limit says",
            where=str(prompts),
            expected=f"{request.limit:,} or more",
            found=f"{found.num_before_limit:,}",
            hint="leave --limit out to draw all",
        )
    return found


def check_grids(request: GenerateRequest) -> None:
    """Check that grids can be written, if there are to be any.

    Raises:
        OutputError: a file is where their folder goes.
        UsageError: other pictures go there.
    """
    where = grids_folder(request)
    if request.teacher is None:
        return
    if os.path.lexists(where) and not where.is_dir():
        raise OutputError("the grids' folder is a file", where=str(where), hint="choose another --out")
    if request.full_size is not None and (request.full_size == where or where in request.full_size.parents):
        raise UsageError("the grids and the pictures as drawn would share a folder", where=str(where))


def grids_folder(request: GenerateRequest) -> Path:
    """Return where the pictures beside the teacher's go."""
    return request.out.with_name(f"{request.out.name}-grids")


def _check_numbers(request: GenerateRequest) -> None:
    for name, value in (("batch", request.batch), ("steps", request.steps), ("limit", request.limit)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be 1 or more", found=str(value))
    if request.grids < 1:
        raise UsageError("grids must be 1 or more", found=str(request.grids))
    if request.seeding not in SEEDINGS:
        raise UsageError("there is no such seeding", expected=" or ".join(SEEDINGS), found=printable(request.seeding))
    if request.guidance is not None and not math.isfinite(request.guidance):
        raise UsageError("guidance is not a finite number", found=str(request.guidance))
    if request.seeding == "stream" and request.seed is not None and not -(1 << 63) <= request.seed < 1 << 64:
        raise UsageError("a stream's seed has 64 bits", expected="−2⁶³ … 2⁶⁴ − 1", found=printable(str(request.seed)))
    if request.seeding == "stream" and request.init is not None:
        raise UsageError("one stream of noise is for text alone", hint="leave out --init, or --seeding stream")
    index, count = request.part
    if not 0 <= index < count:
        raise UsageError("there is no such part", expected=f"0 … {count - 1}", found=str(index))


def _strength(request: GenerateRequest, size: tuple[int, int] | None) -> float | None:
    if request.init is None:
        for name, value in (("strength", request.strength), ("masks", request.masks)):
            if value is not None:
                raise UsageError(f"{name} without pictures to start from", hint="name their folder: --init FOLDER")
        return None
    if size is not None and size[0] != size[1]:
        raise UsageError("pictures to start from become squares", expected="one --size", found=f"{size[0]}×{size[1]}")
    if request.strength is not None:
        return request.strength
    return STRENGTH if request.masks is None else 1.0


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
