"""``find_batch``: which micro-batch fits the device, by real steps of a run; nothing is written.

On a GPU a size fits if steps of it end without OutOfMemoryError. A CPU has no such error: its kernel ends the process.
So there a size is not even tried if it would take more memory than ``MEMORY_SHARE`` of what Linux calls available when
the search begins (/proc/meminfo; no psutil is needed), going by what the last size took more than nothing did.

Steps are whole: teacher, student, loss, backward, AdamW, average, of two micro-batches, as a run that accumulates has
them. Their data is read once, so the images a second are the device's, without the reading. Where some steps are guided
(``step_kd``), both kinds are taken, and the images a second are those of their mixture. What a run needs beside its
steps is not tried: pictures of prompts on the way, other programs on the device.
"""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from unet_surgery.checkpoint import disk
from unet_surgery.data.batches import Batch
from unet_surgery.distill.batchsearch import largest_fitting
from unet_surgery.distill.config import RunConfig, Stage
from unet_surgery.distill.dealing import deal, micro_batch_sizes
from unet_surgery.distill.fit import check_processes
from unet_surgery.distill.flopuse import FlopUse, flop_use
from unet_surgery.distill.kernels import kernels
from unet_surgery.distill.networks import find_folders
from unet_surgery.distill.setup import Base, open_base, set_up
from unet_surgery.distill.trainer import StageTrainer
from unet_surgery.distill.world import World, join_world
from unet_surgery.errors import TrainingError, UsageError, printable
from unet_surgery.runtime.machine import available_bytes as memory_of

__all__ = ["MEMORY_SHARE", "Found", "Trial", "available_bytes", "find_batch"]

MEMORY_SHARE = 0.8
"""Of the available memory, on a CPU."""
WARM_UP, TIMED, ACCUMULATED = 1, 2, 2
SAMPLING_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Trial:
    """One size tried. ``num_bytes`` is the highest that memory rose to, or, where it was not run, would have."""

    micro_batch: int
    fits: bool
    num_bytes: int | None
    images_per_second: float | None
    mfu: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What was found: ``micro_batch`` is the largest that fits, None if none does. ``limit`` is a CPU's, in bytes."""

    device: str
    stage: str
    batch: int
    num_processes: int
    """Those of the run that is to come; memory is that of one."""
    micro_batch: int | None
    limit: int | None
    trials: tuple[Trial, ...]

    @property
    def fastest(self) -> Trial | None:
        """The trial with the most images a second."""
        ran = [trial for trial in self.trials if trial.images_per_second is not None]
        return max(ran, key=lambda trial: trial.images_per_second or 0.0, default=None)


OnTrial = Callable[[Trial], None]


def find_batch(
    config: RunConfig,
    *,
    num_processes: int = 1,
    limit: int | None = None,
    on_trial: OnTrial = lambda _: None,
    on_bytes: disk.Progress = lambda _done, _all: None,
) -> Found:
    """Try steps of the run's heaviest stage; sizes are those by which the batches of all stages can be dealt out.

    The steps are of this one process. With DDP each of ``num_processes`` takes what this one does, but for the buckets
    in which gradients are exchanged; with FSDP2 less. Sizes are then those that deal out the batches to all of them.
    ``limit`` is how many bytes this process may take on a CPU, in place of ``MEMORY_SHARE`` of what is
    available.

    Raises:
        UsageError: this is one of many processes; the micro-batch of one is that of each.
        RunError: a batch cannot be dealt out to ``num_processes``, or the optimizer works in one only.
        RunError, TrainingError, SurgeryError: as ``distill``, before its first step.
    """
    world = join_world()
    try:
        if world.size > 1:
            raise UsageError(
                "the batch is looked for in one process",
                found=f"{world.size}",
                hint=f"run without accelerate launch: distill RUN.yaml --find-batch --processes {world.size}",
            )
        check_processes(config, num_processes)
        any_size = config.model_copy(update={"micro_batch": None})
        for stage in config.stages:
            deal(any_size, stage, num_processes)  # refuses a batch that the processes do not divide
        sizes = micro_batch_sizes(config, num_processes)
        with kernels(config.speed):
            search, stage = _search(config, world, limit, on_trial, on_bytes)
            found = largest_fitting(sizes, search.fits)
        trials = tuple(search.trials)
        return Found(_named(world.device), stage.name, stage.batch, num_processes, found, search.limit, trials)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the networks alone do not fit the device",
            found=printable(str(error).partition("\n")[0]),
            hint="optimizer.kind: adamw8bit, or a smaller student",
        ) from error
    finally:
        world.leave()


