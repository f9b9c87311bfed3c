"""The protocol that makes a folder appear whole: locks, races, short writes, and what is on disk before the rename."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from configs import CONFIGS
from teachers import entries, folder_bytes, write_unet

import unet_surgery
from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.staging import Staging
from unet_surgery.errors import OutputError


@pytest.fixture
def teacher(unet_folders: dict[str, Path]) -> Path:
    return unet_folders["sd1"]


@pytest.mark.parametrize("force", [False, True], ids=["fresh", "force"])
def test_two_writers_never_mix(tiny: Path, tmp_path: Path, force: bool) -> None:
    """Real processes race for one output; it ends as one student or the other, whole, and nobody leaves anything."""
    recipes = ("bk_base", "bk_tiny")
    whole = {name: folder_bytes(unet_surgery.prune(name, tiny, tmp_path / name).folder) for name in recipes}
    winners = set()
    for number in range(2):
        out = tmp_path / f"race-{number}"
        if force:
            unet_surgery.prune("bk_small", tiny, out)
        command = [sys.executable, "-m", "unet_surgery", "prune", "-t", str(tiny), "-o", str(out), "-q"]
        command += ["--force"] if force else []
        order = recipes if number % 2 else recipes[::-1]
        racers = [subprocess.Popen([*command, "-r", name], stderr=subprocess.PIPE, text=True) for name in order]
        messages = [racer.communicate(timeout=60)[1] for racer in racers]
        codes = [racer.returncode for racer in racers]
        assert 0 in codes
        for code, message in zip(codes, messages, strict=True):
            assert code == 0 or (code == 4 and "output" in message and "Traceback" not in message)
        ended = [name for name in recipes if folder_bytes(out) == whole[name]]
        assert len(ended) == 1
        winners.update(ended)
    assert not [name for name in entries(tmp_path) if name.startswith(".")]


def test_a_staging_folder_that_appears_after_the_commit_is_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = disk.fsync_folder

    def another_starts(path: Path) -> None:
        real(path)
        if path == tmp_path and not (tmp_path / ".out.unet-surgery").exists():
            (tmp_path / ".out.unet-surgery").mkdir()

    monkeypatch.setattr(disk, "fsync_folder", another_starts)
    with Staging(tmp_path / "out") as staging:
        staging.commit()
    assert entries(tmp_path) == [".out.unet-surgery", "out"]


def test_a_lock_won_after_the_owner_renamed_its_folder_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, the owner commits: the locked folder is its finished output, not ours to clear."""
    owned = tmp_path / ".out.unet-surgery"
    owned.mkdir()
    (owned / "finished").write_text("x")
    real = fcntl.flock

    def commit_first(fd: int, operation: int) -> None:
        if not (tmp_path / "out").exists():
            owned.rename(tmp_path / "out")
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", commit_first)
    with Staging(tmp_path / "out", replace=lambda folder: None) as staging:
        assert (tmp_path / "out" / "finished").read_text() == "x"
        assert entries(staging.folder) == []
    assert entries(tmp_path) == ["out"]


def test_what_was_replaced_stays_locked_until_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    real = disk.exchange
    refusals = []

    def try_meanwhile(source: Path, target: Path) -> bool:
        done = real(source, target)
        with (
            pytest.raises(OutputError, match="another process") as caught,
            Staging(target, replace=lambda folder: None),
        ):
            pass
        refusals.append(caught.value)
        return done

    monkeypatch.setattr(disk, "exchange", try_meanwhile)
    with Staging(tmp_path / "out", replace=lambda folder: None) as staging:
        (staging.folder / "new").write_text("x")
        staging.commit()
    assert len(refusals) == 1
    assert entries(tmp_path / "out") == ["new"]
    assert entries(tmp_path) == ["out"]


def test_short_writes_are_continued(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = unet_surgery.prune("bk_tiny", teacher, tmp_path / "a", dtype="fp16").folder
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:1000]))
    assert folder_bytes(unet_surgery.prune("bk_tiny", teacher, tmp_path / "b", dtype="fp16").folder) == folder_bytes(
        whole
    )


