"""Faults at every call of ``prune`` that changes a file, races of two writers, and what must be on disk afterwards.

The real command line runs, with a shim (``fault_shim``) between Python and the system. A first run lists the calls of a
scenario (``fault_scenarios``). A second one stops before the first call, when nothing has been changed yet, and forks a
child there for every fault point, which goes on alone (``fault_children``): so a point costs what writing costs, and
not the start of an interpreter. Afterwards the output must be absent or the old folder or the new one, byte for byte;
what else may be there, what must have been said, and that the next run puts it right, is in ``_judge``.

As a library: ``sweep``, ``storm``, ``moments`` and ``lines`` yield an ``Outcome`` each, ``races`` a ``Race`` each; what
is ``wrong`` with it is empty if it survived. They fork, so they want a process of one thread. As a program it prints
them as JSON, a line each:

    python tests/faults.py sweep unet-force --every 4
    python tests/faults.py races --force
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import re
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fault_children import CHILD_SECONDS, Act, Finished, Server, run, start, wait
from fault_scenarios import ASIDE, BYPASS, OUT, SCENARIOS, STAGING, Prepared, Scenario, prepared
from fault_shim import FAULTS, Call, Shim, expected
from teachers import entries, folder_bytes

__all__ = ["SCENARIOS", "Outcome", "Race", "lines", "moments", "num_points", "races", "storm", "sweep"]

STORM_SECONDS = 200e-6
LEAD_SECONDS = 2e-3


@dataclass(frozen=True)
class Outcome:
    """A fault point: what was done to which call, how the run ended, and what is wrong with that."""

    scenario: str
    call: int
    kind: str
    where: str
    fault: str
    code: int
    ended: str
    wrong: str


@dataclass(frozen=True)
class Race:
    """Two real writers to one output: their exit codes, whose bytes are there, and what is wrong with that."""

    number: int
    force: bool
    codes: tuple[int, int]
    winner: str
    wrong: str


# --- sweeps -----------------------------------------------------------------------------------------------------------


def sweep(name: str, *, every: int = 1, offset: int = 0) -> Iterator[Outcome]:
    """Try every call of a scenario with every fault of its kind.

    With ``every`` n > 1 every call meets at least one fault, in turn, so that n offsets together (each scenario has one
    of its own, to which ``offset`` is added) have met every fault of every kind.
    """
    with _prepared(name) as ready:
        calls = _calls(ready)
        folder = ready.root / "point"
        ready.set_up(folder)
        server = Server(ready.arguments(folder, force=ready.scenario.force), Shim(ready.scenario.swap))
        for call, fault in _points(calls, every, offset + list(SCENARIOS).index(name)):
            if not folder.exists():
                ready.set_up(folder)
            finished = server.ask(call.index, fault)
            yield _outcome(name, ready, folder, finished, call, fault, expected(call.kind, fault))
        server.close()


def _points(calls: list[Call], every: int, offset: int) -> Iterator[tuple[Call, str]]:
    met: Counter[str] = Counter()
    numbers = Counter(call.kind for call in calls)
    for call in calls:
        faults = FAULTS[call.kind]
        turn, num_turns = met[call.kind] * every + offset % every, numbers[call.kind] * every
        met[call.kind] += 1
        if every == 1:
            chosen = faults
        elif num_turns < len(faults):
            chosen = faults[turn::num_turns]
        else:
            chosen = (faults[turn % len(faults)],)
        yield from ((call, fault) for fault in chosen)


def num_points(name: str) -> int:
    """Return how many fault points the whole sweep of a scenario has."""
    with _prepared(name) as ready:
        return sum(len(FAULTS[call.kind]) for call in _calls(ready))


def storm(name: str, *, count: int = 1) -> Iterator[Outcome]:
    """Let a signal whose handler does nothing arrive every 200 µs: calls are interrupted, and that is all."""

    def blow() -> None:
        signal.signal(signal.SIGALRM, lambda _number, _frame: None)
        signal.setitimer(signal.ITIMER_REAL, STORM_SECONDS, STORM_SECONDS)

    with _prepared(name) as ready:
        for number in range(count):
            yield _observe(name, ready, Call(number, "run", ""), "storm", "done", blow)


def moments(name: str, number: signal.Signals, *, count: int = 20) -> Iterator[Outcome]:
    """Send a signal from outside at ``count`` moments, spread over the time in which a run changes files."""
    reader, writer = os.pipe()
    with _prepared(name) as ready:
        seconds = 0.0
        for moment in range(-1, count):  # the first one only takes the time
            folder = ready.root / "moment"
            ready.set_up(folder)
            shim = Shim(ready.scenario.swap, on_first=lambda: os.write(writer, b"x"))
            child = start(ready.arguments(folder, force=ready.scenario.force), shim.install)
            if not select.select([reader], [], [], CHILD_SECONDS)[0]:
                raise RuntimeError(f"the run does not come to its first change of a file: {wait(child).stderr}")
            os.read(reader, 1)
            begun = time.perf_counter()
            if moment >= 0:
                time.sleep(seconds * moment / count)
                os.kill(child.pid, number)
            finished = wait(child)
            if moment < 0:
                seconds = time.perf_counter() - begun
                shutil.rmtree(folder)
                continue
            must = "done" if finished.code == 0 else "killed" if number == signal.SIGKILL else "signalled"
            yield _outcome(name, ready, folder, finished, Call(moment, "moment", f"of {count}"), number.name, must)
    os.close(reader)
    os.close(writer)


def lines(name: str, *, every: int = 1, offset: int = 0) -> Iterator[Outcome]:
    """Let SIGTERM arrive at the beginning of every line of staging.py that runs, or of one in ``every``."""
    with _prepared(name) as ready:
        folder = ready.root / "lines"
        ready.set_up(folder)
        counted = run(ready.arguments(folder, force=ready.scenario.force), lambda: _trace(ready, -1))
        shutil.rmtree(folder)
        for index, line in list(enumerate(json.loads(counted.report)))[offset::every]:
            yield _observe(
                name, ready, Call(index, "line", line), "SIGTERM", "signalled", functools.partial(_trace, ready, index)
            )


def _trace(ready: Prepared, index: int) -> Callable[[], str]:
    """Raise SIGTERM at the line event number ``index``; report all lines that are passed."""
    Shim(ready.scenario.swap).install()
    passed: list[str] = []

    def in_frame(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            passed.append(f"staging.py:{frame.f_lineno}")
            if len(passed) - 1 == index:
                os.kill(os.getpid(), signal.SIGTERM)
        return in_frame

    def in_call(frame: Any, _event: str, _arg: Any) -> Any:
        return in_frame if frame.f_code.co_filename.endswith("checkpoint/staging.py") else None

    sys.settrace(in_call)
    return lambda: json.dumps(passed)


@contextmanager
def _prepared(name: str) -> Iterator[Prepared]:
    with prepared(SCENARIOS[name]) as ready:
        gc.collect()
        gc.freeze()  # what is there already need not be walked, and so copied, in every child
        yield ready


def _calls(ready: Prepared) -> list[Call]:
    """Return every call that changes a file in an undisturbed run.

    Raises:
        RuntimeError: the run fails, or changes a file in a way that the shim does not see.
    """
    shim = Shim(ready.scenario.swap)

    def act() -> Callable[[], str]:
        shim.install()
        sys.addaudithook(shim.audit)
        return lambda: json.dumps([shim.calls, shim.strays])

    folder = ready.root / "counted"
    ready.set_up(folder)
    finished = run(ready.arguments(folder, force=ready.scenario.force), act)
    try:
        _judge(ready, folder, finished, Call(-1, "run", ""), "", "done")
    except _Wrong as error:
        raise RuntimeError(f"the undisturbed run: {error}") from None
    shutil.rmtree(folder)
    calls, strays = json.loads(finished.report)
    if strays:
        raise RuntimeError(f"files are changed that the shim does not see: {strays}")
    return [Call(index, *call) for index, call in enumerate(calls)]


def _observe(name: str, ready: Prepared, call: Call, fault: str, must: str, act: Act) -> Outcome:
    folder = ready.root / "observed"
    ready.set_up(folder)
    finished = run(ready.arguments(folder, force=ready.scenario.force), act)
    return _outcome(name, ready, folder, finished, call, fault, must)


def _outcome(
    name: str, ready: Prepared, folder: Path, finished: Finished, call: Call, fault: str, must: str
) -> Outcome:
    ended, wrong = "?", ""
    try:
        ended = _judge(ready, folder, finished, call, fault, must)
    except _Wrong as error:
        wrong = str(error)
    shutil.rmtree(folder)
    return Outcome(name, call.index, call.kind, call.where, fault, finished.code, ended, wrong)


# --- what must be true afterwards -------------------------------------------------------------------------------------


CLEARING, RESTORING = "clearing what an interrupted run left", "restoring out, which an interrupted run"
NO_SWAP = "this file system cannot swap folders"
NOT_REMOVED = "could not be removed|cannot be cleared|cannot be put back|nor the old one put back"
WARNINGS = re.compile(rf"{CLEARING}|{RESTORING}|{NO_SWAP}|\S+ could not be removed \(.*\); the next run does$")
BEATEN = "another process is writing|exists|appeared while"
SIGNALLED = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}


class _Wrong(Exception):  # noqa: N818  # nobody's error: a verdict
    pass


def _must(condition: object, what: str) -> None:
    if not condition:
        raise _Wrong(what)


def _judge(ready: Prepared, folder: Path, finished: Finished, call: Call, fault: str, must: str) -> str:
    """Return what the output is now (absent, old or new); ``must`` is how the run has to end.

    Always: the teacher is as it was. The output is absent, the old one or the new one; an old one is never gone, but
    where folders cannot be swapped it may be set aside, and then it is whole. Beside it nothing but staging folders.
    One message, and it is true. A run that was not killed leaves nothing, except what it could not remove, and says
    so; or what a dead run had left, if it was stopped before it took that. After a kill, and where something is left,
    the next run puts it right.

    Raises:
        _Wrong: it is otherwise.
    """
    before = ready.scenario.before
    _must(folder_bytes(ready.teacher) == ready.teacher_bytes, "the teacher was changed")
    ended = _ended(ready, folder)
    left = [name for name in entries(folder) if name != OUT]
    _must(set(left) <= {STAGING, ASIDE}, f"left over: {left}")
    # What is set aside is put back by the next run, so it must be whole; and only then may the output be missing.
    _must(ASIDE not in left or folder_bytes(folder / ASIDE) == ready.old, "what is set aside is not whole")
    _must(ended != "absent" or not ready.scenario.force or ASIDE in left, "the old output is gone")
    _judge_words(before, finished, fault, must, ended)
    if left and must != "killed":
        text = finished.stderr
        may_stay = call.kind in ("unlink", "rmdir", "rename") or fault.endswith(" on")
        is_said = re.search(NOT_REMOVED, text) and all(name in text for name in left)
        is_untouched = before in ("stale", "aside", "both") and ready.is_untouched(folder)
        _must(must != "done" and ((may_stay and is_said) or is_untouched), f"left over: {left}; {text}")
    if left or must == "killed":
        _judge_next(ready, folder, ended)
    return ended


def _ended(ready: Prepared, folder: Path) -> str:
    out = folder / OUT
    if not os.path.lexists(out):
        return "absent"
    _must(out.is_dir() and not out.is_symlink(), "the output is not a folder")
    files = folder_bytes(out)
    if files == ready.new:
        return "new"
    _must(files == ready.old and ready.scenario.force, "the output is neither the old one nor the new one")
    return "old"


def _judge_words(before: str, finished: Finished, fault: str, must: str, ended: str) -> None:
    code, text = finished.code, finished.stderr
    talk = [line for line in text.splitlines() if line and not line.startswith("  ")]
    messages = [line for line in talk if not WARNINGS.match(line)]
    _must("Traceback" not in text, f"a traceback: {text}")
    if must == "killed":
        _must(code == -signal.SIGKILL, f"not killed, but code {code}: {text}")
    elif must == "done":
        _must(code == 0 and not messages, f"code {code}: {text}")
        _must(ended == "new", f"done, but the output is {ended}")
        _must(before not in ("stale", "aside", "both") or CLEARING in text, "cleared without a word")
        _must(before != "aside" or RESTORING in text, "restored without a word")
    elif must == "signalled":
        number = signal.Signals[fault.split(maxsplit=1)[0]]
        _must(code == 128 + number, f"code {code}: {text}")
        _must(len(messages) == 1 and messages[0].startswith(SIGNALLED[number]), f"not one message: {text}")
    else:
        _must(code == 4, f"code {code}: {text}")
        _must(len(messages) == 1 and messages[0].startswith("error: "), f"not one message: {text}")
        _must(("in place and whole" in text) == (ended == "new"), f"the output is {ended}: {text}")


def _judge_next(ready: Prepared, folder: Path, ended: str) -> None:
    """Run again, undisturbed: it succeeds, leaves nothing, and says what it cleared if there was something to clear."""
    is_aside = (folder / ASIDE).exists()
    left = is_aside or ((folder / STAGING).exists() and entries(folder / STAGING))
    arguments = ready.arguments(folder, force=ended != "absent" or is_aside)
    finished = run(arguments, Shim(ready.scenario.swap).install)
    text = finished.stderr
    _must(finished.code == 0, f"the next run: code {finished.code}: {text}")
    _must(_ended(ready, folder) == "new", "the next run wrote something else")
    _must(entries(folder) == [OUT], f"the next run leaves {entries(folder)}")
    _must(bool(left) == (CLEARING in text or RESTORING in text), f"left: {left}, and the next run says {text!r}")
    _must(folder_bytes(ready.teacher) == ready.teacher_bytes, "the next run changed the teacher")


# --- races ------------------------------------------------------------------------------------------------------------


def races(count: int, *, force: bool, swap: bool = True) -> Iterator[Race]:
    """Let two writers of different students go at once, ``count`` times; with ``force``, over a third student."""
    first, second = Scenario("pipeline", "old" if force else "", swap=swap), Scenario("pipeline", remove=BYPASS)
    with prepared(first) as one, prepared(second) as other:
        rivals = {"first": one, "second": other}
        for number in range(count):
            folder = one.root / "race"
            one.set_up(folder)
            finished = _race(rivals, folder, force, swap, lead=(number % 10 - 4.5) * LEAD_SECONDS)
            winner, wrong = "?", ""
            try:
                winner = _judge_race(rivals, folder, finished)
            except _Wrong as error:
                wrong = str(error)
            shutil.rmtree(folder)
            yield Race(number, force, (finished[0].code, finished[1].code), winner, wrong)


def _race(rivals: dict[str, Prepared], folder: Path, force: bool, swap: bool, lead: float) -> list[Finished]:
    """Run both, released together; the first is ``lead`` seconds ahead, or behind if that is negative."""
    gate, opener = os.pipe()

    def waiting(seconds: float) -> Act:
        def act() -> None:
            if not swap:
                Shim(swap=False).install()
            os.close(opener)
            os.read(gate, 1)
            time.sleep(max(0.0, seconds))

        return act

    racers = [
        start(rival.arguments(folder, force=force), waiting(seconds))
        for rival, seconds in zip(rivals.values(), (-lead, lead), strict=True)
    ]
    os.close(opener)
    finished = [wait(racer) for racer in racers]
    os.close(gate)
    return finished


def _judge_race(rivals: dict[str, Prepared], folder: Path, finished: list[Finished]) -> str:
    said = [(one.code, one.stderr) for one in finished]
    _must(entries(folder) == [OUT], f"left over: {entries(folder)}; {said}")
    files = folder_bytes(folder / OUT)
    won = [name for name, rival in rivals.items() if files == rival.new]
    _must(len(won) == 1, f"mixed: {said}")
    for name, (code, text) in zip(rivals, said, strict=True):
        messages = [line for line in text.splitlines() if not line.startswith("  ") and not WARNINGS.match(line)]
        if code == 0:
            _must(not messages, f"talk: {text}")
        else:
            _must(code == 4 and len(messages) == 1 and "Traceback" not in text, f"code {code}: {text}")
            why = BEATEN if rivals["first"].scenario.swap else f"{BEATEN}|No such file"  # between the two renames
            _must(re.search(why, text), f"unclear: {text}")
            _must(name != won[0], f"the winner failed: {said}")
    return won[0]


# --- the program ------------------------------------------------------------------------------------------------------


def _program() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["sweep", "points", "storm", "moments", "lines", "races"])
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--signal", default="SIGTERM")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--no-swap", action="store_true")
    given = parser.parse_args()
    if given.what == "races":
        _print(races(given.count, force=given.force, swap=not given.no_swap))
        return
    for name in given.scenarios:
        match given.what:
            case "points":
                print(json.dumps({"scenario": name, "points": num_points(name)}), flush=True)
            case "sweep":
                _print(sweep(name, every=given.every, offset=given.offset))
            case "storm":
                _print(storm(name, count=given.count))
            case "moments":
                _print(moments(name, signal.Signals[given.signal], count=given.count))
            case "lines":
                _print(lines(name, every=given.every, offset=given.offset))


def _print(found: Iterator[Outcome] | Iterator[Race]) -> None:
    for one in found:
        print(json.dumps(asdict(one)), flush=True)


if __name__ == "__main__":
    _program()
