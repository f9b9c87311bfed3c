"""The loop: step, log, draw, save, and when to stop."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unet_surgery.checkpoint import disk
from unet_surgery.data.batches import Batch, prepared
from unet_surgery.distill.config import RunConfig
from unet_surgery.distill.dealing import deal
from unet_surgery.distill.flopuse import FlopUse
from unet_surgery.distill.gallery import Gallery
from unet_surgery.distill.journal import Journal, NoJournal
from unet_surgery.distill.setup import Base
from unet_surgery.distill.state import TrainingState, save_state
from unet_surgery.distill.step_compute import guided_steps
from unet_surgery.distill.stop import Stop
from unet_surgery.distill.trainer import Measured, StageTrainer
from unet_surgery.distill.world import World
from unet_surgery.errors import OutputError, TrainingError
from unet_surgery.version import __version__

__all__ = ["OnProgress", "Place", "Progress", "Result", "RollBack", "Run", "train"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: what a bar shows."""

    step: int
    num_steps: int
    images_per_second: float
    seconds_left: float
    loss: float
    mfu: float | None
    """The share of the device's peak that the model's own operations reach; None where the peak is not known."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a run. ``stopped_by`` is the signal that ended it early; then ``student`` is None."""

    folder: Path
    student: Path | None
    step: int
    stopped_by: int | None


OnProgress = Callable[[Progress], None]


@dataclass(slots=True)
class Clock:
    """Time spent training: what is spent on saving and drawing does not count."""

    device: torch.device
    started: float = field(default_factory=time.monotonic)
    images: int = 0

    def images_per_second(self) -> float:
        """Return the rate since the last call."""
        now = time.monotonic()
        rate = self.images / max(now - self.started, 1e-9)
        self.started, self.images = now, 0
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done meanwhile, but not the steps that the device has still to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began


@dataclass(slots=True)
class Run:
    """What all stages share. ``roll_backs`` counts how often the run went back to a checkpoint."""

    config: RunConfig
    world: World
    folder: Path
    base: Base
    journal: Journal | NoJournal
    stop: Stop
    on_progress: OnProgress
    identity: dict[str, Any]
    gallery: Gallery
    roll_backs: int = 0
    use: FlopUse = field(default_factory=FlopUse)


@dataclass(frozen=True, slots=True)
class Place:
    """A stage's place in its run: its number, and the steps and samples of those before it."""

    number: int
    first_step: int
    first_sample: int


class RollBack(Exception):  # noqa: N818  # an order, not a fault
    """Too many steps in a row were not finite: back to the last checkpoint."""


def train(run: Run, place: Place, trainer: StageTrainer, done: int) -> TrainingState:
    """Train a stage of which ``done`` steps are finished, to its end or until a signal; return where it stopped.

    Raises:
        RollBack: too many steps in a row were not finite.
        TrainingError: the same, once too often.
        OutputError: what was reached cannot be saved.
    """
    stage, config = run.config.stages[place.number], run.config
    size, count = deal(config, stage, run.world.size)
    with contextlib.closing(_batches(run, place, done, size, count)) as ahead:
        trainer.calibrate(ahead, count)
    clock = Clock(run.world.device)
    with contextlib.closing(_batches(run, place, done, size, count)) as batches:
        for number in range(done, stage.steps):
            trainer.step(batches, count, number)
            step, is_last = place.first_step + number + 1, number + 1 == stage.steps
            clock.images += stage.batch
            is_stopping = run.world.any(run.stop.signal is not None)
            if step % config.log.every == 0 or is_last:
                _log(run, place, trainer, number + 1, clock)
            if is_last:
                trainer.end()
            if _is_drawn(config, step):
                with clock.paused():
                    trainer.draw(run.gallery, step, place.number)
            if is_last or is_stopping:
                return _at_end(_save(run, place, trainer, step))
            if step % config.save.every == 0:
                with clock.paused():
                    _save_if_possible(run, place, trainer, step)
    raise AssertionError("a stage has at least one step")


def _batches(run: Run, place: Place, done: int, size: int, count: int) -> Generator[Batch]:
    """Return this process's micro-batches of a stage, from the step that follows ``done`` finished ones."""
    stage, world = run.config.stages[place.number], run.world
    batches = run.base.batches(
        run.config.seed,
        attempt=run.roll_backs,
        caption_drop=stage.noise.caption_drop,
        guided=guided_steps(stage, place.first_sample),
    )
    starts = (
        place.first_sample + number * stage.batch + (i * world.size + world.rank) * size
        for number in range(done, stage.steps)
        for i in range(count)
    )
    return prepared(batches, starts, size, world.device, workers=run.config.data.workers)


