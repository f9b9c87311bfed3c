"""``dry_run``: what a run will cost, and what it would be refused for, before anything is fetched, made or trained.

Configs and plan.json are all that is read. A run's own checks are more than these: they look into weights and data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from unet_surgery.checkpoint import disk
from unet_surgery.distill.choice import choose_pairs, pair_shape
from unet_surgery.distill.config import RunConfig, Stage
from unet_surgery.distill.costs import ImageFlops, at_size, stage_flops
from unet_surgery.distill.dealing import deal
from unet_surgery.distill.fit import (
    check_kind,
    check_noise,
    check_parts,
    check_prediction,
    check_processes,
    check_teacher,
    named_in,
)
from unet_surgery.distill.footprint import Disk, Memory, checkpoint_bytes, memory
from unet_surgery.distill.onpaper import Data, Network, Parts, read_data, read_network, read_parts, read_student
from unet_surgery.errors import OutputError, RunError, SurgeryError, printable
from unet_surgery.graph import parse_config
from unet_surgery.graph.config import DEFAULTS
from unet_surgery.lower import FeaturePair, count
from unet_surgery.lower.features import tap_name

__all__ = ["DryRun", "PairOnPaper", "StageOnPaper", "dry_run"]

T = TypeVar("T")

SAMPLE_TEXT_BYTES = 150  # a caption and an id, as the cache estimates them
TOKENS = 77
FP32, FP16 = 4, 2


@dataclass(frozen=True, slots=True)
class PairOnPaper:
    """Two taps, and the shape [channels, height, width] or [tokens, channels] that both must have."""

    student: str
    teacher: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StageOnPaper:
    """A stage's costs. ``hours`` is None without a rate; ``pairs`` is None where only the run itself finds them."""

    name: str
    steps: int
    batch: int
    micro_batch: int
    accumulated: int
    teacher: str | None
    teacher_params: int | None
    flops: ImageFlops
    memory: Memory
    hours: float | None
    pairs: tuple[PairOnPaper, ...] | None

    @property
    def images(self) -> int:
        """Samples of the stage, each as often as it is seen."""
        return self.steps * self.batch


@dataclass(frozen=True, slots=True)
class DryRun:
    """A run on paper. ``refused`` are the errors it would end with; ``notes`` what was assumed."""

    student: str
    student_params: int
    latent_size: tuple[int, int]
    online: bool
    num_samples: int | None
    cache_sample_bytes: int
    processes: int
    rate: float | None
    """FLOP/s of one process that the hours are for."""
    stages: tuple[StageOnPaper, ...]
    disk: Disk
    refused: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def hours(self) -> float | None:
        """Of all stages; None without a rate."""
        hours = [stage.hours for stage in self.stages if stage.hours is not None]
        return sum(hours) if len(hours) == len(self.stages) else None

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON's types, with the sums."""
        result = asdict(self)
        for stage, data in zip(self.stages, result["stages"], strict=True):
            data["images"] = stage.images
            data["flops"] |= {"model": stage.flops.model, "total": stage.flops.total}
            data["memory"]["total"] = stage.memory.total
        return result | {"hours": self.hours}


