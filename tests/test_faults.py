"""Whatever happens at whichever call that changes a file, the output is the old folder or the new one.

``tests/faults.py`` tries the points, in a process of its own; here they are counted. All faults at all calls are more
than 12,000 points and take ten minutes of one core: ``make test-extra`` has them. In ``make test`` every call meets at
least one fault, in turn, some 700 in all, which together are nearly every fault of every kind. Of the fresh runs it has
one only: the calls of the others are among those of the same run with ``--force``.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_scenarios import SCENARIOS
from fault_shim import FAULTS
from teachers import entries

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.staging import Staging
from unet_surgery.errors import OutputError, TeacherError

EVERY = 5
SCRIPT = Path(__file__).with_name("faults.py")
NAMES = list(SCENARIOS)
PLAIN = [name for name in NAMES if name == "unet-fresh" or not name.endswith("-fresh")]
GROUPS = sorted({name.split("-")[0] for name in PLAIN})


def found(*arguments: object) -> list[dict[str, Any]]:
    """Run faults.py and return what it found, after checking that nothing is wrong with any of it."""
    result = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # what forks has one thread
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    points = [json.loads(line) for line in result.stdout.splitlines()]
    wrong = [point for point in points if point["wrong"]]
    assert not wrong, f"{len(wrong)} of {len(points)}: " + "\n".join(json.dumps(point) for point in wrong[:5])
    return points


def calls_of(points: list[dict[str, Any]]) -> Counter[str]:
    """Return how many calls of each kind were tried."""
    return Counter(kind for _, kind in {(point["call"], point["kind"]) for point in points})


# --- every call -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_every_call(group: str) -> None:
    names = [name for name in PLAIN if name.startswith(group)]
    points = found("sweep", *names, "--every", EVERY)
    for name in names:
        check_calls(name, [point for point in points if point["scenario"] == name])


@pytest.mark.extra
@pytest.mark.parametrize("name", NAMES)
def test_every_fault_at_every_call(name: str) -> None:
    points = found("sweep", name)
    calls = calls_of(points)
    assert len(points) == sum(len(FAULTS[kind]) * number for kind, number in calls.items()) >= 300
    check_calls(name, points)


def check_calls(name: str, points: list[dict[str, Any]]) -> None:
    """The shim has met what such a run does: one that intercepts nothing would find nothing wrong."""
    scenario, calls = SCENARIOS[name], calls_of(points)
    numbers = {point["call"] for point in points}
    assert numbers == set(range(len(numbers)))
    assert len(numbers) >= 20
    assert calls["create"] == calls["fsync"] >= 5
    assert calls["write"] >= (40 if "--dtype" in scenario.options else 5)
    assert calls["fsync folder"] >= 1 == calls["fsync parent"]
    assert bool(calls["copy"]) == ("--dtype" not in scenario.options)
    assert bool(calls["writeback"]) == (calls["copy"] and "--max-shard-size" not in scenario.options)
    assert bool(calls["reflink"]) == (scenario.teacher == "pipeline")
    assert bool(calls["link"]) == ("--link" in scenario.options)
    assert calls["swap"] == scenario.force
    assert bool(calls["rename"]) == (not scenario.force or not scenario.swap)
    assert bool(calls["unlink"]) == bool(calls["rmdir"]) == bool(scenario.before)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet-force", "pipeline-stale", "noswap-force"])
def test_a_storm_of_signals_changes_nothing(name: str) -> None:
    points = found("storm", name, "--count", 2)
    assert [point["ended"] for point in points] == ["new", "new"]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_signals_at_any_moment(number: str) -> None:
    points = found("moments", "pipeline-force", "--count", 8, "--signal", number)
    assert len(points) == 8


@pytest.mark.parametrize("name", ["unet-fresh", "unet-force", "noswap-both"])
def test_sigterm_at_the_lines_of_staging(name: str) -> None:
    assert len(found("lines", name, "--every", 8, "--offset", 1)) >= 9


@pytest.mark.extra
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("unet", "noswap"))])
def test_sigterm_at_every_line_of_staging(name: str) -> None:
    assert len(found("lines", name)) >= 60


# --- races ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "how"), [(30, ""), (30, "--force"), (10, "--no-swap"), (10, "--force --no-swap")],
    ids=["fresh", "force", "noswap", "noswap-force"],
)  # fmt: skip
def test_two_writers_never_mix(count: int, how: str) -> None:
    assert len(found("races", "--count", count, *how.split())) == count


# --- what is said, and what is let go of ------------------------------------------------------------------------------


@pytest.fixture
def no_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that removes nothing any more."""

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk, "remove_tree", fail)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def replace(target: Path, *, with_text: str = "new") -> None:
    with Staging(target, replace=lambda folder: None) as staging:
        (staging.folder / "file").write_text(with_text)
        staging.commit()


@pytest.mark.usefixtures("no_removal")
def test_an_old_folder_that_stays_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    with pytest.raises(OutputError) as caught:
        replace(tmp_path / "out")
    assert str(caught.value).splitlines() == [
        "the output is in place and whole, but what it replaced could not be removed",
        f"  where:    {tmp_path / '.out.unet-surgery'}",
        "  found:    Input/output error",
        "  try:      remove it yourself; or the next run with this output and --force does",
    ]
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert (tmp_path / ".out.unet-surgery" / "file").read_text() == "old"
    monkeypatch.undo()
    replace(tmp_path / "out", with_text="newer")
    assert entries(tmp_path) == ["out"]


