"""The end of a run: its student as a folder that diffusers loads and the Hub takes; its card knows the training.

Everything but the U-Net's weights is the folder that the run began with.
"""

from __future__ import annotations

import contextlib
import json
import logging
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
from unet_surgery.checkpoint.jsonfile import read_object
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
from unet_surgery.errors import DataError, OutputError, SurgeryError, TrainingError, printable
from unet_surgery.pages.chart import Curve, standalone_svg
from unet_surgery.runtime.load import stored_dtype
from unet_surgery.version import __version__

__all__ = ["last_trained_step", "write_trained"]

log = logging.getLogger(__name__)

CURVES, SAMPLES = "training.svg", "samples.png"
NUM_ROWS = 6
MAX_LINES = 1000
"""Of metrics in training.json, which goes to the Hub with the student."""
STEP_KD = "step distillation"
TERMS: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "task": lambda line: term(line, "task"),
    "output": lambda line: term(line, "output_kd"),
    "features": sum_of_features,
    STEP_KD: lambda line: term(line, "step_kd"),
}
"""A term of the loss, summed up, in a line of metrics; a stage that distils steps has no others."""
MAX_TRAINING_BYTES = 64 << 20
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
    bad_samples: Mapping[str, int] | None = None,
) -> None:
    """Write the student of a finished run to ``out``: ``start`` with new ``weights`` (name → tensor), in its dtype.

    ``num_samples`` is how many the data has, ``metrics`` the lines of metrics.jsonl, ``samples`` a PNG of the last
    pictures, ``bad_samples`` how many samples were replaced by others since the process began, by reason. A student
    that an earlier end of the same run wrote is replaced.

    Raises:
        TrainingError: a weight is not finite in the dtype; nothing was written then.
        OutputError: no room, or ``out`` holds something else.
    """
    bad_samples = bad_samples or {}
    if bad_samples:
        log.warning("%d samples could not be used, and others stood in for them: %s", *_counted(bad_samples))
    unet = unet_folder(start)
    dtype = stored_dtype(unet) if config.init == "weights" else torch.float32
    group = group_file({name: _finite(name, tensor, dtype) for name, tensor in weights.items()})
    copied = _copied(start)
    texts = _texts(start, config, num_samples, metrics, samples, bad_samples)
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


def last_trained_step(student: Path) -> int | None:
    """Return the step after which :func:`write_trained` wrote a student; None where it is not there, or not whole."""
    try:
        step = read_object(student / TRAINING, MAX_TRAINING_BYTES)["metrics"][-1]["step"]
    except (SurgeryError, KeyError, IndexError, TypeError):
        return None
    return step if type(step) is int else None


def _finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an averaged weight in ``dtype``, whose largest number may be smaller than the average's."""
    result = tensor.to(dtype)
    if not torch.isfinite(result).all():
        kind, largest = str(dtype).removeprefix("torch."), tensor.float().abs().max().item()
        raise TrainingError(
            f"the trained student does not fit {kind}, the dtype that it began in",
            where=printable(name),
            expected=f"numbers of at most {torch.finfo(dtype).max:g}",
            found=f"{largest:g}",
            hint="a run that begins with a student in fp32 (prune --dtype fp32) ends in one; this run's checkpoints "
            "keep its average as it is",
        )
    return result


def _counted(bad_samples: Mapping[str, int]) -> tuple[int, str]:
    reasons = sorted(bad_samples.items(), key=lambda item: (-item[1], item[0]))
    return sum(bad_samples.values()), ", ".join(f"{count} {reason}" for reason, count in reasons)


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
    start: Path,
    config: RunConfig,
    num_samples: int,
    metrics: Sequence[Mapping[str, Any]],
    samples: bytes | None,
    bad_samples: Mapping[str, int],
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
        "bad_samples": dict(bad_samples),
    }
    texts = {
        CARD: trained_card(card, plan, facts).encode(),
        TRAINING: _with_metrics(training, metrics).encode(),
        CURVES: standalone_svg(_curves(metrics), title="loss", x_label="step", log=True).encode(),
    }
    return texts if samples is None else {**texts, SAMPLES: samples}


def _with_metrics(training: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return JSON of both, a line of metrics on one of its own; of very many an even choice, with the first and last.

    ``metrics_thinned`` says how many there were; it is null where all of them are there.
    """
    chosen = _spread(metrics, MAX_LINES)
    thinned = {"lines": len(metrics), "kept": len(chosen)} if len(chosen) < len(metrics) else None
    head = json.dumps({**training, "metrics_thinned": thinned}, indent=1).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(line) for line in chosen)
    return f'{head},\n "metrics": [\n  {lines}\n ]\n}}\n'


def _spread(metrics: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Return at most ``count`` lines, evenly spaced, the first and last among them."""
    count = min(count, len(metrics))
    return [metrics[round(i * (len(metrics) - 1) / max(count - 1, 1))] for i in range(count)]


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
    """Return a Hub id or a built-in name as it is, and of a path its last part; what lies here is no Hub id."""
    if name is None or name.startswith("hub:"):
        return name
    path = Path(os.path.expanduser(name))
    return name if is_hub_id(name) and not path.exists() else path.name


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
    return tuple(
        (f"{m['step']:,}", f"{term(m, 'loss'):.4g}", *(f"{TERMS[title](m):.4g}" for title in titles))
        for m in _spread(metrics, NUM_ROWS)
    )


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    steps = [m["step"] for m in metrics]
    rows = {
        "features, summed" if title == "features" else title: [value(m) for m in metrics]
        for title, value in TERMS.items()
    }
    return [Curve(name, steps, values) for name, values in rows.items() if any(value > 0 for value in values)]
