"""Command lines in children of a process that has imported torch and its kin already: seconds become milliseconds.

A command line here is what it is for a user (a process of its own with its arguments, folder, environment and exit
code), but for Python's start and the imports. Those cost most of what many tests do, and a test of what is imported, or
of what the environment changes at import, must start a process of its own.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

__all__ = ["Started", "Warm", "become", "run_main", "run_tool", "start_tool"]

AT_RUN_TIME = {
    "COLUMNS",
    "UNET_SURGERY_CACHE",
    "UNET_SURGERY_PATIENCE",
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
}
"""What is looked up when a command runs; another value of anything else needs an interpreter of its own."""
AT_IMPORT = {
    "HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_XET", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_OFFLINE", "HF_TOKEN",
}  # fmt: skip
"""What huggingface_hub looks up when it is imported: for a command with other values that must be done anew."""
GIVEN = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
"""What every command gets here that is not told something else."""
WITHOUT_HUB = ["rich.progress", "rich.table", "unet_surgery.api", "unet_surgery.cli.main"]
EVERYTHING = [
    *WITHOUT_HUB,
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "unet_surgery.data.cache",
    "unet_surgery.distill.dryrun",
    "unet_surgery.distill.findbatch",
    "unet_surgery.distill.run",
    "unet_surgery.runtime.verify",
]


class Warm:
    """A process that has imported everything, or what ``imports`` says, in ``env``; a context manager.

    It runs commands whose environment is another in ``may_differ`` only; the others get a Python of their own.
    """

    def __init__(
        self, env: Mapping[str, str], imports: Sequence[str] = EVERYTHING, may_differ: Set[str] = AT_RUN_TIME
    ) -> None:
        self._env = {**env, **GIVEN}
        self._may_differ = may_differ
        self._running: Started | None = None
        self._socket, theirs = socket.socketpair()
        with theirs:
            words = [sys.executable, __file__, str(theirs.fileno()), *imports]
            self._process = subprocess.Popen(
                words, env=self._env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        self._answers = self._socket.makefile("rb", buffering=0)  # so that select knows of all that is not read

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        self._answers.close()
        self._socket.close()

    def run(
        self,
        words: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``unet-surgery WORDS`` without input, as :func:`subprocess.run`; ``env`` is the whole environment."""
        env = {**GIVEN, **(self._env if env is None else env)}
        if not self.can_run(env):
            command = [sys.executable, "-m", "unet_surgery", *words]
            return subprocess.run(
                command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
            )
        return self.start(words, cwd=cwd, env=env, timeout=timeout).ended()

    def start(
        self,
        words: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 240,
    ) -> Started:
        """Start ``unet-surgery WORDS`` without input. One runs at a time: one that was left running is killed."""
        if self._running is not None:  # its test has failed
            self._running.send_signal(signal.SIGKILL)
            self._running.ended()
        env = {**GIVEN, **(self._env if env is None else env)}
        if not self.can_run(env):
            raise ValueError("this environment asks for an interpreter of its own")
        job = {"words": list(words), "cwd": os.fspath(cwd or Path.cwd()), "env": env, "timeout": timeout}
        data = json.dumps(job).encode()
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        socket.send_fds(self._socket, [len(data).to_bytes(4)], [out.fileno(), err.fileno()])
        self._socket.sendall(data)
        self._running = Started(tuple(words), self.answer(), self, (out, err), timeout)
        return self._running

    def can_run(self, env: Mapping[str, str]) -> bool:
        """Tell whether a child of this process is as good as a new one in ``env``."""
        names = env.keys() | (self._env.keys() - GIVEN.keys())
        return {name for name in names if env.get(name) != self._env.get(name)} <= self._may_differ

    def is_free(self) -> None:
        """The command that ran has ended, and its exit code was read."""
        self._running = None

    def has_answer(self) -> bool:
        return bool(select.select([self._socket], [], [], 0)[0])

    def answer(self) -> int:
        """Return the next number that the process says: a child's pid, then its exit code."""
        answer = self._answers.readline()
        if not answer:
            raise RuntimeError(f"what runs the commands has ended: {self._process.wait()}; try its imports by hand")
        return int(answer)


