"""A run from beginning to end: what is loaded, stage after stage, what a roll-back does, and the finished student.

The steps themselves are in ``loop``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
from pathlib import Path

import torch

from unet_surgery.checkpoint import disk
from unet_surgery.distill.config import RunConfig
from unet_surgery.distill.ema import caught_up
from unet_surgery.distill.finish import last_trained_step, write_trained
from unet_surgery.distill.flopuse import flop_use
from unet_surgery.distill.gallery import Gallery
from unet_surgery.distill.identity import identity, refuse_changes
from unet_surgery.distill.journal import Journal, NoJournal
from unet_surgery.distill.kernels import kernels
from unet_surgery.distill.loop import OnProgress, Place, Progress, Result, RollBack, Run, train
from unet_surgery.distill.metrics import METRICS, last_step
from unet_surgery.distill.networks import Folders, find_folders
from unet_surgery.distill.runlock import RunLock
from unet_surgery.distill.setup import open_base, set_up
from unet_surgery.distill.state import TrainingState, newest_facts, newest_state
from unet_surgery.distill.stop import Stop
from unet_surgery.distill.world import World, join_world
from unet_surgery.errors import RunError, TrainingError

__all__ = ["Progress", "Result", "distill"]

log = logging.getLogger(__name__)

STUDENT, PICTURES = "student", "pictures"


def distill(
    config: RunConfig, *, on_progress: OnProgress = lambda _: None, on_bytes: disk.Progress = lambda _done, _all: None
) -> Result:
    """Train a student as ``config`` says, or go on where a run in its output folder stopped.

    Resumed or not, on one process or many, the same run sees the same samples with the same noise; on a CPU (or a GPU
    with ``speed.deterministic``), with the same versions, threads and processes, a resumed run's weights are those of
    one that never stopped, bit for bit.

    Raises:
        RunError: the run cannot be what the file says, or the folder holds another run.
        TrainingError: losses are not finite again and again, memory is spent, or every checkpoint is damaged.
        SurgeryError: networks or data cannot be used.
    """
    world = join_world()
    try:
        with contextlib.ExitStack() as stack, kernels(config.speed):
            world.on_main(lambda: _own(Path(config.output), stack))
            result = _run(config, world, stack, on_progress, on_bytes)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the device has no memory left",
            found=str(error).partition("\n")[0],
            hint="a smaller micro_batch: (the batch stays what it is), speed.checkpointing: high_resolution, "
            "or distill --find-batch",
        ) from error
    except RuntimeError as error:
        if world.size > 1 and _is_of_another(error):
            raise TrainingError("another process of the run ended", hint="its own message says why") from error
        raise
    world.leave()
    return result


def _is_of_another(error: RuntimeError) -> bool:
    """True if a process that waited for another found it gone; gloo's errors have no type of their own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _own(folder: Path, stack: contextlib.ExitStack) -> None:
    disk.make_folders(folder)
    stack.enter_context(RunLock(folder))


def _run(
    config: RunConfig, world: World, stack: contextlib.ExitStack, on_progress: OnProgress, on_bytes: disk.Progress
) -> Result:
    folder = Path(config.output)
    folders = world.on_main(lambda: find_folders(config, on_bytes))  # it fetches, the others find what it fetched
    folders = folders or find_folders(config, lambda _done, _all: None)
    there = Result(folder, folder / STUDENT, config.num_steps, None)
    if world.share(world.on_main(lambda: _is_finished(config, folders, None))):
        return there
    base = open_base(config, folders, world)
    known = identity(config, folders, base.samples.fingerprint)
    if world.share(world.on_main(lambda: _is_finished(config, folders, base.samples.fingerprint))):
        return there
    state = _newest(folder, world)
    if state is not None:
        _continue(config, state, known, folder)
    else:
        world.on_main(lambda: _begin(config, folder))
    step = 0 if state is None else state.step
    stop = stack.enter_context(Stop())
    journal = world.on_main(lambda: stack.enter_context(Journal(config, folder, step))) or NoJournal()
    gallery = Gallery(folder / PICTURES, config.pictures, base.parts, world.device)
    run = Run(config, world, folder, base, journal, stop, on_progress, known, gallery)
    place = Place(0, 0, 0)
    for number, stage in enumerate(config.stages):
        end = place.first_step + stage.steps
        if state is None or state.step < end:
            held, state = [state], None
            state = _stage(run, folders, place, held)
        if state.step < end or (end < config.num_steps and world.any(stop.signal is not None)):
            return Result(folder, None, state.step, world.highest(stop.signal or 0))
        place = Place(number + 1, end, place.first_sample + stage.steps * stage.batch)
    assert state is not None
    ended = state
    world.on_main(lambda: _finish(run, folders, ended))
    return Result(folder, folder / STUDENT, ended.step, None)


def _newest(folder: Path, world: World) -> TrainingState | None:
    """Return the state to go on from; the main process alone has its tensors. What is damaged, it sets aside."""
    state = world.on_main(lambda: newest_state(folder))
    shared = world.share(None if state is None else (state.step, state.facts))
    if state is not None or shared is None:
        return state
    return TrainingState(shared[0], {}, shared[1])