def test_everything_is_on_disk_before_the_rename(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, object]] = []
    open_files: dict[int, Path] = {}
    create, fsync, fsync_folder, rename = disk.create, disk.fsync, disk.fsync_folder, disk.rename_new

    def on_create(path: Path) -> int:
        fd = create(path)
        open_files[fd] = path
        events.append(("create", path))
        return fd

    def on_fsync(fd: int) -> None:
        fsync(fd)
        events.append(("fsync", open_files[fd]))

    def on_fsync_folder(path: Path) -> None:
        fsync_folder(path)
        events.append(("fsync", path))

    def on_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append(("rename", target))

    for name, function in (("create", on_create), ("fsync", on_fsync), ("fsync_folder", on_fsync_folder)):
        monkeypatch.setattr(disk, name, function)
    monkeypatch.setattr(disk, "rename_new", on_rename)
    out = unet_surgery.prune("bk_tiny", tiny, tmp_path / "out").folder
    moment = events.index(("rename", out))
    synced = {path for kind, path in events[:moment] if kind == "fsync"}
    staged = tmp_path / ".out.unet-surgery"
    files = {staged / path.relative_to(out) for path in out.rglob("*")}
    assert len(files) > 15
    assert files | {staged} == synced
    assert ("fsync", tmp_path) in events[moment:]


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot swap two folders."""
    monkeypatch.setattr(disk, "exchange", lambda source, target: False)


@pytest.mark.usefixtures("no_exchange")
def test_a_replace_that_fails_halfway_puts_the_old_one_back(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = unet_surgery.prune("bk_base", teacher, tmp_path / "out").folder
    before = folder_bytes(out)
    real, calls = disk.rename_new, []

    def fail_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(disk, "rename_new", fail_second)
    with pytest.raises(OutputError, match="Input/output error"):
        unet_surgery.prune("bk_tiny", teacher, out, force=True)
    assert folder_bytes(out) == before
    assert entries(tmp_path) == ["out"]


def test_a_replace_that_died_halfway_is_recovered(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = unet_surgery.prune("bk_base", teacher, tmp_path / "out").folder
    before = folder_bytes(out)
    out.rename(tmp_path / ".out.replaced.unet-surgery")  # where a kill between the two renames leaves it
    with pytest.raises(OutputError, match="exists"):
        unet_surgery.prune("bk_tiny", teacher, out)
    assert "restoring" in caplog.text
    assert folder_bytes(out) == before
    shutil.copytree(out, tmp_path / ".out.replaced.unet-surgery")  # and one after the second
    unet_surgery.prune("bk_tiny", teacher, out, force=True)
    assert entries(tmp_path) == ["out"]


def test_a_refused_run_clears_what_a_dead_one_left(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that was killed while it removed what it had replaced: the next one need not be allowed to replace."""
    out = unet_surgery.prune("bk_base", teacher, tmp_path / "out").folder
    before = folder_bytes(out)
    (tmp_path / ".out.unet-surgery").mkdir()
    (tmp_path / ".out.unet-surgery" / "plan.json").write_text("{}")
    with pytest.raises(OutputError, match="exists"):
        unet_surgery.prune("bk_tiny", teacher, out)
    assert "clearing what an interrupted run left" in caplog.text
    assert folder_bytes(out) == before
    assert entries(tmp_path) == ["out"]


def test_an_unconfirmed_rename_is_not_called_a_failure_to_write(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = disk.fsync_folder

    def fail_for_the_parent(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path)

    monkeypatch.setattr(disk, "fsync_folder", fail_for_the_parent)
    with pytest.raises(OutputError, match="in place and whole, but the disk did not confirm"):
        unet_surgery.prune("bk_tiny", teacher, tmp_path / "out")
    unet_surgery.check(tmp_path / "out", teacher)


def test_a_built_in_teacher_is_made_once_for_many(tmp_path: Path) -> None:
    environment = {**os.environ, "UNET_SURGERY_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "unet_surgery", "prune", "-r", "bk_tiny", "-t", "tiny-random", "-q", "-o"]
    processes = [
        subprocess.Popen([*command, str(tmp_path / f"out-{k}")], env=environment, stderr=subprocess.PIPE, text=True)
        for k in range(4)
    ]
    assert [(p.communicate(timeout=60)[1], p.returncode) for p in processes] == [("", 0)] * 4
    assert entries(tmp_path / "cache") == ["tiny-random"]


def test_features_of_a_net_that_lost_an_inner_level() -> None:
    """Levels below the removed one run at another resolution: nothing of theirs can be compared."""
    from unet_surgery.graph import build, parse_config, resolve
    from unet_surgery.lower import make_plan

    config = parse_config({**CONFIGS["three-equal"], "attention_head_dim": 2})
    plan = make_plan(config, resolve(build(config), ["down.1", "up.1"]), recipe={}, teacher_id="x")
    assert [(p.student.module, p.teacher.module) for p in plan.features.plan] == [
        ("down_blocks.0", "down_blocks.0"),
        ("up_blocks.1", "up_blocks.2"),
    ]


def test_a_teacher_in_the_output_is_refused_by_inode(tmp_path: Path) -> None:
    folder = write_unet(tmp_path / "teacher", CONFIGS["two-levels"])
    (tmp_path / "other-name").symlink_to(tmp_path)
    recipe = unet_surgery.Recipe(name="x", remove=("mid",))
    with pytest.raises(OutputError, match="teacher's folder"):
        unet_surgery.prune(recipe, folder, tmp_path / "other-name" / "teacher" / "out")
    assert entries(tmp_path) == ["other-name", "teacher"]
