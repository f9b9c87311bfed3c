"""Checkpoints of a training run: bit for bit what was saved, whatever happens while they are written or lie there."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fault_shim import FAULTS
from hypothesis import given, settings
from hypothesis import strategies as st
from state_faults import SCENARIOS, bits, made, same
from teachers import entries, folder_bytes

from unet_surgery.checkpoint import disk
from unet_surgery.distill import state as state_module
from unet_surgery.distill import statefile
from unet_surgery.distill.metrics import METRICS, Metrics
from unet_surgery.distill.runlock import LOCK, RunLock
from unet_surgery.distill.state import (
    CHECKPOINTS,
    TrainingState,
    load_state,
    newest_state,
    save_state,
    state_folders,
)
from unet_surgery.distill.statefile import DTYPES, DamagedError
from unet_surgery.errors import OutputBusyError, OutputError, SurgeryError, TrainingError

FILES = ("exp_avg.safetensors", "manifest.json", "state.json", "weights.safetensors")
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 1 and 2; copy it before it is changed."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run.mkdir()
    for step in (1, 2):
        save_state(run, small(step))
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def small(step: int) -> TrainingState:
    """Return a state of a few hundred bytes."""
    weights = {"a": torch.arange(6.0).view(2, 3) + step, "b": torch.tensor(float("nan"))}
    return TrainingState(
        step, {"weights": weights, "exp_avg": {"a": torch.full((5,), step).bfloat16()}}, {"cursor": step}
    )


# --- what is saved is what is read ------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Draw a tensor of any dtype, of any bits (NaN payloads among them), of 0 to 3 dimensions, of any strides."""
    dtype = draw(st.sampled_from(sorted(DTYPES, key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = torch.Size(shape).numel() * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype == torch.bool:
        data = bytearray(value & 1 for value in data)
    tensor = torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
    return tensor.transpose(0, -1) if draw(st.booleans()) and len(shape) > 1 else tensor


NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name.isprintable() and name != "__metadata__")
FACTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50)
@given(
    groups=st.dictionaries(
        st.sampled_from(["weights", "ema", "exp_avg_sq"]), st.dictionaries(NAMES, tensors(), max_size=4), max_size=3
    ),
    facts=st.dictionaries(NAMES, FACTS, max_size=4),
    step=st.integers(0, 10**12),
)
def test_every_state_comes_back_bit_for_bit(
    groups: dict[str, dict[str, torch.Tensor]], facts: dict[str, object], step: int
) -> None:
    run = Path(os.environ["UNET_SURGERY_CACHE"]) / "round-trip"
    run.mkdir(parents=True, exist_ok=True)
    state = TrainingState(step, groups, facts)
    folder = save_state(run, state)
    assert same(load_state(folder), state)
    found = newest_state(run)
    assert found is not None
    assert same(found, state)
    shutil.rmtree(run)


def test_a_group_is_the_file_that_safetensors_writes(run: Path) -> None:
    group = {"b": torch.randn(3), "a": torch.randn(2, 2), "n": torch.tensor(7), "h": torch.randn(4).half()}
    folder = save_state(run, TrainingState(3, {"weights": group}, {}))
    safetensors.torch.save_file(group, run / "theirs", metadata={"format": "pt"})
    assert (folder / "weights.safetensors").read_bytes() == (run / "theirs").read_bytes()
    assert safetensors.torch.load_file(folder / "weights.safetensors").keys() == group.keys()


def test_the_folder_says_what_is_in_it(run: Path) -> None:
    folder = run / CHECKPOINTS / "step-00000002"
    assert entries(folder) == list(FILES)
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert {name: entry["bytes"] for name, entry in listed.items()} == {
        name: (folder / name).stat().st_size for name in FILES if name != "manifest.json"
    }
    value = json.loads((folder / "state.json").read_text())
    assert value == {
        "format": "unet-surgery training state 1",
        "step": 2,
        "groups": {"weights": 2, "exp_avg": 1},
        "facts": {"cursor": 2},
    }


def test_pieces_join_to_the_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statefile, "PIECE_BYTES", 100)
    real_write, real_read = os.write, os.preadv
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:33]))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real_read(fd, [views[0][:17]], offset))
    state = made(3)
    told: list[tuple[int, int]] = []
    folder = save_state(run, state, progress=lambda done, total: told.append((done, total)))
    assert same(load_state(folder), state)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] == sum((folder / name).stat().st_size for name in FILES if name != FILES[1])


