"""The end of a run: its student as a folder that diffusers loads and the Hub takes; its card knows the training.

Everything but the U-Net's weights is the folder that the run began with.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.card import PICTURE, TrainingFacts, trained_card
from unet_surgery.checkpoint.check import unet_folder
from unet_surgery.checkpoint.components import INDEX, component_names
from unet_surgery.checkpoint.layout import UNET_BASE
from unet_surgery.checkpoint.licence import CARD, is_licence_file
from unet_surgery.checkpoint.staging import Staging
from unet_surgery.checkpoint.student import CONFIG, PLAN, RECIPE, TRAINING
from unet_surgery.checkpoint.target import check_space
from unet_surgery.checkpoint.teacher import is_hub_id
from unet_surgery.data.cachefolder import read_facts
from unet_surgery.distill.config import RunConfig, Stage
from unet_surgery.distill.metrics import sum_of_features, term
from unet_surgery.distill.networks import read_student_plan
from unet_surgery.distill.statefile import group_file, write_group
from unet_surgery.errors import DataError, OutputError, printable
from unet_surgery.runtime.load import stored_dtype
from unet_surgery.sample.chart import Curve, standalone_svg
from unet_surgery.version import __version__

__all__ = ["write_trained"]

CURVES, SAMPLES = "training.svg", "samples.png"
NUM_ROWS = 6
STEP_KD = "step distillation"
TERMS: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "task": lambda line: term(line, "task"),
    "output": lambda line: term(line, "output_kd"),
    "features": sum_of_features,
    STEP_KD: lambda line: term(line, "step_kd"),
}
"""A term of the loss, summed up, in a line of metrics; a stage that distils steps has no others."""
BARE_CARD = "---\nlibrary_name: diffusers\ntags: [unet-surgery]\n---\n\n# A U-Net\n"


def write_trained(
    start: Path,
    out: Path,
    config: RunConfig,
    weights: Mapping[str, Tensor],
    *,
    num_samples: int,
    metrics: Sequence[Mapping[str, Any]],
    samples: bytes | None,
) -> None:
    """Write the student of a finished run to ``out``: ``start`` with new ``weights`` (name → tensor), in its dtype.

    ``num_samples`` is how many the data has, ``metrics`` the lines of metrics.jsonl, ``samples`` a PNG of the last
    pictures. A student that an earlier end of the same run wrote is replaced.

    Raises:
        OutputError: no room, or ``out`` holds something else.
    """
    unet = unet_folder(start)
    dtype = stored_dtype(unet) if config.init == "weights" else torch.float32
    group = group_file({name: tensor.to(dtype) for name, tensor in weights.items()})
    copied = _copied(start)
    texts = _texts(start, config, num_samples, metrics, samples)
    size = group.num_bytes + sum(path.stat().st_size for path in copied.values()) + sum(map(len, texts.values()))
    with Staging(out, replace=_is_ours) as staging:
        check_space(staging.folder.parent, size)
        inside = staging.folder / unet.relative_to(start)
        for folder in sorted({(staging.folder / name).parent for name in copied} | {inside}):
            disk.make_folders(folder)
        fd = disk.create(inside / f"{UNET_BASE}.safetensors")
        try:
            write_group(fd, group, lambda _: None)
            disk.fsync(fd)
        finally:
            os.close(fd)
        for name, path in copied.items():
            disk.copy_file(path, staging.folder / name)
        for name, data in texts.items():
            disk.write_file(staging.folder / name, data)
        staging.commit()


def _is_ours(folder: Path) -> None:
    if not (folder / TRAINING).is_file():
        raise OutputError(
            "the student's folder exists, and no run wrote it",
            where=str(folder),
            expected=f"nothing, or a folder with {TRAINING}",
            hint="move it away",
        )


def _copied(start: Path) -> dict[str, Path]:
    """Return relative path → file of what goes along: the other components, and what is said of the surgery."""
    names = [PLAN, RECIPE, PICTURE, INDEX, str((unet_folder(start) / CONFIG).relative_to(start))]
    names += [entry.name for entry in start.iterdir() if is_licence_file(entry.name)]
    if (start / INDEX).is_file():
        for component in component_names(start):
            names += [str(path.relative_to(start)) for path in sorted((start / component).iterdir())]
    return {name: start / name for name in names if (start / name).is_file()}


def _texts(
    start: Path, config: RunConfig, num_samples: int, metrics: Sequence[Mapping[str, Any]], samples: bytes | None
) -> dict[str, bytes]:
    titles = [name for name in TERMS if name != STEP_KD or any(s.objectives.step_kd.weight for s in config.stages)]
    facts = TrainingFacts(
        version=__version__,
        weights=f"The weights are their running average (decay {config.ema.decay:g}).",
        data=f"{_data(config)}: {num_samples:,} samples.",
        images=config.num_samples,
        stages=tuple(_stage_row(stage) for stage in config.stages),
        loss_columns=("step", "loss", *titles),
        losses=_loss_rows(metrics, titles),
        pictures=(("The terms of the loss", CURVES), *((("Samples", SAMPLES),) if samples else ())),
    )
    plan = read_student_plan(start)
    card = (start / CARD).read_text("utf-8") if (start / CARD).is_file() else BARE_CARD
    training = {
        "format": "unet-surgery-training",
        "format_version": 1,
        "unet_surgery": __version__,
        "run": _without_paths(config),
        "samples": num_samples,
        "metrics": list(metrics),
    }
    texts = {
        CARD: trained_card(card, plan, facts).encode(),
        TRAINING: (json.dumps(training, indent=1) + "\n").encode(),
        CURVES: standalone_svg(_curves(metrics), title="loss", x_label="step", log=True).encode(),
    }
    return texts if samples is None else {**texts, SAMPLES: samples}


def _without_paths(config: RunConfig) -> dict[str, Any]:
    """Return the run as data, without the folders of the machine it ran on."""
    data = config.model_dump(mode="json")
    data["output"] = Path(config.output).name
    data["student"], data["base"] = _public(config.student), _public(config.base)
    for key in ("cache", "images"):
        data["data"][key] = _public(data["data"][key])
    for stage in data["stages"]:
        stage["teacher"] = _public(stage["teacher"])
    return data


def _public(name: str | None) -> str | None:
    """Return a Hub id or a built-in name as it is, and of a path its last part."""
    if name is None or is_hub_id(name.removeprefix("hub:")):
        return name
    return Path(name).name


def _data(config: RunConfig) -> str:
    if config.data.toy is not None:
        return "On pictures of the toy world"
    name = _public(config.data.cache or config.data.images)
    if config.data.images:
        return f"On {name}{_where(config.data.filter)}, at {config.data.resolution} pixels"
    chosen: tuple[str, ...] = ()
    with contextlib.suppress(DataError):  # a cache that has gone by now has been trained on all the same
        chosen = read_facts(Path(config.data.cache or "").expanduser()).settings.filter
    return f"On the latents in {name}{_where(chosen)}"


def _where(filters: Sequence[str]) -> str:
    shown = " and ".join(f"`{printable(text).replace('`', '?')}`" for text in filters)
    return f" where {shown}" if filters else ""


def _stage_row(stage: Stage) -> tuple[str, int, int, str, str, str]:
    wanted, optimizer = stage.objectives, stage.optimizer
    terms = [f"{weight:g} {name}" for name, weight in (("task", wanted.task), ("output", wanted.output_kd)) if weight]
    if wanted.feature_kd.weight:
        normalised = ", normalised" if wanted.feature_kd.normalise != "none" else ""
        terms.append(f"{wanted.feature_kd.weight:g} features ({wanted.feature_kd.pairs}{normalised})")
    if wanted.step_kd.weight:
        steps = wanted.step_kd
        terms.append(
            f"{steps.weight:g} {STEP_KD} ({steps.student_steps * steps.teacher_steps} → {steps.student_steps} steps"
            + (f", {steps.guided:.0%} guided by {steps.guidance[0]:g} to {steps.guidance[1]:g}" if steps.guided else "")
            + f") + {steps.task_share:g} task, scaled to it"
        )
    rate = f"{optimizer.lr:g}, {optimizer.schedule}" + (f", warm-up {optimizer.warmup}" if optimizer.warmup else "")
    teacher = _public(stage.teacher) if wanted.needs_teacher else None
    return stage.name, stage.steps, stage.batch, teacher or "none", rate, " + ".join(terms)


def _loss_rows(metrics: Sequence[Mapping[str, Any]], titles: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the loss at some steps: the first and last that were logged, and some between."""
    count = min(NUM_ROWS, len(metrics))
    chosen = [metrics[round(i * (len(metrics) - 1) / max(count - 1, 1))] for i in range(count)]
    return tuple(
        (f"{m['step']:,}", f"{term(m, 'loss'):.4g}", *(f"{TERMS[title](m):.4g}" for title in titles)) for m in chosen
    )


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    steps = [m["step"] for m in metrics]
    rows = {
        "features, summed" if title == "features" else title: [value(m) for m in metrics]
        for title, value in TERMS.items()
    }
    return [Curve(name, steps, values) for name, values in rows.items() if any(value > 0 for value in values)]
