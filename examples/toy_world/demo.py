"""What ``make demo`` runs: prune the toy teacher, distil what is left, and show what came of it in one HTML page.

    python examples/toy_world/demo.py [--out demo-output]

``bk_tiny`` takes most of the teacher away and the student draws nothing that its captions say. Then two networks of
that shape are trained for the same number of steps on the same pictures: the student by its teacher, as
``examples/runs/toy_bk_tiny.yaml`` says, and a control from random weights without one. All four draw captions that no
training saw, and the checker counts. A demo that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def _stop_before_it_begins(_number: int, _frame: Any) -> None:
    """Leave at once: an exception would be shown with the import that it happened to stop."""
    os.write(2, b"stopped; nothing was done yet\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _stop_before_it_begins)  # until main: importing torch takes seconds
elif __name__ == "__mp_main__":  # a process of the pool; see _begin
    signal.signal(signal.SIGINT, signal.SIG_IGN)

# ruff: noqa: E402
import argparse
import contextlib
import ctypes
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from score import captions_of, drawing, load_pipeline, tally

import unet_surgery as us
from unet_surgery.distill import Progress, RunConfig, distill, load_run
from unet_surgery.distill.metrics import sum_of_features, term
from unet_surgery.distill.state import state_folders
from unet_surgery.errors import SurgeryError
from unet_surgery.pages.page import Accuracy, Curve, Curves, Pictures, Prose, Section, Share, Table, page
from unet_surgery.toyworld.checker import judge
from unet_surgery.toyworld.grammar import parse

__all__ = ["CONTROL", "NAMES", "Drawn", "Here", "main", "train"]

RUN = Path(__file__).resolve().parents[1] / "runs" / "toy_bk_tiny.yaml"
RECIPE = "bk_tiny"
NAMES = ("teacher", "pruned", "distilled", "from scratch")
CONTROL = ("init=random", "objectives={task: 1.0, output_kd: 0, feature_kd: 0}")
"""The control's changes to the run: random weights, and no teacher."""
MAX_PRUNED, MIN_DISTILLED = 0.10, 0.85
NUM_SHOWN = 4
PRUNED = (
    "Pruning removes blocks and keeps the other weights as they are: the student is a third of its teacher, and draws "
    "little of what its captions say."
)
TRAINED = (
    "Distilled, it learns from the pictures, from its teacher's predictions and from its teacher's activations. From "
    "scratch, the same network begins with random weights and sees the same pictures for as many steps, untaught."
)
SEED = 0
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
DISTILLED, SCRATCH = "distilled", "scratch"
"""The folders of the two runs."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a network drew, uint8 [n, 32, 32, 3], how much of it is right, and what that cost in CPU seconds."""

    pictures: Any
    scores: dict[str, Any]
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run: its student (None: it was stopped), the lines of metrics.jsonl, and its CPU seconds."""

    student: Path | None
    metrics: list[dict[str, Any]]
    cpu_seconds: float


def main(words: Sequence[str] | None = None) -> int:
    options = parse_options(words)
    started = time.monotonic()
    if signal.getsignal(signal.SIGINT) is _stop_before_it_begins:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _executor(options.processes) as executor:
            done = _interruptible(options, executor)
    except SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # once more, while it waited for the processes
        done = None
    if done is None:
        print(_stopped(options.out), file=sys.stderr)
        return 130
    seconds = time.monotonic() - started
    (options.out / "index.html").write_text(_page(done, seconds), "utf-8")
    for line in _report(done, seconds):
        print(line)
    print((options.out / "index.html").resolve())
    return 0


def _stopped(out: Path) -> str:
    """Say what a demo that was stopped leaves for the next one."""
    saved = [folders[-1].name for run in (DISTILLED, SCRATCH) if (folders := state_folders(out / run))]
    if saved:
        return f"stopped, and saved ({', '.join(saved)}); the same command goes on from there"
    return "stopped; nothing was saved yet, and the same command begins anew"


def _interruptible(options: argparse.Namespace, executor: Executor) -> Demo | None:
    """As ``run``; on Ctrl-C, which the processes get as well, wait until they have saved."""
    try:
        return run(options, executor)
    except KeyboardInterrupt:
        executor.shutdown(cancel_futures=True)
        return None


def parse_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--teacher", default="toy")
    parser.add_argument("--captions", type=int, nargs=2, default=[108, 84], help="of one object, and of two")
    parser.add_argument("--sampling-steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--set", dest="changes", action="append", default=[], help="change a key of the run file")
    parser.add_argument("--processes", type=int, choices=[1, 2], default=2 if _num_cores() > 1 else 1)
    return parser.parse_args(words)


# -- what is done ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Demo:
    """All that the page shows."""

    config: RunConfig
    plan: us.SurgeryPlan
    captions: list[str]
    drawn: dict[str, Drawn]
    distilled: Trained
    control: Trained


def run(options: argparse.Namespace, executor: Executor) -> Demo | None:
    """Do everything but the page; None if a run was stopped by a signal. Two trainings go on side by side."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    student = us.prune(RECIPE, options.teacher, out / "student", force=True)
    print(
        f"{RECIPE}: {student.plan.student.params:,} of {student.plan.teacher.params:,} parameters are left", flush=True
    )
    where = (f"student={student.folder}", f"teacher={options.teacher}", *options.changes)
    one, two = options.captions
    captions = captions_of("one", one) + captions_of("two", two)

    def draw(name: str) -> Future[Drawn]:
        return executor.submit(draw_and_judge, name, captions, options.sampling_steps, options.guidance)

    runs = [
        executor.submit(train, "distilled", (*where, f"output={out / DISTILLED}")),
        executor.submit(train, "from scratch", (*where, *CONTROL, f"output={out / SCRATCH}")),
    ]
    before = [draw(options.teacher), draw(str(student.folder))]
    distilled, control = (future.result() for future in runs)
    if distilled.student is None or control.student is None:
        return None
    after = [draw(str(distilled.student)), draw(str(control.student))]
    drawn = dict(zip(NAMES, (future.result() for future in before + after), strict=True))
    config = load_run(RUN, where).config
    return Demo(config, student.plan, captions, drawn, distilled, control)


