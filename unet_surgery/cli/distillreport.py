"""What ``distill --dry-run`` and ``--find-batch`` print."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from unet_surgery.cli.format import gigabytes
from unet_surgery.cli.sink import say, show, show_json, table

if TYPE_CHECKING:
    from unet_surgery.distill.config import RunConfig
    from unet_surgery.distill.dryrun import DryRun, StageOnPaper
    from unet_surgery.distill.findbatch import Found, Trial

__all__ = ["device_name", "report_dry_run", "report_find_batch"]

USUAL_USE = 0.4
"""The share of a peak that good training code reaches: what is assumed where no rate is given."""
DRIVER = Path("/proc/driver/nvidia/gpus")
WAIT_SECONDS = 10
MEMORY_ITEMS = ("weights", "masters", "gradients", "optimizer", "average", "teacher", "parts", "activations")


def report_dry_run(config: RunConfig, *, tflops: float | None, num_processes: int, as_json: bool) -> bool:
    """Print what a run costs; return False if it would be refused."""
    from unet_surgery.distill.dryrun import dry_run

    rate, source = _rate(config, tflops)
    paper = dry_run(config, rate=rate, num_processes=num_processes)
    if as_json:
        show_json(paper.to_json())
    else:
        _show(paper, source)
    return not paper.refused


def _rate(config: RunConfig, tflops: float | None) -> tuple[float | None, str]:
    """Return FLOP/s of a device, and in words where they come from."""
    from unet_surgery.distill.costs import peak_flops

    if tflops is not None:
        return tflops * 1e12, f"{tflops:g} TFLOP/s, as given"
    dtype, name = config.speed.dtype, None
    peak = None if config.log.peak_tflops is None else config.log.peak_tflops * 1e12
    if peak is None:
        name = device_name()
        peak = None if name is None else peak_flops(name, dtype)
    if peak is None:
        found = f"the {dtype} rate of {name!r} is not known" if name else "there is no GPU"
        return None, f"{found}: give the rate that training reaches, --tflops 350"
    of = "log.peak_tflops" if name is None else f"the {dtype} peak of {name}"
    return peak * USUAL_USE, f"{peak * USUAL_USE / 1e12:.3g} TFLOP/s: {USUAL_USE:.0%} of {of}"


def device_name(driver: Path = DRIVER) -> str | None:
    """Return what the first NVIDIA GPU is called, without torch; None where there is none."""
    for path in sorted(driver.glob("*/information")) if driver.is_dir() else ():
        for line in path.read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                return value.strip()
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = asked.stdout.splitlines() if asked.returncode == 0 else []
    return names[0].strip() if names else None


def _show(paper: DryRun, source: str) -> None:
    from unet_surgery.lower import quantity

    for line in paper.refused:  # first: what follows fills a screen
        say(f"would be refused: {line}")
    height, width = paper.latent_size
    data = "data of unknown number" if paper.num_samples is None else f"{paper.num_samples:,} samples"
    show(f"student {paper.student}: {quantity(paper.student_params)} parameters; {data}, latents of {height} × {width}")
    for stage in paper.stages:
        _show_stage(paper, stage)
    disk = paper.disk
    show(
        f"disk: {gigabytes(disk.checkpoint)} a checkpoint, {gigabytes(disk.checkpoints)} at most; "
        f"student U-Net {gigabytes(disk.student)}; cache "
        + (gigabytes(disk.cache) if disk.cache is not None else f"{paper.cache_sample_bytes / 1024:.1f} KiB a sample")
    )
    devices = f" on each of {paper.processes} devices" if paper.processes > 1 else ""
    show(f"time: {paper.hours:,.1f} hours at {source}{devices}" if paper.hours is not None else f"time: {source}")
    for note in paper.notes:
        say(f"note: {note}")
    if paper.refused:
        say(f"this run would be refused, for {_counted(len(paper.refused), 'reason')}: see the beginning")


def _show_stage(paper: DryRun, stage: StageOnPaper) -> None:
    from unet_surgery.lower import quantity

    teacher = "" if stage.teacher_params is None else f", teacher {stage.teacher} ({quantity(stage.teacher_params)})"
    seen = "" if paper.num_samples is None else f", {stage.images / paper.num_samples:.1f} epochs"
    show(
        f"\nstage {stage.name}{teacher}: {stage.steps:,} steps × {stage.batch} samples "
        f"= {quantity(stage.images)} samples{seen}\n{_dealt(stage, paper.processes)}"
    )
    flops = stage.flops
    rows = [
        (name, quantity(value), f"{value / flops.total:.1%}")
        for name, value in (
            ("student, forward and backward", flops.student),
            ("recomputed in the backward", flops.recomputed),
            ("teacher", flops.teacher),
            ("VAE encoder", flops.vae),
            ("text encoder", flops.text),
        )
        if value
    ]
    rows.append(("a sample", quantity(flops.total), f"× {quantity(stage.images)}"))
    rows.append(("the stage", quantity(flops.total * stage.images), ""))
    show(table(("operations", "FLOP", ""), rows, right=(1, 2)))
    held = [(name, getattr(stage.memory, name)) for name in MEMORY_ITEMS]
    memory = [(name + (" (estimated)" if name == "activations" else ""), gigabytes(v)) for name, v in held if v]
    show(table(("memory of a device", ""), [*memory, ("in all", gigabytes(stage.memory.total))], right=(1,)))
    if stage.pairs is None:
        show("feature pairs: found on the first batches, by similarity")
    elif stage.pairs:
        pairs = [(pair.student, pair.teacher, " × ".join(map(str, pair.shape))) for pair in stage.pairs]
        show(table(("student's activation", "compared with the teacher's", "shape"), pairs))
    if stage.hours is not None and len(paper.stages) > 1:
        show(f"{stage.hours:,.3g} hours")


def _dealt(stage: StageOnPaper, processes: int) -> str:
    """Say in words of what a step's samples are made up."""
    each = " on each device" if processes > 1 else ""
    if stage.micro_batch * stage.accumulated * processes != stage.batch:
        return f"a step: {stage.batch} samples, which cannot be dealt out in micro-batches of {stage.micro_batch}{each}"
    return (
        f"a step: {_counted(stage.accumulated, 'micro-batch', 'es')} of {_counted(stage.micro_batch, 'sample')}{each}"
    )


