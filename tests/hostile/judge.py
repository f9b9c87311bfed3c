"""The judge of hostile inputs: runs the real command line on one and says everything that is wrong with the outcome."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

MEGABYTE = 1_000_000
PEAK_BYTES = 150 * MEGABYTE
CPU_SECONDS = 2.0  # the figures script reports the worst; this is what a noisy machine is allowed
TIMEOUT_SECONDS = 30.0
MAX_MESSAGE_CHARS = 3000
TEACHER_FAULT, RECIPE_FAULT, OUTPUT_FAULT, STUDENT_FAULT, ACCEPTED = 3, 2, 4, 6, 0
PRUNE = ("prune", "--recipe", "bk_tiny", "--teacher", "teacher", "--out", "out")
CHECK = ("check", "student")


@dataclass(frozen=True)
class Case:
    """One input: ``build`` writes it into an empty folder, in which ``argv`` then runs."""

    group: str
    name: str
    build: Callable[[Path], object]
    says: tuple[str, ...] = ()
    code: int = TEACHER_FAULT
    argv: tuple[str, ...] = PRUNE

    @property
    def id(self) -> str:
        return f"{self.group}: {self.name}"


@dataclass(frozen=True)
class Verdict:
    """What happened; a good outcome has no ``problems``."""

    case: Case
    code: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    message: str
    problems: tuple[str, ...] = field(default=())


class Launcher:
    """A context manager around tests/hostile/launcher.py.

    Each command is a new program, or, where ``is_warm``, a child of one that has imported the command line: as tests
    want it, but not who measures what a whole process takes.
    """

    def __init__(self, *, is_warm: bool = False) -> None:
        script = Path(__file__).with_name("launcher.py")
        words = (
            [sys.executable, str(script), str(script.parents[1])]
            if is_warm
            else [sys.executable, "-S", "-E", str(script)]
        )
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[1:]), "LANG": "C.UTF-8"}
        self._process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(self, argv: tuple[str, ...], cwd: Path, logs: Path, env: Mapping[str, str]) -> dict[str, Any]:
        job = {
            "argv": [sys.executable, "-m", "unet_surgery", *argv],
            "cwd": str(cwd),
            "env": dict(env),
            "timeout": TIMEOUT_SECONDS,
            "stdout": str(logs / "stdout"),
            "stderr": str(logs / "stderr"),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._process.stdout.readline())
        for name in ("stdout", "stderr"):
            result[name] = (logs / name).read_text("utf-8", "surrogateescape")
        return result


def judge(case: Case, place: Path, launcher: Launcher) -> Verdict:
    """Build ``case`` below the empty folder ``place``, run it, and return what happened."""
    work, logs, spare = (place / name for name in ("work", "logs", "spare"))
    for folder in (work, logs, spare):
        folder.mkdir()
    case.build(work)
    env = _environment(place, spare)
    before = snapshot(work)
    result = launcher.run(case.argv, work, logs, env)
    after = snapshot(work)
    problems = list(_problems(case, result))
    created = {path for path in after if path not in before and path.split("/")[0] != "out"}
    lost = {path for path in before if after.get(path) != before[path]}
    if case.code != ACCEPTED:
        created |= {path for path in after if path not in before}
    problems += [f"left behind: {path}" for path in sorted(created)]
    problems += [f"changed: {path}" for path in sorted(lost)]
    problems += [f"left in a temporary folder: {name}" for name in sorted(os.listdir(spare))]
    if (place / "canary").exists():
        problems.append("something of the input was executed")
    if case.code == ACCEPTED and case.argv == PRUNE and not problems:
        again = launcher.run(("check", "out", "--teacher", "teacher"), work, logs, env)
        if again["code"] != 0:
            problems.append(f"accepted, and check refuses: {again['stderr']}")
    return Verdict(
        case,
        result["code"],
        result["seconds"],
        result["cpu_seconds"],
        result["peak_bytes"],
        result["stderr"],
        tuple(problems),
    )


def _environment(place: Path, spare: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path[1:]),
        "LANG": "C.UTF-8",
        "HOME": str(spare),
        "TMPDIR": str(spare),
        "UNET_SURGERY_CACHE": str(spare / "cache"),
        "HF_HOME": str(spare / "hf"),
        "HF_HUB_OFFLINE": "1",
        "CANARY": str(place / "canary"),
    }


def _problems(case: Case, result: Mapping[str, Any]) -> list[str]:
    code, stdout, stderr = result["code"], result["stdout"], result["stderr"]
    found = []
    if code != case.code:
        found.append(f"exit code {code}, expected {case.code}")
    if result["cpu_seconds"] > CPU_SECONDS:
        found.append(f"took {result['cpu_seconds']:.1f} s")
    if result["peak_bytes"] > PEAK_BYTES:
        found.append(f"took {result['peak_bytes'] / MEGABYTE:.0f} MB")
    found += [f"does not say {text!r}" for text in case.says if text not in stderr]
    if "Traceback" in stderr or "fault of unet-surgery" in stderr:
        found.append("crashed")
    if any(not c.isprintable() and c != "\n" for c in stdout + stderr):
        found.append("raw control characters in the output")
    if len(stderr) > MAX_MESSAGE_CHARS:
        found.append(f"a message of {len(stderr)} characters")
    if case.code != ACCEPTED:
        if sum(line.startswith("error: ") for line in stderr.splitlines()) != 1 or not stderr.startswith("error: "):
            found.append("not one message")
        if not any(label in stderr for label in ("  expected: ", "  found:    ", "  try:      ")):
            found.append("says neither what was expected, nor what was found, nor what to do")
        if case.code in (TEACHER_FAULT, STUDENT_FAULT, OUTPUT_FAULT) and "  where:    " not in stderr:
            found.append("does not say where")
        if stdout:
            found.append("prints a result")
    return found


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return relative path → what it is, for everything below ``folder``; files by content."""
    seen: dict[str, tuple[object, ...]] = {}
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(root, name)
            status = path.lstat()
            what: object = status.st_size
            if stat.S_ISREG(status.st_mode) and status.st_size <= 16 * MEGABYTE:
                what = path.read_bytes()
            elif stat.S_ISDIR(status.st_mode):
                what = None
            elif stat.S_ISLNK(status.st_mode):
                what = os.readlink(path)
            seen[str(path.relative_to(folder))] = (stat.S_IFMT(status.st_mode), what)
    return seen
