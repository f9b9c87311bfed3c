"""Everything a stage needs, made from its run file: data, networks, pairs, trainer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unet_surgery.checkpoint.check import unet_folder
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.student import CONFIG
from unet_surgery.data.batches import Batches, GuidedSteps, TrainingSet
from unet_surgery.data.keyed import KeyedNoise
from unet_surgery.data.order import Order
from unet_surgery.distill.compute import Compute, Loss, Preparation, compare
from unet_surgery.distill.config import RunConfig, Stage
from unet_surgery.distill.diffusion import NoiseSchedule
from unet_surgery.distill.fit import check_kind, check_parts, check_processes, check_teacher
from unet_surgery.distill.networks import (
    Folders,
    load_base,
    load_student,
    load_teacher,
    own_schedule,
    read_student_plan,
    recompute,
    refuse_compiling,
)
from unet_surgery.distill.pairs import check_pairs, choose_pairs, tapped
from unet_surgery.distill.similarity import match_layers
from unet_surgery.distill.step_compute import StepCompute
from unet_surgery.distill.trainer import StageTrainer
from unet_surgery.distill.weights import DTYPES, TrainedWeights
from unet_surgery.distill.world import World
from unet_surgery.errors import RunError
from unet_surgery.lower.features import FeaturePair, Tap
from unet_surgery.runtime.parts import Parts, pixels_per_latent
from unet_surgery.runtime.taps import Tapped, tap_name, trace_taps_under_checkpointing

__all__ = ["Base", "latent_shape", "open_base", "set_up"]

log = logging.getLogger(__name__)

CALIBRATION, CALIBRATION_BATCHES = 16, 4


@dataclass(frozen=True, slots=True)
class Base:
    """What all stages share: the parts beside the U-Net, the noise schedule, and the data."""

    parts: Parts
    schedule: NoiseSchedule
    samples: TrainingSet
    latent_shape: tuple[int, int, int]
    """C, H, W."""

    @property
    def bad_samples(self) -> dict[str, int]:
        """How many samples this process could not use and replaced, by reason; a cache has none of them."""
        return dict(getattr(self.samples, "bad", {}))

    def batches(
        self, seed: int, *, attempt: int = 0, caption_drop: float = 0.0, guided: GuidedSteps | None = None
    ) -> Batches:
        """Return the samples of a run by position; each ``attempt`` has noise and an order of its own."""
        order = Order(len(self.samples), seed, attempt)
        return Batches(self.samples, order, KeyedNoise(seed, attempt), self.latent_shape, caption_drop, guided)


def open_base(config: RunConfig, folders: Folders, world: World) -> Base:
    """Load the parts and open the data, for networks that fit them: those of all stages, by their configs.

    Raises:
        RunError: a network is of a kind that is not trained here, or of another than student and base; or the run needs
            one process, and has many.
        ConfigError: student, text encoder and latents do not fit each other.
        DataError: the data is not there, broken, or was made with other parts.
    """
    check_processes(config, world.size)
    student, name = read_object(unet_folder(folders.student) / CONFIG), str(folders.student)
    check_kind(student, name)
    parts, schedule = load_base(folders.base, config.speed, world.device)
    check_parts(
        student,
        name,
        text_width=parts.text_encoder.config.hidden_size,
        latent_channels=parts.vae.config.latent_channels,
    )
    own_schedule(folders.student, "student", parts.scheduler_config, schedule)
    for stage, teacher in zip(config.stages, folders.teachers, strict=True):
        if teacher is not None and stage.objectives.needs_teacher:
            check_teacher(read_object(unet_folder(teacher) / CONFIG), student, str(teacher))
            _their_schedule(stage, teacher, parts, schedule)
    samples = _open_samples(config, parts)
    return Base(parts, schedule, samples, latent_shape(samples, parts))


def _open_samples(config: RunConfig, parts: Parts) -> TrainingSet:
    """Return the run's data, whichever kind it is."""
    data = config.data
    if data.cache is not None:
        from unet_surgery.data.latents import LatentCache

        return LatentCache(data.cache, model=parts)
    if data.images is not None:
        from unet_surgery.data.encode import check_resolution
        from unet_surgery.data.images import PictureSet
        from unet_surgery.data.sources import open_source

        check_resolution(parts.vae, data.resolution)
        source = open_source(data.images, caption_column=data.caption_column, filters=data.filter)
        return PictureSet(source, parts.tokenizer, data.resolution, max_bad=data.max_bad)
    from unet_surgery.data.memory import encode_all
    from unet_surgery.data.toy import ToyPictures

    assert data.toy is not None
    pictures = ToyPictures(parts.tokenizer, data.toy.count, data.toy.seed, objects=data.toy.objects)
    return encode_all(pictures, parts.vae)


def latent_shape(samples: TrainingSet, parts: Parts) -> tuple[int, int, int]:
    """Return C, H, W of the latents that the samples give or become."""
    images, _ = samples.batch([0])
    _, channels, height, width = images.shape
    if samples.latents == "moments":
        return channels // 2, height, width
    shrink = pixels_per_latent(parts.vae)
    return parts.vae.config.latent_channels, height // shrink, width // shrink


