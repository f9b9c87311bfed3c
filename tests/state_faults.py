"""Faults at every call by which a trainer's checkpoint changes files, and what must be on disk afterwards.

A child is forked for each point, with the shim of ``fault_shim`` between it and the system. It locks the run, writes a
line of metrics and saves a state, while an older one is there. Afterwards the newest state is the old one or the new
one, bit for bit, and the next save leaves nothing else. As a program it prints a JSON line for each point:

    python tests/state_faults.py rotate again --all

Without ``--all`` every call of ``rotate`` is killed before, and meets one of its other faults, in turn; every call of
the other scenarios does one of both.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import NoReturn

import torch
from fault_shim import FAULTS, LATE, Shim
from teachers import entries

from unet_surgery.distill.metrics import METRICS, Metrics
from unet_surgery.distill.runlock import RunLock
from unet_surgery.distill.state import CHECKPOINTS, TrainingState, newest_state, save_state
from unet_surgery.errors import OutputError

__all__ = ["SCENARIOS", "made", "same"]

SCENARIOS = {"rotate": 3, "again": 2, "back": 1, "first": 3, "leftover": 3, "noswap": 2}
"""What is tried → the step that is saved, where those of 1 and 2 are there (but for ``first``)."""


def made(step: int) -> TrainingState:
    """Return a state that no other step has."""
    generator = torch.Generator().manual_seed(step)
    weights = {"a": torch.randn(90, 100, generator=generator), "b": torch.full((), float("nan"))}
    moments = {"a": torch.randn(8, 100, generator=generator).bfloat16(), "steps": torch.tensor(step)}
    return TrainingState(step, {"weights": weights, "exp_avg": moments}, {"cursor": step * 8, "scale": 2.0**step})


def same(one: TrainingState, other: TrainingState) -> bool:
    """True if the two are the same, bit for bit."""
    if (one.step, one.facts, list(one.tensors)) != (other.step, other.facts, list(other.tensors)):
        return False
    for name, group in one.tensors.items():
        others = other.tensors[name]
        if group.keys() != others.keys():
            return False
        for key, tensor in group.items():
            if (tensor.dtype, tensor.shape) != (others[key].dtype, others[key].shape):
                return False
            if bits(tensor) != bits(others[key]):
                return False
    return True


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def new_of(scenario: str) -> TrainingState:
    """Return what is saved: a state of step 2 is another than the one that is there."""
    state = made(SCENARIOS[scenario])
    return TrainingState(state.step, made(state.step + 50).tensors, state.facts)


def act(run: Path, scenario: str) -> None:
    step = SCENARIOS[scenario]
    with RunLock(run), Metrics(run, step=step - 1) as metrics:
        metrics.append(step, {"loss": 0.5})
        metrics.sync()
        save_state(run, new_of(scenario), keep=2)


def set_up(run: Path, scenario: str) -> None:
    run.mkdir()
    with RunLock(run), Metrics(run, step=0) as metrics:
        for step in (1, 2):
            metrics.append(step, {"loss": 1 / step})
            if scenario != "first":
                save_state(run, made(step))
    if scenario == "leftover":
        shutil.copytree(run / CHECKPOINTS / "step-00000001", run / CHECKPOINTS / ".step-00000007.unet-surgery")


class _Terminated(BaseException):
    pass


def _child(run: Path, scenario: str, shim: Shim, report: int) -> NoReturn:
    code = 70

    def terminate(number: int, _frame: object) -> NoReturn:
        raise _Terminated(number)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, terminate)
        shim.install()
        if shim.index < 0:
            sys.addaudithook(shim.audit)
        try:
            act(run, scenario)
            code = 0
        except OutputError as error:
            shim.inside = True  # from here on nothing is hit
            os.write(report, str(error).encode())
            code = 4
        except _Terminated as error:
            code = 128 + error.args[0]
        if shim.index < 0:
            shim.inside = True
            os.write(report, json.dumps([shim.calls, shim.strays]).encode())
    except BaseException:
        shim.inside = True
        os.write(report, traceback.format_exc().encode())
    finally:
        os._exit(code)


def run_child(run: Path, scenario: str, index: int, fault: str) -> tuple[int, str]:
    """Return the exit code of a child with ``fault`` at call ``index``, and what it reports."""
    report = os.memfd_create("report")
    pid = os.fork()
    if pid == 0:
        _child(run, scenario, Shim(scenario != "noswap", index, fault), report)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = os.pread(report, os.fstat(report).st_size, 0).decode()
    os.close(report)
    return code, text


def wrong_with(run: Path, scenario: str, fault: str, code: int, text: str) -> str:
    """Return what is wrong with a run's folder after a point; empty if nothing is."""
    new, old = new_of(scenario), None if scenario == "first" else made(2)
    found = newest_state(run)
    is_new = found is not None and same(found, new)
    # Until the checkpoints of later steps are gone, the newest is still the one of step 2.
    is_old = found is None if old is None else found is not None and same(found, old)
    if not is_new and not is_old:
        return "the newest state is neither the old one nor the new one"
    if fault.startswith("kill"):
        if code != -signal.SIGKILL:
            return f"not killed, but {code}: {text}"
    elif fault.startswith("SIG") and not (fault == LATE and code == 4):  # nothing had to be cleared away
        if code != 128 + signal.Signals[fault.split(maxsplit=1)[0]]:
            return f"not ended by the signal, but {code}: {text}"
    elif code == 0:
        # Failing to remove what is not needed any more is only said, and then a later step may still be there.
        if not is_new and scenario != "back":
            return "done, but the old state is there"
    elif code != 4 or "  where:" not in text:
        return f"no clean error, but {code}: {text}"
    elif is_new != ("in place and whole" in text) and scenario != "back":
        return f"the newest state is {'the new' if is_new else 'the old'} one: {text}"
    if list(run.rglob("*.corrupt-*")):
        return "a checkpoint was found damaged"
    step = 9 if found is None else found.step
    with Metrics(run, step=step):
        lines = [json.loads(line)["step"] for line in (run / METRICS).read_text().splitlines()]
    if lines != sorted(set(lines)):
        return f"the metrics have the steps {lines}"
    last = made(20)
    save_state(run, last)
    after = newest_state(run)
    kept = entries(run / CHECKPOINTS)
    if after is None or not same(after, last) or len(kept) > 2 or any(name.startswith(".") for name in kept):
        return f"the next save leaves {kept}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenarios", nargs="+", choices=list(SCENARIOS))
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    logging.disable()
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # type: ignore[assignment]  # a killed process loses nothing that the kernel has
    with tempfile.TemporaryDirectory() as name:
        for scenario in arguments.scenarios:
            sweep(Path(name), scenario, everything=arguments.all)