def test_memory_holds_no_second_copy(tmp_path: Path) -> None:
    """Saving 128 MB takes less than 40 MB more; loading takes what is loaded, and less than 40 MB more."""
    script = """
import resource, sys, torch
from pathlib import Path
from unet_surgery.distill.state import *
run = Path(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
save_state(run, TrainingState(1, {"weights": {"x": torch.ones(8)}}, {}))
load_state(run / "checkpoints/step-00000001")
state = TrainingState(2, {"weights": {"x": torch.ones(16 << 20)}, "ema": {"x": torch.ones(16 << 20)}}, {})
before = peak(); save_state(run, state); saved = peak()
again = load_state(run / "checkpoints/step-00000002"); loaded = peak()
assert torch.equal(again.tensors["ema"]["x"], state.tensors["ema"]["x"])
print(saved - before, loaded - saved)
"""
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    saving, loading = map(float, result.stdout.split())
    assert saving < 40
    assert loading < 128 + 40


@pytest.mark.parametrize(
    ("groups", "facts", "words"),
    [
        ({"../x": {}}, {}, "group of tensors"),
        ({"Weights": {}}, {}, "group of tensors"),
        ({"weights": {"": torch.ones(1)}}, {}, "cannot be called"),
        ({"weights": {"__metadata__": torch.ones(1)}}, {}, "cannot be called"),
        ({"weights": {"a\n": torch.ones(1)}}, {}, "cannot be called"),
        ({"weights": {"a": torch.ones(1, dtype=torch.complex64)}}, {}, "cannot be stored"),
        ({"weights": {"a": torch.ones(1, device="meta")}}, {}, "cannot be stored"),
        ({"weights": {"a": torch.ones(1).to_sparse()}}, {}, "cannot be stored"),
        ({}, {"pair": (1, 2)}, "no plain JSON"),
        ({}, {"deep": {1: 2}}, "no plain JSON"),
        ({}, {"loss": float("nan")}, "JSON"),
    ],
)
def test_what_cannot_come_back_is_not_saved(run: Path, groups: dict, facts: dict, words: str) -> None:
    before = folder_bytes(run)
    with pytest.raises(ValueError, match=words):
        save_state(run, TrainingState(3, groups, facts))
    assert folder_bytes(run) == before


# --- rotation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(run: Path, keep: int) -> None:
    for step in (3, 4, 5):
        save_state(run, small(step), keep=keep)
    assert entries(run / CHECKPOINTS) == [f"step-{step:08d}" for step in (1, 2, 3, 4, 5)[-keep:]]
    assert [folder.name for folder in state_folders(run)] == entries(run / CHECKPOINTS)