def _counted(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"


def report_find_batch(config: RunConfig, *, num_processes: int = 1, quiet: bool, as_json: bool) -> None:
    """Try micro-batches and print what fits."""
    from dataclasses import asdict

    from unet_surgery.cli.sink import progress_bar
    from unet_surgery.distill.findbatch import MEMORY_SHARE, find_batch
    from unet_surgery.errors import TrainingError

    def on_trial(trial: Trial) -> None:
        if not quiet:
            say(f"micro-batch {trial.micro_batch}: {_outcome(trial)}")

    with progress_bar("fetching", quiet) as on_bytes:
        found = find_batch(config, num_processes=num_processes, on_trial=on_trial, on_bytes=on_bytes)
    if as_json:
        show_json(asdict(found))
    else:
        rows = [(str(t.micro_batch), *_cells(t)) for t in sorted(found.trials, key=lambda t: t.micro_batch)]
        show(table(("micro-batch", "", "images/s", "of the peak", "GB"), rows, right=(0, 2, 3, 4)))
        if found.limit is not None:
            say(
                f"on a CPU, what needs more than {found.limit / 1e9:.1f} GB ({MEMORY_SHARE:.0%} of the memory that was "
                "free) does not count as fitting, and is not tried"
            )
        if found.micro_batch is not None:
            say(f"the batch stays what it is: {found.batch} = {_factors(found, found.micro_batch)}")
            fastest = found.fastest
            if fastest is not None and fastest.micro_batch != found.micro_batch:
                say(f"micro_batch: {fastest.micro_batch} was the fastest")
            if num_processes > 1:
                say(
                    f"this is of one process, and {num_processes} exchange gradients besides, which is not tried:  "
                    f"accelerate launch --num_processes {num_processes} --multi_gpu -m unet_surgery.distill RUN.yaml"
                )
            show(f"micro_batch: {found.micro_batch}")
    if found.micro_batch is None:
        raise TrainingError(
            "not even the smallest micro-batch fits the device",
            where=found.device,
            hint="speed.checkpointing: full, optimizer.kind: adamw8bit, or a smaller student",
        )


def _factors(found: Found, size: int) -> str:
    """Return of what the batch is the product."""
    accumulated = found.batch // (size * found.num_processes)
    shared = f" × {found.num_processes} processes" if found.num_processes > 1 else ""
    return f"{size} × {accumulated}{shared}"


def _outcome(trial: Trial) -> str:
    if trial.images_per_second is None:
        return "does not fit"
    return f"{trial.images_per_second:.3g} images/s" + ("" if trial.fits else ", but over the limit")


def _cells(trial: Trial) -> tuple[str, str, str, str]:
    return (
        "fits" if trial.fits else "does not fit",
        "" if trial.images_per_second is None else f"{trial.images_per_second:.3g}",
        "" if trial.mfu is None else f"{trial.mfu:.1%}",
        "" if trial.num_bytes is None else f"{trial.num_bytes / 1e9:.2f}",
    )
