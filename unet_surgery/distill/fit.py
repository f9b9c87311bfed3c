"""What has to fit in a run: refusals that configs alone can tell, the same in a run and in a dry run; without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from unet_surgery.distill.config import RunConfig
from unet_surgery.errors import ConfigError, RunError, SurgeryError, printable
from unet_surgery.graph.config import DEFAULTS

__all__ = [
    "check_kind",
    "check_noise",
    "check_parts",
    "check_prediction",
    "check_processes",
    "check_teacher",
    "named_in",
    "no_such_student",
    "other_noise",
]

CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")
NOISE: Mapping[str, Any] = {
    "num_train_timesteps": None,
    "beta_schedule": None,
    "beta_start": None,
    "beta_end": None,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
"""The keys of a scheduler's config that say its noise, and what they are where they are missing."""
SHIPPED = "the finished student ships its own scheduler: make it that of the run's base:, or leave base: out"
ITS_BASE = "name the pipeline that the U-Net belongs to under base:"

Config = Mapping[str, Any]


def check_processes(config: RunConfig, num_processes: int) -> None:
    """Refuse what only one process can do.

    Raises:
        RunError: bitsandbytes' optimizer, whose state is not gathered, on several.
    """
    names = [stage.name for stage in config.stages if stage.optimizer.kind == "adamw8bit"]
    if names and num_processes > 1:
        raise RunError(
            "bitsandbytes' optimizer works in one process",
            where=f"stage {names[0]}, optimizer.kind",
            expected="adamw, or one process",
            found=f"adamw8bit and {num_processes} processes",
            hint="--set optimizer.kind=adamw",
        )


def check_kind(unet: Config, where: str) -> None:
    """Refuse a student that is not trained here.

    Raises:
        RunError: it is conditioned on more than a prompt, predicts other channels than it sees, or has dropout, whose
            numbers come from no place in the run, so that a resumed run would be another one.
    """
    other = {key: unet[key] for key in CONDITIONS if unet.get(key) is not None}
    channels = _value(unet, "in_channels"), _value(unet, "out_channels")
    if other or channels[0] != channels[1]:
        raise RunError(
            "this kind of U-Net cannot be trained here yet",
            where=where,
            expected="one that sees noisy latents and is conditioned on a prompt alone, as in SD v1 and v2",
            found=printable(other or f"{channels[0]} channels in, {channels[1]} out"),
        )
    if unet.get("dropout"):
        raise RunError(
            "a student with dropout cannot be trained exactly",
            where=f"{where}, dropout",
            expected="0",
            found=printable(unet["dropout"]),
            hint="set dropout to 0 in the U-Net's config.json: it changes no weight",
        )


def check_parts(unet: Config, where: str, *, text_width: int | None, latent_channels: int | None) -> None:
    """Refuse a text encoder or latents that were made for another kind of U-Net; None is not known.

    Raises:
        ConfigError: its embeddings are of another width, or the latents have other channels.
    """
    wanted = _value(unet, "cross_attention_dim")
    if text_width is not None and _all_of(wanted) != {text_width}:
        raise ConfigError(
            "the text encoder is not of this U-Net's kind",
            where=f"{where}, cross_attention_dim",
            expected=printable(wanted),
            found=f"hidden_size {printable(text_width)}",
            hint=ITS_BASE,
        )
    channels = _value(unet, "in_channels")
    if latent_channels is not None and latent_channels != channels:
        raise ConfigError(
            "the latents are not of this U-Net's kind",
            where=f"{where}, in_channels",
            expected=printable(channels),
            found=f"latents of {printable(latent_channels)} channels",
            hint=ITS_BASE,
        )


def check_teacher(teacher: Config, student: Config, where: str) -> None:
    """Refuse a teacher that sees or says something else than the student.

    Raises:
        RunError: a width or a number of channels differs.
    """
    for key in ("cross_attention_dim", "in_channels", "out_channels"):
        here, there = _value(student, key), _value(teacher, key)
        if _all_of(here) != _all_of(there):
            raise RunError(
                "the teacher is of another kind than the student",
                where=f"{where}, {key}",
                expected=printable(here),
                found=printable(there),
            )


def check_prediction(theirs: Config, ours: Config, who: str, where: str) -> None:
    """Refuse a network (``who``: teacher or student) whose scheduler says another ``prediction_type`` than the run's.

    Raises:
        RunError: it does.
    """
    here, there = _prediction_type(ours), _prediction_type(theirs)
    if here != there:
        raise RunError(
            "teacher and student predict different things"
            if who == "teacher"
            else "the student's own scheduler says another prediction than the run's",
            where=f"{where}, prediction_type",
            expected=printable(here),
            found=printable(there),
            hint=None if who == "teacher" else SHIPPED,
        )


def check_noise(theirs: Config, ours: Config, who: str, where: str) -> None:
    """Refuse a network whose scheduler has other noise than the run's, by its keys: betas that are listed say no less.

    Raises:
        RunError: a key differs.
    """
    if any(config.get("trained_betas") is not None for config in (theirs, ours)):
        return
    if any(theirs.get(key, default) != ours.get(key, default) for key, default in NOISE.items()):
        raise other_noise(theirs, ours, who, where)


def other_noise(theirs: Config, ours: Config, who: str, where: str) -> RunError:
    """Return the error that names the keys by which two schedulers' noise differs, with both values."""
    keys = [key for key, default in NOISE.items() if theirs.get(key, default) != ours.get(key, default)]
    return RunError(
        "the teacher was trained with other noise than the student is"
        if who == "teacher"
        else "the student's own scheduler has other noise than the run's",
        where=where,
        expected=", ".join(f"{key} {printable(ours.get(key, NOISE[key]))}" for key in keys),
        found=", ".join(f"{key} {printable(theirs.get(key, NOISE[key]))}" for key in keys),
        hint="a timestep has to mean one noise level" if who == "teacher" else SHIPPED,
    )


def no_such_student(name: str) -> RunError:
    """Return the error that a run and a dry run give where there is no student."""
    return RunError(
        "there is no such student yet",
        where=printable(name),
        hint="unet-surgery prune makes it; for a dry run a plan is enough: unet-surgery plan --recipe … --json "
        "> plan.json, and --set student=plan.json",
    )


@contextmanager
def named_in(config: RunConfig, name: str) -> Iterator[None]:
    """Let an error that does not know where it is say which key of the run names this network."""
    try:
        yield
    except SurgeryError as error:
        places = {config.student: "student", config.base: "base"}
        teachers = {stage.teacher: f"stage {stage.name}, teacher" for stage in reversed(config.stages)}
        raise error.at((teachers | places)[name]) from error.__cause__


def _prediction_type(scheduler: Config) -> str:
    """Return what a pipeline's network predicts."""
    return str(scheduler.get("prediction_type", "epsilon"))


def _all_of(value: Any) -> set[Any]:
    """Return the values of a key that may be one for all levels or a list: those of another depth have another list."""
    return set(value) if isinstance(value, (list, tuple)) else {value}


def _value(unet: Config, key: str) -> Any:
    return unet.get(key, DEFAULTS[key])