def _is_drawn(config: RunConfig, step: int) -> bool:
    """True if pictures are drawn after ``step``: at the end, and every so often."""
    every = config.pictures.every
    return bool(config.pictures.prompts) and (step == config.num_steps or (every is not None and step % every == 0))


def _log(run: Run, place: Place, trainer: StageTrainer, number: int, clock: Clock) -> None:
    measured = trainer.look()
    stage, step = run.config.stages[place.number], place.first_step + number
    rate = clock.images_per_second()
    mfu = run.use.share(rate)
    images = place.first_sample + number * stage.batch
    values: dict[str, float | str] = {
        "stage": stage.name,
        "images": images,
        "loss": measured.loss,
        **measured.terms,
        "grad_norm": measured.grad_norm,
        "lr": trainer.lr(number - 1),
        "bad_steps": measured.bad_steps,
        "images_per_second": rate,
        **({} if mfu is None else {"mfu": mfu}),
    }
    run.journal.write(step, values)
    if run.world.is_main:
        left = run.config.num_samples - images
        run.on_progress(Progress(step, run.config.num_steps, rate, left / rate, measured.loss, mfu))
    if measured.most_bad_in_a_row > run.config.trouble.max_in_a_row:
        if run.roll_backs >= run.config.trouble.max_roll_backs:
            raise _given_up(run, place, trainer, step, measured)
        raise RollBack


def _given_up(run: Run, place: Place, trainer: StageTrainer, step: int, measured: Measured) -> TrainingError:
    """Write what can be seen of the trouble, and return the error that ends the run."""
    path = run.folder / f"dump-{step:08d}.json"
    dump = {
        "step": step,
        "stage": run.config.stages[place.number].name,
        "roll_backs": run.roll_backs,
        "bad_steps": measured.bad_steps,
        "most_bad_in_a_row": measured.most_bad_in_a_row,
        "terms": measured.terms,
        "trainer": trainer.facts(),
        "weights_not_finite": trainer.broken_weights(),
        "run": run.config.model_dump(mode="json"),
    }
    if run.world.is_main:
        with contextlib.suppress(OSError):  # what it is about matters more
            disk.replace_file(path, (json.dumps(dump, indent=2) + "\n").encode(), force=True)
    return TrainingError(
        f"gradients are not finite, {measured.most_bad_in_a_row} steps in a row",
        where=f"step {step}, after {run.roll_backs} roll-backs; what was seen is in {path}",
        expected=f"at most {run.config.trouble.max_in_a_row} in a row (they are skipped)",
        hint="a lower lr, a longer warmup, speed.dtype: bf16 in place of fp16, or look for broken data",
    )


def _save(run: Run, place: Place, trainer: StageTrainer, step: int) -> TrainingState:
    """Write a checkpoint and return it; in the main process with its tensors, which are the trainer's own.

    Raises:
        OutputError: the disk refuses; the checkpoints that were there are as they were.
    """
    tensors, facts = trainer.state()
    facts = {
        "trainer": facts,
        "stage": place.number,
        "roll_backs": run.roll_backs,
        "run": run.config.model_dump(mode="json"),
        "identity": run.identity,
        "versions": {"unet_surgery": __version__, "torch": torch.__version__},
        "processes": run.world.size,
    }
    state = TrainingState(step, tensors, facts)
    run.world.on_main(lambda: _write(run, state))
    return state


def _at_end(state: TrainingState) -> TrainingState:
    """Return what the next stage or the finished student needs of a state, on the host, so that the device is free."""
    kept = {name: state.tensors.get(name, {}) for name in ("weights", "ema")}
    on_host = {name: {key: tensor.cpu() for key, tensor in group.items()} for name, group in kept.items()}
    return TrainingState(state.step, on_host, state.facts)


def _write(run: Run, state: TrainingState) -> None:
    try:
        run.journal.sync()
        save_state(run.folder, state, keep=run.config.save.keep)
    except OSError as error:
        raise OutputError("the checkpoint cannot be written", where=str(run.folder), found=error.strerror) from error


def _save_if_possible(run: Run, place: Place, trainer: StageTrainer, step: int) -> None:
    """A disk that is full does not end a run: it goes on with the checkpoint it has."""
    try:
        _save(run, place, trainer, step)
    except (OutputError, TrainingError) as error:
        log.warning("no checkpoint at step %d, training goes on: %s", step, error)
