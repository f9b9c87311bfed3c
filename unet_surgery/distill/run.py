"""A run from beginning to end: stage after stage, step after step; what is saved, logged and shown on the way.

The loop itself is :func:`_train`; what a step does is in ``trainer``, what it computes in ``compute``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unet_surgery.checkpoint import disk
from unet_surgery.data.batches import Batch, Batches, prepared
from unet_surgery.data.keyed import KeyedNoise
from unet_surgery.data.order import Order
from unet_surgery.distill.config import RunConfig
from unet_surgery.distill.finish import write_trained
from unet_surgery.distill.flopuse import FlopUse, flop_use
from unet_surgery.distill.gallery import Gallery
from unet_surgery.distill.identity import identity, refuse_changes
from unet_surgery.distill.metrics import METRICS, Metrics
from unet_surgery.distill.networks import Folders, find_folders
from unet_surgery.distill.runlock import RunLock
from unet_surgery.distill.setup import Base, micro_batches, open_base, set_up
from unet_surgery.distill.state import CHECKPOINTS, TrainingState, load_state, newest_state, save_state
from unet_surgery.distill.trackers import Trackers
from unet_surgery.distill.trainer import Measured, StageTrainer
from unet_surgery.distill.world import World, join_world
from unet_surgery.errors import OutputError, TrainingError
from unet_surgery.version import __version__

__all__ = ["Progress", "Result", "distill"]

log = logging.getLogger(__name__)

STUDENT, PICTURES = "student", "pictures"


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
class _Clock:
    """Time spent training: what is spent on saving and drawing does not count."""

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
        """Leave out what is done meanwhile."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began


@dataclass(slots=True)
class _Run:
    """What all stages share. ``roll_backs`` counts how often the run went back to a checkpoint."""

    config: RunConfig
    world: World
    folder: Path
    folders: Folders
    base: Base
    metrics: Metrics | None
    stop: _Stop
    on_progress: OnProgress
    identity: dict[str, Any]
    gallery: Gallery
    trackers: Trackers
    clock: _Clock = field(default_factory=_Clock)
    roll_backs: int = 0
    use: FlopUse = field(default_factory=FlopUse)

    def close(self) -> None:
        """Close the metrics, whichever are open: a roll-back opens them again."""
        if self.metrics is not None:
            self.metrics.close()


@dataclass(frozen=True, slots=True)
class _Place:
    """A stage's place in its run: its number, and the steps and samples of those before it."""

    number: int
    first_step: int
    first_sample: int


class _RollBack(Exception):  # noqa: N818  # an order, not a fault
    """Too many steps in a row were not finite: back to the last checkpoint."""


def distill(
    config: RunConfig, *, on_progress: OnProgress = lambda _: None, on_bytes: disk.Progress = lambda _done, _all: None
) -> Result:
    """Train a student as ``config`` says, or go on where a run in its output folder stopped.

    Resumed or not, on one process or many, the same run sees the same samples with the same noise; on the same machine,
    versions and processes a resumed run's weights are those of one that never stopped, bit for bit.

    Raises:
        RunError: the run cannot be what the file says, or the folder holds another run.
        TrainingError: losses are not finite again and again, memory is spent, or every checkpoint is damaged.
        SurgeryError: networks or data cannot be used.
    """
    world = join_world()
    try:
        with contextlib.ExitStack() as stack:
            if world.is_main:
                disk.make_folders(Path(config.output))
                stack.enter_context(RunLock(Path(config.output)))
            world.barrier()
            return _run(config, world, stack, on_progress, on_bytes)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the device has no memory left",
            found=str(error).partition("\n")[0],
            hint="a smaller micro_batch: (the batch stays what it is), speed.checkpointing: high_resolution, "
            "or distill --find-batch",
        ) from error
    finally:
        world.leave()