def test_steps_of_more_digits_are_newer(run: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save_state(run, small(step))
    found = newest_state(run)
    assert found is not None
    assert found.step == 100_000_000
    assert len(entries(run / CHECKPOINTS)) == 2


def test_a_run_that_went_back_leaves_its_old_course(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_state(run, small(8), keep=3)
    save_state(run, small(5), keep=3)
    assert "gone back from: step-00000008" in caplog.text
    found = newest_state(run)
    assert found is not None
    assert found.step == 5


def test_the_same_step_is_replaced(run: Path) -> None:
    state = TrainingState(2, small(7).tensors, {})
    assert same(load_state(save_state(run, state)), state)
    assert entries(run / CHECKPOINTS) == ["step-00000001", "step-00000002"]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_is_found(run: Path, file: str) -> None:
    folder = run / CHECKPOINTS / "step-00000002"
    data = (folder / file).read_bytes()
    assert len(data) > 100
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        (folder / file).write_bytes(flipped)
        with pytest.raises(TrainingError, match="checkpoint is damaged"):
            load_state(folder)
    (folder / file).write_bytes(data)
    assert same(load_state(folder), small(2))


def _link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def _remake(make: object) -> object:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


DAMAGE = {
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": Path.unlink,
    "link": _link,
    "folder": _remake(Path.mkdir),
    "fifo": _remake(os.mkfifo),
    "other group": lambda path: shutil.copy(path.parent / "exp_avg.safetensors", path),
    "older": lambda path: shutil.copy(path.parent.parent / "step-00000001" / path.name, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_said_set_aside_and_the_one_before_is_used(
    run: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    if (damage, file) == ("other group", "exp_avg.safetensors"):
        pytest.skip("that is the same file")
    DAMAGE[damage](run / CHECKPOINTS / "step-00000002" / file)
    found = newest_state(run)
    assert found is not None
    assert same(found, small(1))
    (message,) = caplog.messages
    assert message.startswith("step-00000002 is damaged and was renamed to step-00000002.corrupt-1: ")
    assert re.search(r"safetensors|\.json", message)
    assert entries(run / CHECKPOINTS) == ["step-00000001", "step-00000002.corrupt-1"]


def test_a_folder_of_another_step_is_damaged(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(run / CHECKPOINTS / "step-00000001", run / CHECKPOINTS / "step-00000007")
    (run / CHECKPOINTS / "step-00000009").mkdir()
    (run / CHECKPOINTS / "step-00000008").touch()
    found = newest_state(run)
    assert found is not None
    assert found.step == 2
    assert [message.rpartition(": ")[2] for message in caplog.messages] == [
        "manifest.json is missing",
        "it is not a folder",
        "it holds the state of step 1",
    ]


def test_when_all_are_damaged_nothing_begins_from_scratch(run: Path) -> None:
    for folder in state_folders(run):
        (folder / "state.json").write_bytes(b"{}")
    for _ in range(2):  # the second time they have been set aside already
        with pytest.raises(TrainingError, match="no checkpoint of this run is whole") as caught:
            newest_state(run)
        assert "2 damaged, the last of them step-00000002.corrupt-1" in str(caught.value)
    shutil.copytree(run / CHECKPOINTS / "step-00000002.corrupt-1", run / CHECKPOINTS / "step-00000002")
    with pytest.raises(TrainingError):
        newest_state(run)
    assert "step-00000002.corrupt-2" in entries(run / CHECKPOINTS)


def test_a_run_without_checkpoints_has_no_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_state(tmp_path) is None
    (tmp_path / CHECKPOINTS / ".step-00000003.unet-surgery").mkdir(parents=True)
    (tmp_path / CHECKPOINTS / ".step-00000003.unet-surgery" / "weights.safetensors").touch()
    assert newest_state(tmp_path) is None
    assert caplog.messages == ["clearing what an interrupted run left in .step-00000003.unet-surgery"]
    assert entries(tmp_path / CHECKPOINTS) == []


def test_another_versions_state_is_not_called_damaged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "FORMAT", "unet-surgery training state 2")
    save_state(run, small(3))
    monkeypatch.undo()
    with pytest.raises(TrainingError, match="another version") as caught:
        newest_state(run)
    assert caught.value.found == "unet-surgery training state 2"
    assert "step-00000003" in entries(run / CHECKPOINTS)


def test_names_from_json_are_not_trusted(run: Path) -> None:
    """A manifest and a state that agree with each other, and lead out of the folder."""
    folder = run / CHECKPOINTS / "step-00000002"
    outside = run / "outside.safetensors"
    shutil.copy(folder / "weights.safetensors", outside)
    value = json.loads((folder / "state.json").read_text())
    value["groups"] = {"../../outside": 2}
    text = (json.dumps(value) + "\n").encode()
    (folder / "state.json").write_bytes(text)
    digest = state_module.sha256
    files = {
        "state.json": statefile.Stored(len(text), digest(text).hexdigest()),
        "../../outside.safetensors": statefile.Stored(outside.stat().st_size, digest(outside.read_bytes()).hexdigest()),
    }
    (folder / "manifest.json").write_bytes(state_module._manifest_text(files))
    with pytest.raises(TrainingError, match="name other groups"):
        load_state(folder)


@pytest.mark.parametrize(("number", "is_damage"), [(errno.EIO, True), (errno.EACCES, False), (errno.EMFILE, False)])
def test_what_cannot_be_read_just_now_is_not_set_aside(
    run: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_damage: bool
) -> None:
    real = os.open

    def refuse(path: object, *args: int, **kwargs: object) -> int:
        if "step-00000002/weights" in str(path):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    if is_damage:
        found = newest_state(run)
        assert found is not None
        assert found.step == 1
    else:
        with pytest.raises(TrainingError, match="cannot be read"):
            newest_state(run)
        assert "step-00000002" in entries(run / CHECKPOINTS)


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenarios", [list(SCENARIOS)[:3], list(SCENARIOS)[3:]], ids=" ".join)
def test_a_fault_at_every_call(scenarios: list[str]) -> None:
    check_sweep(sweep(*scenarios), scenarios)


@pytest.mark.extra
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_fault_at_every_call(scenario: str) -> None:
    points = sweep(scenario, "--all")
    assert len(points) == sum(len(FAULTS[kind]) for kind in {p["call"]: p["kind"] for p in points}.values()) > 300
    check_sweep(points, [scenario])


def sweep(*arguments: str) -> list[dict]:
    result = subprocess.run(
        [sys.executable, TESTS / "state_faults.py", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_sweep(points: list[dict], scenarios: list[str]) -> None:
    """The shim must have met what saving does: one that intercepts nothing would find nothing wrong."""
    wrong = [point for point in points if point["wrong"]]
    assert not wrong, f"{len(wrong)} of {len(points)}: " + "\n".join(json.dumps(point) for point in wrong[:5])
    for scenario in scenarios:
        mine = [point for point in points if point["scenario"] == scenario]
        calls = {point["call"]: (point["kind"], point["where"]) for point in mine}
        kinds = [kind for kind, _ in calls.values()]
        assert sorted(calls) == list(range(len(calls)))
        killed = {point["call"] for point in mine if point["code"] == -signal.SIGKILL}
        assert killed == set(calls) if scenario == "rotate" else len(killed) >= len(calls) // 2
        assert {"create", "write", "fsync", "fsync folder", "fsync parent", "mkdir", "writeback"} < set(kinds)
        assert kinds.count("fsync") == 5
        assert ("unlink" in kinds) == (scenario != "first")
        assert ("swap" in kinds) == (scenario in ("again", "back", "noswap"))


def test_a_full_disk_is_noticed_before_anything_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folder_bytes(run)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)
    with pytest.raises(OutputError, match="not enough room"):
        save_state(run, small(3))
    assert folder_bytes(run) == before
    assert entries(run / CHECKPOINTS) == ["step-00000001", "step-00000002"]


def test_everything_is_on_disk_before_the_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, disk.rename_new

    def on_fsync(fd: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def on_rename(source: Path, target: Path) -> None:
        events.append(f"{source.name} → {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", on_fsync)
    monkeypatch.setattr(disk, "rename_new", on_rename)
    save_state(run, small(3))
    staged = ".step-00000003.unet-surgery"
    assert set(events[:4]) == set(FILES)
    assert events[3:] == [
        "manifest.json",
        staged,
        f"{staged} → step-00000003",
        CHECKPOINTS,
        "step-00000001 → .step-00000001.unet-surgery",
        CHECKPOINTS,
    ]


# --- the lock ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from unet_surgery.distill.runlock import RunLock
with RunLock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_the_second_trainer_names_the_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdin is not None
    assert first.stdout is not None
    assert first.stdout.readline() == "locked\n"
    with pytest.raises(OutputBusyError, match="another process is training in this folder") as caught, RunLock(run):
        pass
    found = caught.value.found or ""
    assert re.fullmatch(rf"process {first.pid} on {re.escape(os.uname().nodename)}, since 20\S+ \S+\+00:00", found)
    first.kill()  # a killed one's lock is nobody's
    first.wait()
    first.stdin.close()
    first.stdout.close()
    with RunLock(run):
        assert json.loads((run / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(OutputBusyError, match=f"process {os.getpid()} "), RunLock(run):
            pass
    with RunLock(run):
        pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it has not said which"),
        (b"\xff{", "it has not said which"),
        (b'{"pid": "\x1b[2J\\u001b[2J", "host": 3}', "it has not said which"),
        (b'{"pid": "\\u001b[2J"}', "process \\u001b[2J on None"),
        (b'{"pid": "' + b"x" * 9000 + b'"}', "it has not said which"),
    ],
)
def test_what_the_lock_says_is_only_data(tmp_path: Path, content: bytes, words: str) -> None:
    with RunLock(tmp_path):
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(OutputBusyError) as caught, RunLock(tmp_path):
            pass
    assert (caught.value.found or "").startswith(words)


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be made or locked"), RunLock(tmp_path / "no" / "run"):
        pass
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="cannot be made or locked"), RunLock(tmp_path):
        pass


# --- metrics ----------------------------------------------------------------------------------------------------------


def write_metrics(run: Path, begin: int, end: int) -> None:
    with Metrics(run, step=begin) as metrics:
        for step in range(begin + 1, end + 1):
            metrics.append(step, {"loss": 1 / step, "note": "a\nb"})
        metrics.sync()


@settings(max_examples=50)
@given(stop=st.integers(0, 12), resume=st.integers(0, 12), tail=st.binary(max_size=12))
def test_a_resumed_runs_metrics_are_those_of_one_that_never_stopped(stop: int, resume: int, tail: bytes) -> None:
    root = Path(os.environ["UNET_SURGERY_CACHE"]) / "metrics"
    (root / "straight").mkdir(parents=True)
    (root / "resumed").mkdir()
    write_metrics(root / "straight", 0, 12)
    write_metrics(root / "resumed", 0, stop)
    with open(root / "resumed" / METRICS, "ab") as file:
        file.write(tail.replace(b"\n", b""))  # what a kill leaves of a line
    write_metrics(root / "resumed", min(stop, resume), 12)
    assert (root / "resumed" / METRICS).read_bytes() == (root / "straight" / METRICS).read_bytes()
    shutil.rmtree(root)


def test_a_line_is_json_and_a_number_that_is_none_is_null(tmp_path: Path) -> None:
    with Metrics(tmp_path, step=0) as metrics:
        metrics.append(5, {"loss": float("nan"), "rate": float("-inf"), "skipped": True, "images": 3})
        with pytest.raises(ValueError, match="no line for step 4 can follow that of step 5"):
            metrics.append(4, {})
    assert (tmp_path / METRICS).read_text() == (
        '{"step": 5, "loss": null, "rate": null, "skipped": true, "images": 3}\n'
    )


def test_a_line_that_did_not_fit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    truncate = disk.truncate

    def fill(fd: int, data: memoryview, offset: int) -> int:
        real(fd, data[:-3], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(fd: int, num_bytes: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Metrics(tmp_path, step=0) as metrics:
        metrics.append(1, {"loss": 0.5})
        before = (tmp_path / METRICS).read_bytes()
        monkeypatch.setattr(os, "pwrite", fill)
        with pytest.raises(OutputError, match="metrics cannot be written"):
            metrics.append(2, {"loss": 0.25})
        assert (tmp_path / METRICS).read_bytes() == before
        monkeypatch.setattr(disk, "truncate", refuse)  # not even cutting works: the next line cuts first
        with pytest.raises(OutputError, match="metrics cannot be written"):
            metrics.append(2, {"a very long name of a number": 0.25})
        monkeypatch.setattr(os, "pwrite", real)
        monkeypatch.setattr(disk, "truncate", truncate)
        metrics.append(3, {})
    assert (tmp_path / METRICS).read_bytes() == before + b'{"step": 3}\n'


def test_errors_are_the_trees(run: Path) -> None:
    assert not issubclass(DamagedError, SurgeryError)  # it never leaves the package
    with pytest.raises(ValueError, match="at least one"):
        save_state(run, small(3), keep=0)
    assert logging.getLogger("unet_surgery.distill.state").handlers == []
    assert bits(torch.tensor(1, dtype=torch.int16)) == b"\x01\x00"
