"""Forked children that run the real command line: cheap, because everything is imported once, before.

The process that forks must have one thread.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NoReturn

from unet_surgery.cli.main import main
from unet_surgery.cli.sink import Terminated

if TYPE_CHECKING:
    from fault_shim import Shim

__all__ = ["CHILD_SECONDS", "Act", "Child", "Finished", "Server", "run", "start", "wait"]

CHILD_SECONDS = 30

Act = Callable[[], Callable[[], str] | None]
"""Called in the child before the command line; what it returns is called after it, for the child's report."""


@dataclass(frozen=True)
class Finished:
    """How a child ended: its exit code, or minus the signal that killed it; what it said; what it reported."""

    code: int
    stderr: str
    report: str


@dataclass(frozen=True)
class Child:
    """A running child (in itself, pid 0), and the files behind its stderr and its report."""

    pid: int
    stderr: int
    report: int


def run(arguments: list[str], act: Act | None = None) -> Finished:
    """Run the command line in a child, and wait for it."""
    return wait(start(arguments, act))


def start(arguments: list[str], act: Act | None = None) -> Child:
    """Run the command line in a child; signals do to it what they do to a process of its own."""
    child = _fork()
    if child.pid == 0:
        _run_here(arguments, act, child.report)
    return child


def wait(child: Child) -> Finished:
    """Wait for a child; one that hangs is ended by SIGABRT."""
    watch = os.pidfd_open(child.pid)
    if not select.select([watch], [], [], CHILD_SECONDS)[0]:
        os.kill(child.pid, signal.SIGABRT)
    os.close(watch)
    code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    texts = []
    for fd in (child.stderr, child.report):
        texts.append(os.pread(fd, os.fstat(fd).st_size, 0).decode())
        os.close(fd)
    return Finished(code, *texts)


class Server:
    """A run that stands still before its first change of a file, and forks a child there for every :meth:`ask`."""

    def __init__(self, arguments: list[str], shim: Shim) -> None:
        self._asked, self._ask = os.pipe()
        self._answered, self._answer = os.pipe()
        shim.on_first = lambda: self._serve(shim)
        self._child = start(arguments, shim.install)
        os.close(self._asked)
        os.close(self._answer)
        self._answers = os.fdopen(self._answered)

    def ask(self, index: int, fault: str) -> Finished:
        """Go on in a child, with ``fault`` at call number ``index``."""
        os.write(self._ask, f"{json.dumps([index, fault])}\n".encode())
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"the run does not come to its first change of a file: {wait(self._child).stderr}")
        return Finished(**json.loads(line))

    def close(self) -> None:
        os.close(self._ask)
        self._answers.close()
        wait(self._child)

    def _serve(self, shim: Shim) -> None:
        os.close(self._ask)
        gc.freeze()
        with os.fdopen(self._asked) as questions:
            for line in questions:
                child = _fork()
                if child.pid == 0:
                    shim.index, shim.fault = json.loads(line)
                    return
                os.write(self._answer, f"{json.dumps(asdict(wait(child)))}\n".encode())
        os._exit(0)


def _fork() -> Child:
    sys.stdout.flush()
    stderr, report = os.memfd_create("stderr"), os.memfd_create("report")
    child = Child(os.fork(), stderr, report)
    if child.pid == 0:
        os.dup2(stderr, 2)
    return child


def _run_here(arguments: list[str], act: Act | None, report: int) -> NoReturn:
    codes: list[int] = []
    while True:  # a signal may arrive at these lines too, and must not bring this child into its parent's code
        try:
            if not codes:
                codes.append(70)
                codes.append(_run_command(arguments, act, report))
            sys.stderr.flush()
            os._exit(codes[-1])
        except (KeyboardInterrupt, Terminated):
            codes.append(0)  # too late: the command had returned


def _run_command(arguments: list[str], act: Act | None, report: int) -> int:
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is ignored
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        sys.dont_write_bytecode = True
        logging.getLogger().handlers.clear()
        sys.argv = ["unet-surgery", *arguments]
        tell = act() if act is not None else None
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 70
        if tell is not None:
            os.write(report, tell().encode())
    except (KeyboardInterrupt, Terminated):
        raise
    except BaseException:
        traceback.print_exc()
    return code