def sweep(root: Path, scenario: str, *, everything: bool) -> None:
    ready, run = root / f"ready-{scenario}", root / "run"
    set_up(ready, scenario)
    shutil.copytree(ready, run)
    gc.collect()
    gc.freeze()
    code, text = run_child(run, scenario, -1, "")
    if code != 0:
        raise RuntimeError(f"the undisturbed run: {code} {text}")
    calls, strays = json.loads(text)
    if strays or wrong_with(run, scenario, "", 0, ""):
        raise RuntimeError(f"the undisturbed run: {strays} {wrong_with(run, scenario, '', 0, '')}")
    met: Counter[str] = Counter()
    turn = list(SCENARIOS).index(scenario)
    for index, (kind, where) in enumerate(calls):
        faults = FAULTS[kind]
        chosen = faults
        if not everything:
            chosen = (faults[0], faults[1 + (met[kind] + 3 * turn) % (len(faults) - 1)])
            chosen = chosen if scenario == "rotate" else chosen[index % 2 :][:1]
        met[kind] += 1
        for fault in chosen:
            shutil.rmtree(run)
            shutil.copytree(ready, run)
            code, text = run_child(run, scenario, index, fault)
            wrong = wrong_with(run, scenario, fault, code, text)
            point = {"scenario": scenario, "call": index, "kind": kind, "where": where, "fault": fault}
            print(json.dumps({**point, "code": code, "wrong": wrong}))
    shutil.rmtree(run)


if __name__ == "__main__":
    main()