def set_up(
    config: RunConfig,
    number: int,
    folders: Folders,
    base: Base,
    world: World,
    *,
    frozen: Sequence[Mapping[str, Any]] | None = None,
) -> StageTrainer:
    """Make the trainer of a stage: networks on the device, pairs checked by a forward before anything is trained.

    ``frozen`` are the feature pairs that an earlier part of the run was trained with, as its state has them.

    Raises:
        RunError: features are to be compared, and the student has no plan.
        VerificationError: a tap cannot be matched.
    """
    stage, speed = config.stages[number], config.speed
    refuse_compiling(world.device, speed)
    student = load_student(folders.student, config)
    teacher_folder = folders.teachers[number] if stage.objectives.needs_teacher else None
    their_schedule = (
        base.schedule if teacher_folder is None else _their_schedule(stage, teacher_folder, base.parts, base.schedule)
    )
    teacher = None if teacher_folder is None else load_teacher(teacher_folder, speed, world.device)
    student = student.to(world.device)
    if _is_channels_last(config, stage, world):
        student = student.to(memory_format=torch.channels_last)
    prepare = Preparation(base.parts, base.schedule, stage.noise, base.samples.latents, speed.channels_last)
    chosen = None
    if teacher is not None and frozen is None:
        chosen = world.on_main(lambda: _pairs(config, stage, folders, student, teacher, base, prepare))
    data = frozen or world.share([asdict(pair) for pair in chosen or ()])
    pairs = tuple(_pair(pair) for pair in data)
    recompute(student, speed.checkpointing)
    if speed.compile and speed.checkpointing != "none":
        trace_taps_under_checkpointing()
    ours, theirs = Tapped(student, ()), None
    if teacher is not None:
        ours, theirs = tapped(student, teacher, pairs)
        check_pairs(ours, theirs, pairs, _example(base))
    weights = TrainedWeights(ours, DTYPES[speed.dtype], world)
    run = _compiled(weights.run, speed.compile), None if theirs is None else _compiled(theirs, speed.compile)
    compute: Loss
    if stage.objectives.step_kd.weight:
        compute = StepCompute(stage.objectives.step_kd, prepare, *run, their_schedule, _no_prompt(base))
    else:
        compute = Compute(stage, prepare, *run, _compiled(compare, speed.compile))
    return StageTrainer(world, stage, weights, compute, ema=config.ema, pairs=pairs, scales_loss=speed.dtype == "fp16")


def _their_schedule(stage: Stage, teacher: Path, parts: Parts, ours: NoiseSchedule) -> NoiseSchedule:
    """Return the teacher's schedule; where steps are distilled they must fit it, and meet in x."""
    wanted = stage.objectives.step_kd
    schedule = own_schedule(teacher, "teacher", parts.scheduler_config, ours, same_prediction=not wanted.weight)
    if wanted.weight and wanted.student_steps * wanted.teacher_steps > schedule.num_timesteps:
        raise RunError(
            "there are fewer timesteps than steps of the teacher",
            where=f"stage {stage.name}, step_kd",
            expected=f"student_steps × teacher_steps of at most {schedule.num_timesteps}",
            found=f"{wanted.student_steps} × {wanted.teacher_steps}",
        )
    return schedule


def _no_prompt(base: Base) -> Tensor:
    """Return the embeddings of an empty prompt [1, T, D]."""
    with torch.no_grad():
        encoder = base.parts.text_encoder
        embeds: Tensor = encoder(base.samples.empty_ids()[None].to(encoder.device))[0]
    return embeds


def _is_channels_last(config: RunConfig, stage: Stage, world: World) -> bool:
    """FSDP2 shards contiguous parameters only, and bitsandbytes makes those it updates contiguous."""
    plain = world.engine != "fsdp2" and stage.optimizer.kind == "adamw"
    return config.speed.channels_last and plain


def _pair(data: Mapping[str, Any]) -> FeaturePair:
    return FeaturePair(Tap(**data["student"]), Tap(**data["teacher"]), data["channels"], data["stride"])


def _compiled(what: Any, wanted: bool) -> Any:
    return torch.compile(what, dynamic=False) if wanted else what


def _pairs(
    config: RunConfig,
    stage: Stage,
    folders: Folders,
    student: nn.Module,
    teacher: nn.Module,
    base: Base,
    prepare: Preparation,
) -> tuple[FeaturePair, ...]:
    wanted = stage.objectives.feature_kd
    if wanted.weight == 0:
        return ()
    if wanted.pairs == "similarity":
        return _similar(config, student, teacher, base, prepare)
    plan = read_student_plan(folders.student)
    if plan is None:
        raise RunError(
            "features can be compared only with a plan of what was removed",
            where=str(folders.student),
            expected="plan.json, as unet-surgery prune writes it",
            hint="prune the teacher, or give feature_kd the weight 0",
        )
    return choose_pairs(wanted.pairs, plan)


def _similar(
    config: RunConfig, student: nn.Module, teacher: nn.Module, base: Base, prepare: Preparation
) -> tuple[FeaturePair, ...]:
    """Match layers on the run's first samples.

    The student has the weights that it was pruned with: in a resumed run or a later stage, those of the beginning.
    """
    device, dtype = next(teacher.parameters()).device, next(teacher.parameters()).dtype
    batches = base.batches(config.seed)
    inputs = [prepare(batches.at(i * CALIBRATION, CALIBRATION).to(device)) for i in range(CALIBRATION_BATCHES)]
    rounded = nn.Module.to(copy.deepcopy(student), dtype)
    found = match_layers(rounded, teacher, [(i.noisy_BCHW, i.timesteps_B, i.prompt_embeds_BTD) for i in inputs])
    for pair in found.pairs:
        log.info("%s is matched with the teacher's %s", tap_name(pair.student), tap_name(pair.teacher))
    return found.pairs


def _example(base: Base) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs of the shapes that the networks will see."""
    tokens, width = base.samples.empty_ids().shape[0], base.parts.text_encoder.config.hidden_size
    return torch.empty(2, *base.latent_shape), torch.zeros(2, dtype=torch.long), torch.empty(2, tokens, width)