def _run(
    config: RunConfig, world: World, stack: contextlib.ExitStack, on_progress: OnProgress, on_bytes: disk.Progress
) -> Result:
    folder = Path(config.output)
    with world.main_first():  # it fetches, the others find what it fetched
        folders = find_folders(config, on_bytes)
    base = open_base(config, folders, world)
    known = identity(config, folders.student, folders.teachers, base.samples.fingerprint)
    state = _newest(folder, world)
    if state is not None:
        before = {**state.facts["run"], "identity": state.facts["identity"]}
        refuse_changes(before, {**config.model_dump(mode="json"), "identity": known}, str(folder))
        log.warning("going on after step %d of %d", state.step, config.num_steps)
    step = 0 if state is None else state.step
    metrics = Metrics(folder, step=step) if world.is_main else None
    stop = stack.enter_context(_Stop())
    trackers = Trackers(config, folder, known)
    if world.is_main:
        stack.enter_context(trackers)
    gallery = Gallery(folder / PICTURES, config.pictures, base.parts, world)
    run = _Run(config, world, folder, folders, base, metrics, stop, on_progress, known, gallery, trackers)
    stack.callback(run.close)
    place = _Place(0, 0, 0)
    for number, stage in enumerate(config.stages):
        if state is None or state.step < place.first_step + stage.steps:
            state = _stage(run, place, state)
        if state.step < place.first_step + stage.steps:
            return Result(folder, None, state.step, stop.signal)
        place = _Place(number + 1, place.first_step + stage.steps, place.first_sample + stage.steps * stage.batch)
    assert state is not None
    return Result(folder, _finish(run, state), state.step, None)


def _newest(folder: Path, world: World) -> TrainingState | None:
    """Return the state to go on from, the same in all processes. The main one looks for damage and sets it aside."""
    state = newest_state(folder) if world.is_main else None
    step = world.share(None if state is None else state.step)
    return state if world.is_main or step is None else load_state(folder / CHECKPOINTS / f"step-{step:08d}")


def _stage(run: _Run, place: _Place, state: TrainingState | None) -> TrainingState:
    """Train one stage from ``state``, which lies in it or at the end of the one before; return where it stopped."""
    while True:
        run.roll_backs = max(run.roll_backs, 0 if state is None else int(state.facts["roll_backs"]))
        trainer = set_up(run.config, place.number, run.folders, run.base, run.world)
        run.use = flop_use(run.config, place.number, run.folders, run.base, run.world)
        done = 0
        if state is not None and state.step > place.first_step:
            trainer.restore(state.tensors, state.facts["trainer"])
            done = state.step - place.first_step
        elif state is not None:
            trainer.begin_from(state.tensors["weights"])
        del state  # its memory is the trainer's now
        try:
            return _train(run, place, trainer, done)
        except _RollBack:
            run.roll_backs += 1
            state = _newest(run.folder, run.world)
            step = 0 if state is None else state.step
            log.warning("back to step %d, and on with other noise (roll-back %d)", step, run.roll_backs)
            if run.metrics is not None:
                run.metrics.close()
                run.metrics = Metrics(run.folder, step=step)


def _train(run: _Run, place: _Place, trainer: StageTrainer, done: int) -> TrainingState:
    stage, every = run.config.stages[place.number], run.config.save.every
    size, count = micro_batches(run.config, stage, run.world)
    with contextlib.closing(_batches(run, place, done, size, count)) as batches:
        with contextlib.closing(_batches(run, place, done, size, count)) as ahead:
            trainer.calibrate(ahead, count)
        run.clock = _Clock()
        for number in range(done, stage.steps):
            trainer.step(batches, count, number)
            step, is_last = place.first_step + number + 1, number + 1 == stage.steps
            run.clock.images += stage.batch
            is_stopping = run.world.any(run.stop.signal is not None)
            if step % run.config.log.every == 0 or is_last or is_stopping:
                _log(run, place, trainer, number + 1)
            with run.clock.paused():
                if _is_due(run.config, step):
                    trainer.draw(run.gallery, step)
                if is_last or is_stopping:
                    return _save(run, place, trainer, step)
                if step % every == 0:
                    _save_if_possible(run, place, trainer, step)
    raise AssertionError("a stage has at least one step")


def _batches(run: _Run, place: _Place, done: int, size: int, count: int) -> Generator[Batch]:
    """Return this process's micro-batches of a stage, from the step that follows ``done`` finished ones."""
    stage, world, seed = run.config.stages[place.number], run.world, run.config.seed
    batches = Batches(
        run.base.samples,
        Order(len(run.base.samples), seed, run.roll_backs),
        KeyedNoise(seed, run.roll_backs),
        run.base.latent_shape,
        stage.noise.caption_drop,
    )
    starts = (
        place.first_sample + number * stage.batch + (i * world.size + world.rank) * size
        for number in range(done, stage.steps)
        for i in range(count)
    )
    return prepared(batches, starts, size, world.device, workers=run.config.data.workers)


def _is_due(config: RunConfig, step: int) -> bool:
    """True if pictures are drawn after ``step``: at the end, and every so often."""
    every = config.pictures.every
    return bool(config.pictures.prompts) and (step == config.num_steps or (every is not None and step % every == 0))