def train(name: str, changes: Sequence[str]) -> Trained:
    """Train what the run file says, with ``changes``, and say how it goes."""
    started = time.process_time()

    def say(progress: Progress) -> None:
        left = f"{progress.seconds_left:.0f} s left"
        print(f"{name}: step {progress.step} of {progress.num_steps}, loss {progress.loss:.3f}, {left}", flush=True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run saves, and one that only loads may end
    try:
        result = distill(load_run(RUN, changes).config, on_progress=say)
    finally:
        signal.signal(signal.SIGINT, before)
    lines = (result.folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return Trained(result.student, [json.loads(line) for line in lines], time.process_time() - started)


def draw_and_judge(name: str, captions: Sequence[str], steps: int, guidance: float) -> Drawn:
    """Draw all captions with the pipeline ``name``."""
    started = time.process_time()
    unet, parts = load_pipeline(name)
    pictures = drawing(unet, parts, steps=steps, guidance=guidance)(captions, SEED)
    return Drawn(pictures, tally(pictures, captions), time.process_time() - started)


class Here(Executor):
    """Does what it is given at once, in this process: for machines of one core, and for tests."""

    def submit(self, task: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(task(*arguments, **named))
        return future


def _executor(num_processes: int) -> Executor:
    """Two processes with half of the cores each do more than one with all: the networks are small."""
    if num_processes == 1:
        return Here()
    context = multiprocessing.get_context("spawn")
    threads = max(1, _num_cores() // num_processes)
    return ProcessPoolExecutor(num_processes, context, initializer=_begin, initargs=(threads,))


def _begin(threads: int) -> None:
    """Begin a process of the pool; Ctrl-C reaches it too, and ends it only where it trains.

    One that draws, or waits, would die of it, and the pool would end the others: those that are saving.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError):  # Linux alone has it: whoever ends this process's parent ends it as well
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(threads)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- what is shown -----------------------------------------------------------------------------------------------------


def _share(drawn: Drawn) -> float:
    return float(drawn.scores["all"]["right"])


def _report(done: Demo, seconds: float) -> list[str]:
    """Return the scores, whether they are what is promised, and where the time went."""
    lines = []
    for name, drawn in done.drawn.items():
        parts = [f"{kind} {_percent(drawn.scores[kind])}" for kind in drawn.scores]
        lines.append(f"{name:<13} right: {'; '.join(parts)}")
    teacher, pruned, distilled = (_share(done.drawn[name]) for name in NAMES[:3])
    kept = distilled / teacher if teacher else 0.0
    is_as_promised = teacher > 0 and pruned <= MAX_PRUNED and kept >= MIN_DISTILLED
    lines.append(
        f"distilled: {kept:.0%} of the teacher's score (promised: {MIN_DISTILLED:.0%}); pruned: {pruned:.0%} right "
        f"(at most {MAX_PRUNED:.0%}): {'as promised' if is_as_promised else 'NOT as promised'}"
    )
    parts = [f"distilling {done.distilled.cpu_seconds:.0f}", f"the control {done.control.cpu_seconds:.0f}"]
    parts += [f"drawing by {name} {drawn.cpu_seconds:.0f}" for name, drawn in done.drawn.items()]
    lines.append(f"CPU seconds: {', '.join(parts)}")
    lines.append(f"{seconds:.0f} s in all")
    return lines


def _percent(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['right']:.1%} ({low:.1%} to {high:.1%}) of {score['pictures']}"


def _page(done: Demo, seconds: float) -> str:
    sizes, stage = done.plan, done.config.stages[0]
    return page(
        _sections(done),
        title="A U-Net cut down to a third, and taught again",
        lead=f"{RECIPE} of the toy teacher: {sizes.student.params / 1e6:.1f} of {sizes.teacher.params / 1e6:.1f} "
        f"million parameters, {stage.steps} steps of {stage.batch} pictures, {seconds / 60:.1f} minutes for all.",
    )


def _sections(done: Demo) -> list[Section]:
    rows = _shown(done.captions)
    prompts = [done.captions[i] for i in rows]
    columns = {name: drawn.pictures[rows] for name, drawn in done.drawn.items()}
    marks = {
        name: [judge(picture, text).right for picture, text in zip(pictures, prompts, strict=True)]
        for name, pictures in columns.items()
    }
    return [
        Prose("What this shows", (PRUNED, TRAINED)),
        Pictures("Captions that no training saw", columns, prompts, marks, note="All four begin with the same noise."),
        Accuracy(
            "Right in all that the caption says",
            {
                title: [
                    Share(name, drawn.scores[kind]["num_right"], drawn.scores[kind]["pictures"])
                    for name, drawn in done.drawn.items()
                ]
                for kind, title in (("one", "One object"), ("two", "Two objects"))
                if kind in next(iter(done.drawn.values())).scores
            },
            note="Background, number, colours, sizes, shapes and places, read from the pixels; with 95 % intervals.",
        ),
        Curves(
            "The loss on the pictures themselves",
            [
                _curve("distilled", done.distilled, "task", 2),
                _curve("from scratch", done.control, "task", 3),
            ],
            log=True,
        ),
        Curves(
            "How far the student is from its teacher",
            [
                _curve("prediction", done.distilled, "output_kd", 2),
                _curve("activations, summed", done.distilled, "", 1),
            ],
            log=True,
            note="Mean squared differences, of the activations the sum over all pairs.",
        ),
        _table(done),
    ]


def _shown(captions: Sequence[str]) -> list[int]:
    """Return the places of the first captions of one object, and of two."""
    num_things = [len(parse(text).things) for text in captions]
    return [i for kind in (1, 2) for i in [i for i, num in enumerate(num_things) if num == kind][:NUM_SHOWN]]


def _curve(name: str, trained: Trained, wanted: str, tone: int) -> Curve:
    """Return a term over the steps; "" is the sum of all features."""
    values = [term(line, wanted) if wanted else sum_of_features(line) for line in trained.metrics]
    return Curve(name, [line["step"] for line in trained.metrics], values, tone)


def _table(done: Demo) -> Table:
    stage = done.config.stages[0]
    teacher, student = done.plan.teacher, done.plan.student
    rows = [
        ("teacher", f"{teacher.params / 1e6:.2f} M", f"{teacher.macs_all / 1e6:.0f} M", "–", "–"),
        ("pruned", f"{student.params / 1e6:.2f} M", f"{student.macs_all / 1e6:.0f} M", "–", "–"),
    ]
    rows += [
        (name, rows[1][1], rows[1][2], f"{stage.steps}", f"{trained.cpu_seconds:.0f} s")
        for name, trained in (("distilled", done.distilled), ("from scratch", done.control))
    ]
    return Table("Sizes and costs", ("network", "parameters", "MACs a forward", "steps", "CPU time"), rows)


if __name__ == "__main__":
    raise SystemExit(main())