def _continue(config: RunConfig, state: TrainingState, known: dict[str, object], folder: Path) -> None:
    """Say that a run goes on, and refuse what would make it another.

    Raises:
        RunError: names the keys that differ, or that the run is longer already.
    """
    before = {**state.facts["run"], "identity": state.facts["identity"]}
    refuse_changes(before, {**config.model_dump(mode="json"), "identity": known}, str(folder))
    if state.step > config.num_steps:
        raise RunError(
            "the run in this folder is longer already",
            where=str(folder),
            expected=f"at least {state.step} steps",
            found=f"{config.num_steps}",
            hint="choose another output: for a shorter run",
        )
    log.warning("going on after step %d of %d", state.step, config.num_steps)


def _is_finished(config: RunConfig, folders: Folders, data: str | None) -> bool:
    """Say that a run is finished, if it is: the last step's checkpoint is there, and the student written at that step.

    ``data`` is the fingerprint of the run's data; None before it is opened, which data that is called as it was when
    the run ended does not need.

    Raises:
        RunError: names the keys by which this would be another run.
    """
    folder = Path(config.output)
    found = newest_facts(folder)
    if found is None or found[0] != config.num_steps or last_trained_step(folder / STUDENT) != config.num_steps:
        return False
    facts, wanted = found[1], config.model_dump(mode="json")
    if data is None and facts["run"]["data"] == wanted["data"]:
        data = facts["identity"]["data"]
    if data is None:
        return False
    before = {**facts["run"], "identity": facts["identity"]}
    refuse_changes(before, {**wanted, "identity": identity(config, folders, data)}, str(folder))
    log.warning("already finished: step %d of %d", config.num_steps, config.num_steps)
    return True


def _begin(config: RunConfig, folder: Path) -> None:
    """Say that a run begins anew where an earlier one saved nothing, and refuse where it did.

    Raises:
        RunError: the folder holds a finished student, or metrics of a run that had saved: its checkpoints are gone.
    """
    step = last_step(folder)
    if (folder / STUDENT).exists() or step >= config.save.every:
        raise RunError(
            "an earlier run's checkpoints are gone, and a new one would write over what is left",
            where=str(folder),
            expected=f"checkpoints, or neither {STUDENT}/ nor metrics",
            found=f"{STUDENT}/" if (folder / STUDENT).exists() else f"{METRICS} up to step {step}",
            hint="choose another output:, or move the folder away",
        )
    if step:
        log.warning("an earlier run ended after step %d with no checkpoint: beginning anew", step)


def _stage(run: Run, folders: Folders, place: Place, held: list[TrainingState | None]) -> TrainingState:
    """Train one stage from the state in ``held``, which lies in it or at the end of the one before.

    Returns where it stopped. The list is emptied: what it held is gigabytes, and the trainer's from then on.
    """
    is_again = False
    while True:
        if run.config.speed.compile:
            torch._dynamo.reset()  # else its limit of graphs for one function is spent by the stages together
        state = held.pop()
        run.roll_backs = max(run.roll_backs, 0 if state is None else int(state.facts["roll_backs"]))
        is_within = state is not None and state.step > place.first_step
        facts = state.facts["trainer"] if state is not None and is_within else None
        frozen = None if facts is None else facts["pairs"]
        trainer = set_up(run.config, place.number, folders, run.base, run.world, frozen=frozen)
        run.use = flop_use(run.config, place.number, folders, run.base, run.world)
        done = 0
        if state is not None and facts is not None:
            trainer.restore(state.tensors, facts)
            if is_again:
                trainer.forget_trouble()
            done = state.step - place.first_step
        elif state is not None:
            _refuse_earlier(state, place)
            trainer.begin_from(state.tensors.get("weights", {}))
        del state
        try:
            return train(run, place, trainer, done)
        except RollBack:
            run.roll_backs += 1
            is_again = True
        del trainer  # before its successor is made: both at once may be more than the device holds
        _free()
        held.append(_newest(run.folder, run.world))
        step = 0 if held[0] is None else held[0].step
        log.warning("back to step %d, and on with other noise (roll-back %d)", step, run.roll_backs)
        run.journal.go_back(step)


def _free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _refuse_earlier(state: TrainingState, place: Place) -> None:
    """A stage begins where the one before ended, not in its midst."""
    if state.step != place.first_step:
        raise TrainingError(
            "the checkpoint to go back to lies in an earlier stage",
            found=f"step {state.step}, and this stage begins after step {place.first_step}",
            hint="the same command goes on from there",
        )


def _finish(run: Run, folders: Folders, state: TrainingState) -> None:
    """Write the finished student, with the averaged weights."""
    steps = run.config.stages[-1].steps
    average = caught_up(state.tensors["ema"], state.tensors["weights"], steps, run.config.ema)
    lines = [json.loads(line) for line in (run.folder / METRICS).read_text("utf-8").splitlines()]
    pictures = sorted((run.folder / PICTURES).glob("step-*.png"))
    write_trained(
        folders.student,
        run.folder / STUDENT,
        run.config,
        average,
        num_samples=len(run.base.samples),
        metrics=lines,
        samples=pictures[-1].read_bytes() if pictures else None,
        bad_samples=run.base.bad_samples,
    )