@dataclass
class Started:
    """A command that runs, as :class:`subprocess.Popen` has it."""

    words: tuple[str, ...]
    pid: int
    _warm: Warm
    _files: tuple[IO[bytes], IO[bytes]]
    _timeout: float
    _code: int | None = None

    def is_over(self) -> bool:
        if self._code is None and self._warm.has_answer():
            self._code = self._warm.answer()
        return self._code is not None

    def send_signal(self, number: int) -> None:
        if not self.is_over():
            os.kill(self.pid, number)

    def ended(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end, and return what :func:`subprocess.run` does."""
        code = self._warm.answer() if self._code is None else self._code
        self._warm.is_free()
        texts = []
        for file in self._files:
            texts.append(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode())
            file.close()
        if code == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(self.words, self._timeout, *texts)
        return subprocess.CompletedProcess(self.words, code, *texts)


def run_tool(
    words: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """As :meth:`Warm.run`, in one of two processes for all tests."""
    env = os.environ if env is None else env
    warm = _with_everything()
    return (warm if warm.can_run(env) else _without_hub()).run(words, cwd=cwd, env=env, timeout=timeout)


def start_tool(words: Sequence[str], *, env: Mapping[str, str]) -> Started:
    """As :meth:`Warm.start`, in the process for all tests that has everything."""
    return _with_everything().start(words, env=env)


def of_the_session(env: Mapping[str, str]) -> None:
    """Take the environment in which the two processes for all tests start, whatever that of the first test is."""
    _session.update(env)


_session: dict[str, str] = {}


@cache
def _with_everything() -> Warm:
    warm = Warm(_session)
    atexit.register(warm.close)
    return warm


@cache
def _without_hub() -> Warm:
    warm = Warm(_session, WITHOUT_HUB, AT_RUN_TIME | AT_IMPORT)
    atexit.register(warm.close)
    return warm


# --- the other side ---------------------------------------------------------------------------------------------------


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Fork a child for every job; return, in the child, its job."""
    while True:
        size, fds, _, _ = socket.recv_fds(connection, 4, 2)
        if not size:
            os._exit(0)
        data = bytearray()
        while len(data) < int.from_bytes(size):
            more = connection.recv(1 << 20)
            if not more:
                os._exit(0)
            data += more
        job = json.loads(data)
        pid = os.fork()
        if pid == 0:
            for number, fd in enumerate(fds, 1):
                os.dup2(fd, number)
                os.close(fd)
            connection.close()
            return job
        for fd in fds:
            os.close(fd)
        connection.sendall(b"%d\n" % pid)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def become(words: Sequence[str], cwd: str, env: Mapping[str, str]) -> None:
    """Make of this process, a child that was forked, what a new one would be."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = os.getcwd()
    sys.argv = ["unet-surgery", *words]


def run_main() -> int:
    """Run the command; return its exit code. Taking the interpreter down would take longer than most commands."""
    from unet_surgery.cli.main import main

    code: object = None
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does: what is left running is waited for
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 0 if code is None else 1


if __name__ == "__main__":
    import importlib

    for name in sys.argv[2:]:
        importlib.import_module(name)
    if sys.argv[2:] == WITHOUT_HUB and "huggingface_hub" in sys.modules:
        sys.exit("the package imports huggingface_hub before it is needed")
    gc.freeze()  # what is there need not be walked, and so copied, in every child
    job = _serve(socket.socket(fileno=int(sys.argv[1])))
    become(job["words"], job["cwd"], job["env"])
    signal.setitimer(signal.ITIMER_REAL, job["timeout"])
    os._exit(run_main())