@pytest.mark.usefixtures("no_removal")
@pytest.mark.parametrize("error", [TeacherError("damaged"), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failing_clean_up_does_not_hide_the_error(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        pytest.raises((TeacherError, OutputError), match="damaged|could not be written") as caught,
        Staging(tmp_path / "out"),
    ):
        raise error
    assert "No space" in str(caught.value) or caught.value is error
    assert ".out.unet-surgery could not be removed (Input/output error); the next run does" in caplog.text


def test_a_full_table_of_files_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def full(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECTORY:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OutputError, match="Too many open files"), Staging(tmp_path / "out"):
        pass
    assert entries(tmp_path) == []


def test_a_file_system_without_locks_is_not_called_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    before = open_fds()
    with pytest.raises(OutputError, match="No locks available"), Staging(tmp_path / "out"):
        pass
    assert entries(tmp_path) == []
    assert open_fds() == before


@pytest.mark.parametrize("call", ["make_folder", "fsync_folder", "exchange", "remove_tree"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "x"), ValueError()], ids=type)
def test_locks_and_handlers_are_let_go_of(
    tmp_path: Path, call: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    real, met = getattr(disk, call), []

    def fail_once(*args: Any) -> Any:
        if not met:
            met.append(args)
            raise error
        return real(*args)

    monkeypatch.setattr(disk, call, fail_once)
    before, handler = open_fds(), signal.getsignal(signal.SIGINT)
    with pytest.raises((type(error), OutputError)):
        replace(tmp_path / "out")
    assert met
    assert open_fds() == before
    assert signal.getsignal(signal.SIGINT) is handler
    replace(tmp_path / "out")
    assert entries(tmp_path) == ["out"]
    assert entries(tmp_path / "out") == ["file"]


def test_a_handler_that_goes_on_is_called_as_ever(tmp_path: Path) -> None:
    """A program's own handler, which notes the signal and lets work go on: at once, or after what must not be cut."""
    arrived: list[str] = []
    moment = "none"
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(moment))
    try:
        with Staging(tmp_path / "out") as staging:
            moment = "working"
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            staging.commit()
            moment = "committed"
            signal.raise_signal(signal.SIGTERM)
            moment = "left"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert arrived == ["working", "working", "left"]
    assert entries(tmp_path) == ["out"]


def test_a_second_signal_does_not_disturb_what_the_first_began(tmp_path: Path) -> None:
    def impatient() -> None:
        with Staging(tmp_path / "out") as staging:
            (staging.folder / "file").write_text("x")
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)  # waits
                assert entries(tmp_path) == [".out.unet-surgery"]

    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert entries(tmp_path) == []


def test_threads_may_stage(tmp_path: Path) -> None:
    """Signals are the main thread's business, so there is nothing to hold back in another one."""
    results: list[object] = []

    def work() -> None:
        try:
            results.append(replace(tmp_path / "out"))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [None]
    assert entries(tmp_path) == ["out"]


# --- calls that are made again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rename", [disk.rename_new, disk.exchange], ids=["rename", "exchange"])
@pytest.mark.parametrize("swap", [True, False], ids=["renameat2", "rename"])
def test_an_interrupted_rename_is_done_once(
    tmp_path: Path, rename: Callable[[Path, Path], object], swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before and, as a network file system may, after it was done."""
    source, target = tmp_path / "source", tmp_path / "target"
    for done in (False, True):
        (source).mkdir()
        (source / "new").touch()
        if rename is disk.exchange:
            target.mkdir()
        real, met = (disk._renameat2, []) if swap else (os.rename, [])

        def interrupt(*args: Any, real: Any = real, met: list[object] = met, done: bool = done) -> None:
            if met or done:
                real(*args)
            met.append(args)
            if len(met) == 1:
                raise InterruptedError

        def refuse(*args: object) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        with monkeypatch.context() as patch:
            patch.setattr(disk, "_renameat2", interrupt if swap else refuse)
            if not swap:
                patch.setattr(os, "rename", interrupt)
            assert rename(source, target) is (None if rename is disk.rename_new else swap)
        if rename is disk.rename_new or swap:
            assert entries(target) == ["new"]
            assert len(met) == (1 if done else 2)
        for folder in (source, target):
            disk.remove_tree(folder)


def test_folders_of_a_file_system_that_does_not_sync_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    disk.fsync_folder(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        disk.write_file(tmp_path / "file", b"x")


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["open", "ftruncate", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EINTR, errno.EIO], ids=errno.errorcode.get)
def test_a_replaced_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")
    real, met = getattr(os, call), []

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        if not met:
            met.append(args)
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, fail_once)
    if number == errno.EINTR:
        disk.replace_file(tmp_path / "file", b"new", force=True)
    else:
        with pytest.raises(OSError, match="Input/output error"):
            disk.replace_file(tmp_path / "file", b"new", force=True)
    assert met
    assert (tmp_path / "file").read_text() == ("new" if number == errno.EINTR else "old")
    assert entries(tmp_path) == ["file"]