def _log(run: _Run, place: _Place, trainer: StageTrainer, number: int) -> None:
    measured = trainer.look()
    stage, step = run.config.stages[place.number], place.first_step + number
    rate = run.clock.images_per_second()
    if run.metrics is not None:
        terms = measured.terms
        images = place.first_sample + number * stage.batch
        values: dict[str, float | str] = {
            "stage": stage.name,
            "images": images,
            "loss": measured.loss,
            **terms,
            "grad_norm": measured.grad_norm,
            "lr": trainer.lr(number - 1),
            "bad_steps": measured.bad_steps,
            "images_per_second": rate,
        }
        mfu = run.use.share(rate)
        if mfu is not None:
            values["mfu"] = mfu
        run.metrics.append(step, values)
        run.trackers.log(step, values)
        left = sum(s.steps * s.batch for s in run.config.stages) - images
        run.on_progress(Progress(step, run.config.num_steps, rate, left / rate, measured.loss, mfu))
    if measured.most_bad_in_a_row > run.config.trouble.max_in_a_row:
        if run.roll_backs >= run.config.trouble.max_roll_backs:
            raise _given_up(run, place, trainer, step, measured)
        raise _RollBack


def _given_up(run: _Run, place: _Place, trainer: StageTrainer, step: int, measured: Measured) -> TrainingError:
    """Write what can be seen of the trouble, and return the error that ends the run."""
    path = run.folder / f"dump-{step:08d}.json"
    broken = trainer.broken_weights()
    if run.world.is_main:
        dump = {
            "step": step,
            "stage": run.config.stages[place.number].name,
            "roll_backs": run.roll_backs,
            "bad_steps": measured.bad_steps,
            "most_bad_in_a_row": measured.most_bad_in_a_row,
            "terms": measured.terms,
            "trainer": trainer.facts(),
            "weights_not_finite": broken,
            "run": run.config.model_dump(mode="json"),
        }
        disk.replace_file(path, (json.dumps(dump, indent=2) + "\n").encode(), force=True)
    return TrainingError(
        f"gradients are not finite, {measured.most_bad_in_a_row} steps in a row",
        where=f"step {step}, after {run.roll_backs} roll-backs; what was seen is in {path}",
        expected=f"at most {run.config.trouble.max_in_a_row} in a row (they are skipped)",
        hint="a lower lr, a longer warmup, speed.dtype: bf16 in place of fp16, or look for broken data",
    )


def _save(run: _Run, place: _Place, trainer: StageTrainer, step: int) -> TrainingState:
    """Write a checkpoint, and return the state that it holds, read back where this process has not made it."""
    tensors, facts = trainer.state()
    state = TrainingState(
        step,
        tensors,
        {
            "trainer": facts,
            "stage": place.number,
            "roll_backs": run.roll_backs,
            "run": run.config.model_dump(mode="json"),
            "identity": run.identity,
            "versions": {"unet_surgery": __version__, "torch": torch.__version__},
            "processes": run.world.size,
        },
    )
    folder = run.folder / CHECKPOINTS / f"step-{step:08d}"
    failure: Exception | None = None
    if run.world.is_main:
        try:
            if run.metrics is not None:
                run.metrics.sync()
            save_state(run.folder, state, keep=run.config.save.keep)
        except OutputError as error:
            failure = error
    if run.world.any(failure is not None):
        raise failure or OutputError("the main process could not save", where=str(folder))
    return state if run.world.is_main else load_state(folder)


def _save_if_possible(run: _Run, place: _Place, trainer: StageTrainer, step: int) -> None:
    """A disk that is full does not end a run: it goes on with the checkpoint it has."""
    try:
        _save(run, place, trainer, step)
    except OutputError as error:
        log.warning("no checkpoint at step %d, training goes on: %s", step, error)


def _finish(run: _Run, state: TrainingState) -> Path:
    """Write the finished student, with the averaged weights; the main process does."""
    out = run.folder / STUDENT
    if run.world.is_main:
        lines = [json.loads(line) for line in (run.folder / METRICS).read_text("utf-8").splitlines()]
        pictures = sorted((run.folder / PICTURES).glob("step-*.png"))
        write_trained(
            run.folders.student,
            out,
            run.config,
            state.tensors["ema"],
            num_samples=len(run.base.samples),
            metrics=lines,
            samples=pictures[-1].read_bytes() if pictures else None,
        )
    run.world.barrier()
    return out


class _Stop:
    """While it is entered, SIGTERM and SIGINT are noted: the loop finishes its step and saves. A second one acts."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: Mapping[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _frame: Any) -> None:
        self.signal = number
        self._restore()
        log.warning("%s: finishing this step and saving; once more to stop at once", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