def _search(
    config: RunConfig, world: World, limit: int | None, on_trial: OnTrial, on_bytes: disk.Progress
) -> tuple[_Search, Stage]:
    number, stage = _heaviest(config)
    folders = find_folders(config, on_bytes)
    base = open_base(config, folders, world)
    trainer = set_up(config, number, folders, base, world)
    use = flop_use(config, number, folders, base, world)
    is_cpu = world.device.type == "cpu"
    if is_cpu and limit is None:
        limit = int(MEMORY_SHARE * available_bytes()) + _resident_bytes()
    return _Search(config, stage, base, trainer, world, use, limit if is_cpu else None, on_trial), stage


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return how much memory Linux could give to a program now.

    Raises:
        TrainingError: the system does not say.
    """
    found = memory_of(meminfo)
    if found is None:
        raise TrainingError("the system does not say how much memory is free", where=f"{meminfo}, MemAvailable")
    return found


def _heaviest(config: RunConfig) -> tuple[int, Stage]:
    """Return the first stage with the most networks and terms in memory."""

    def weight(item: tuple[int, Stage]) -> tuple[bool, bool, bool]:
        wanted = item[1].objectives
        return wanted.may_be_guided, wanted.needs_teacher, wanted.feature_kd.weight > 0

    return max(enumerate(config.stages), key=weight)


class _Search:
    """What a trial does to the device, and what the trials so far have shown."""

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        base: Base,
        trainer: StageTrainer,
        world: World,
        use: FlopUse,
        limit: int | None,
        on_trial: OnTrial,
    ) -> None:
        self.limit = limit
        self.trials: list[Trial] = []
        self._trainer, self._device, self._use, self._on_trial = trainer, world.device, use, on_trial
        self._batches = base.batches(config.seed, caption_drop=stage.noise.caption_drop)
        self._guided = stage.objectives.step_kd.guided if stage.objectives.may_be_guided else 0.0
        self._empty_bytes = _resident_bytes()

    def fits(self, size: int) -> bool:
        """Return True if steps of ``size`` end."""
        foreseen = self._foreseen(size)
        if self.limit is not None and foreseen is not None and foreseen > self.limit:
            return self._note(Trial(size, False, foreseen, None))
        rate, peak = self._attempt(size)
        self._free()  # here, where no traceback holds the tensors of what broke off
        if rate is None:
            return self._note(Trial(size, False, None, None))
        within = self.limit is None or peak <= self.limit
        return self._note(Trial(size, within, peak, rate, self._use.share(rate)))

    def _attempt(self, size: int) -> tuple[float | None, int]:
        """Return samples a second, None if the memory was spent, and the highest that memory rose to."""
        try:
            with _peak_bytes(self._device) as peak:
                rate = self._steps(size)
        except torch.OutOfMemoryError:
            return None, 0
        return rate, peak[0]

    def _note(self, trial: Trial) -> bool:
        self.trials.append(trial)
        self._on_trial(trial)
        return trial.fits

    def _foreseen(self, size: int) -> int | None:
        """Return what ``size`` would take, by the largest that was run; None before the first."""
        ran = [trial for trial in self.trials if trial.num_bytes is not None and trial.images_per_second is not None]
        if not ran:
            return None
        last = max(ran, key=lambda trial: trial.micro_batch)
        assert last.num_bytes is not None
        return self._empty_bytes + max(last.num_bytes - self._empty_bytes, 0) * size // last.micro_batch

    def _steps(self, size: int) -> float:
        """Take a few steps; return samples a second of those that are timed."""
        plain = self._batches.at(0, size).to(self._device)
        guided = replace(plain, guidance_B=plain.uniforms_B2[:, 0])
        kinds = [(batch, share) for batch, share in ((guided, self._guided), (plain, 1 - self._guided)) if share > 0]
        self._trainer.calibrate(itertools.repeat(plain), 1)
        seconds = sum(share * self._seconds(batch) for batch, share in kinds)
        return ACCUMULATED * size / max(seconds, 1e-9)

    def _seconds(self, batch: Batch) -> float:
        """Return the time of one step on micro-batches that are all ``batch``."""
        again: Iterator[Batch] = itertools.repeat(batch)
        began = 0.0
        for number in range(WARM_UP + TIMED):
            if number == WARM_UP:
                self._wait()
                began = time.monotonic()
            self._trainer.step(again, ACCUMULATED, 0)
        self._wait()
        return (time.monotonic() - began) / TIMED

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _free(self) -> None:
        """Let go of what a trial left: gradients of a backward that broke off, what was compiled, and the cache."""
        for parameter in self._trainer.weights.run.parameters():
            parameter.grad = None
        torch._dynamo.reset()  # each size is compiled anew, and after eight torch would compile no more
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _peak_bytes(device: torch.device) -> Iterator[list[int]]:
    """Yield a list whose one number is, afterwards, the highest that memory rose to meanwhile."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = int(torch.cuda.max_memory_reserved(device))
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLING_SECONDS):
            peak[0] = max(peak[0], _resident_bytes())

    watcher = threading.Thread(target=watch, name="memory", daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        peak[0] = max(peak[0], _resident_bytes())
        done.set()
        watcher.join()


def _resident_bytes() -> int:
    """Return how much memory this process holds; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text("ascii").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _named(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else "CPU"