class _Refusals:
    """Errors that are noted in place of raised, each once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def trying(self, ask: Callable[[], T], instead: T) -> T:
        """Return what ``ask`` does, or ``instead`` where a run would be refused."""
        try:
            return ask()
        except SurgeryError as error:
            self.note(error)
            return instead

    def note(self, error: SurgeryError) -> None:
        details = ", ".join(printable(value) for value in (error.where, error.found) if value)
        line = error.what + (f" ({details})" if details else "") + (f"; {error.hint}" if error.hint else "")
        if line not in self.lines:
            self.lines.append(line)


def dry_run(config: RunConfig, *, rate: float | None = None, num_processes: int = 1) -> DryRun:
    """Return what ``config`` costs on ``num_processes`` devices that each do ``rate`` FLOP/s.

    Raises:
        RunError: there is no student, or it is of a kind that is not trained here.
        SurgeryError: a network is not there, or its config cannot be used: nothing can be counted then.
    """
    refusals, notes = _Refusals(), list[str]()
    student = read_student(config.student)
    names = dict.fromkeys(s.teacher for s in config.stages if s.teacher is not None and s.objectives.needs_teacher)
    networks = {config.student: student, **{name: _network(config, name) for name in names}}
    refusals.trying(lambda: check_processes(config, num_processes), None)
    refusals.trying(lambda: check_kind(student.config, student.name), None)
    parts = refusals.trying(lambda: read_parts(config, networks), Parts())
    if parts.vae is None or parts.text_encoder is None:
        notes.append("VAE and text encoder are not counted: their configs are not known")
    native = parse_config(student.config).latent_size
    data = refusals.trying(lambda: read_data(config, parts), None)
    if data is None:
        data = Data(native, None, online=config.data.images is not None)
        notes.append(f"the data is not there: counted at the student's native latent size, {native[0]} × {native[1]}")
    refusals.trying(lambda: _check_fit(student, parts, data), None)
    refusals.trying(lambda: _check_scheduler(student, "student", parts), None)
    stages = tuple(_stage(config, s, networks, parts, data, rate, num_processes, refusals) for s in config.stages)
    if data.online:
        notes.append("pictures are encoded as they come, in fp32: latents cached once cost nothing in the run")
    params = count(at_size(student.config, native)).params
    written = refusals.trying(lambda: _disk(config, student, params, data, refusals), Disk(0, 0, 0, None))
    return DryRun(
        student=config.student,
        student_params=params,
        latent_size=data.latent_size,
        online=data.online,
        num_samples=data.num_samples,
        cache_sample_bytes=_cache_sample_bytes(student, data),
        processes=num_processes,
        rate=rate,
        stages=stages,
        disk=written,
        refused=tuple(refusals.lines),
        notes=tuple(notes),
    )


def _network(config: RunConfig, name: str) -> Network:
    with named_in(config, name):
        return read_network(name)


def _stage(
    config: RunConfig,
    stage: Stage,
    networks: dict[str, Network],
    parts: Parts,
    data: Data,
    rate: float | None,
    num_processes: int,
    refusals: _Refusals,
) -> StageOnPaper:
    student = networks[config.student]
    teacher = networks[stage.teacher] if stage.teacher is not None and stage.objectives.needs_teacher else None
    size, accumulated = refusals.trying(lambda: deal(config, stage, num_processes), (config.micro_batch or 1, 1))
    if teacher is not None:
        refusals.trying(lambda: check_teacher(teacher.config, student.config, teacher.name), None)
        same = not stage.objectives.step_kd.weight
        refusals.trying(lambda: _check_scheduler(teacher, "teacher", parts, same_prediction=same), None)
    none: tuple[FeaturePair, ...] | None = ()
    pairs = refusals.trying(lambda: _pairs(stage, student, teacher), none)
    flops = stage_flops(
        config,
        stage,
        student=student.config,
        teacher=None if teacher is None else teacher.config,
        latent_size=data.latent_size,
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        online=data.online,
    )
    whole = None if teacher is None else at_size(teacher.config, data.latent_size)
    held = memory(
        config,
        at_size(student.config, data.latent_size),
        whole,
        pairs=pairs or (),
        part_params=parts.params,
        micro_batch=size * (2 if stage.objectives.may_be_guided else 1),  # rows at once
        optimizer=stage.optimizer.kind,
    )
    on_paper = tuple(
        PairOnPaper(tap_name(p.student), tap_name(p.teacher), pair_shape(p, data.latent_size)) for p in pairs or ()
    )
    seconds = None if rate is None else stage.steps * stage.batch * flops.total / (rate * num_processes)
    return StageOnPaper(
        name=stage.name,
        steps=stage.steps,
        batch=stage.batch,
        micro_batch=size,
        accumulated=accumulated,
        teacher=None if teacher is None else teacher.name,
        teacher_params=None if whole is None else count(whole).params,
        flops=flops,
        memory=held,
        hours=None if seconds is None else seconds / 3600,
        pairs=None if pairs is None else on_paper,
    )


def _pairs(stage: Stage, student: Network, teacher: Network | None) -> tuple[FeaturePair, ...] | None:
    """Return a stage's pairs; None where they are found on its first batches."""
    wanted = stage.objectives.feature_kd
    if teacher is None or wanted.weight == 0:
        return ()
    if wanted.pairs == "similarity":
        return None
    if student.plan is None:
        raise RunError(
            "features can be compared only with a plan of what was removed",
            where=student.name,
            found="no plan.json",
            hint="prune the teacher, or give feature_kd the weight 0",
        )
    return choose_pairs(wanted.pairs, student.plan)


def _check_fit(student: Network, parts: Parts, data: Data) -> None:
    """Refuse parts and data that were made for another kind of U-Net."""
    check_parts(
        student.config,
        student.name,
        text_width=None if parts.text_encoder is None else parts.text_encoder.get("hidden_size"),
        latent_channels=data.channels or (None if parts.vae is None else parts.vae.get("latent_channels", 4)),
    )


def _check_scheduler(network: Network, who: str, parts: Parts, *, same_prediction: bool = True) -> None:
    """Refuse a network that brings another scheduler than the run's."""
    theirs = network.scheduler
    if theirs is None or parts.scheduler is None:
        return
    if same_prediction:
        check_prediction(theirs, parts.scheduler, who, network.name)
    check_noise(theirs, parts.scheduler, who, network.name)


def _disk(config: RunConfig, student: Network, params: int, data: Data, refusals: _Refusals) -> Disk:
    """Return what the run writes, and note if there is no room for it."""
    kinds = {stage.optimizer.kind for stage in config.stages}
    size = max(checkpoint_bytes(params, kind) for kind in kinds)
    of_it = student.plan.student_bytes if student.plan is not None and config.init == "weights" else params * FP32
    needed = Disk(size, size * (config.save.keep + 1), of_it, data.num_bytes)
    there = next(p for p in (Path(config.output).absolute(), *Path(config.output).absolute().parents) if p.exists())
    free = disk.free_bytes(there)
    if free < needed.checkpoints + needed.student:
        refusals.note(
            OutputError(
                "there is no room for the run's checkpoints",
                where=config.output,
                found=f"{free / 1e9:.1f} GB free, {(needed.checkpoints + needed.student) / 1e9:.1f} GB needed",
                hint="a smaller save.keep, or another output:",
            )
        )
    return needed


def _cache_sample_bytes(student: Network, data: Data) -> int:
    """Return what a sample takes in a latent cache: mean and deviation in half precision, token ids, its texts."""
    channels = data.channels or int(student.config.get("in_channels", DEFAULTS["in_channels"]))
    height, width = data.latent_size
    return 2 * channels * height * width * FP16 + TOKENS * 4 + SAMPLE_TEXT_BYTES
