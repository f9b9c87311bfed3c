"""Training state on disk: a run's checkpoints, each there whole or not at all.

``RUN/checkpoints/step-00000500/`` holds a safetensors file for each group of tensors, ``state.json`` (the step, the
groups and the facts), and ``manifest.json``: size and SHA-256 of all the others. It is staged in a hidden sibling and
put in place by one rename. What is damaged when it is read is renamed to ``step-00000500.corrupt-1`` and kept.

Nothing is pickled. Who writes or calls :func:`newest_state` must hold the run's lock
(:class:`~unet_surgery.distill.runlock.RunLock`); :func:`load_state` only reads.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.jsonfile import MAX_JSON_BYTES, parse_object
from unet_surgery.checkpoint.staging import Staging
from unet_surgery.checkpoint.target import check_space
from unet_surgery.distill.statefile import (
    DamagedError,
    GroupFile,
    Stored,
    group_file,
    open_stored,
    read_group,
    write_group,
)
from unet_surgery.errors import OutputBusyError, OutputError, TrainingError, printable

__all__ = ["CHECKPOINTS", "TrainingState", "load_state", "newest_facts", "newest_state", "save_state", "state_folders"]

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
STATE, MANIFEST = "state.json", "manifest.json"
FORMAT = "unet-surgery training state 1"
MAX_MANIFEST_BYTES = 1 << 20

GROUP = re.compile(r"[a-z][a-z0-9_]{0,63}")
FOLDER = re.compile(r"step-(\d{8,18})")
SET_ASIDE = re.compile(r"step-\d{8,18}\.corrupt-\d+")
LEFTOVER = re.compile(r"\.(step-\d{8,18})(?:\.replaced)?\.unet-surgery")


@dataclass(frozen=True, slots=True)
class TrainingState:
    """All that a run needs to go on as if it had not stopped.

    ``step`` counts finished optimizer steps. ``tensors`` maps group (``weights``, ``ema``, ``exp_avg`` …) → name →
    tensor; a group may be empty. ``facts`` is JSON: cursor, loss scale, counters, the resolved run, versions.
    """

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    facts: Mapping[str, Any]


def _ignore(_done: int, _total: int) -> None:
    pass


def save_state(run: Path, state: TrainingState, *, keep: int = 2, progress: disk.Progress = _ignore) -> Path:
    """Write ``state`` into the folder ``run`` and return its checkpoint's folder; then remove all but ``keep`` of them.

    A checkpoint of the same step is replaced. Those of later steps belong to a course that the run has left: they are
    removed, so that the newest is the one saved last. The tensors must not change meanwhile.

    Raises:
        OutputError: no room, or the disk refuses: the checkpoints that were there are as they were. (Or it does not
            confirm the new one's name; the message says so.)
        ValueError: the state cannot be stored: a name, a dtype, or facts that JSON would change.
    """
    if keep < 1:
        raise ValueError("at least one checkpoint must be kept")
    groups = {f"{name}.safetensors": group_file(tensors) for name, tensors in state.tensors.items()}
    text = _state_text(state)
    total = sum(group.num_bytes for group in groups.values()) + len(text)
    checkpoints = Path(run) / CHECKPOINTS
    _make_checkpoints(checkpoints)
    _clear_leftovers(checkpoints)
    target = checkpoints / f"step-{state.step:08d}"
    with Staging(target, replace=lambda _: None) as staging:
        check_space(staging.folder, total)
        files = _write_groups(staging.folder, groups, disk.counting(progress, total))
        disk.write_file(staging.folder / STATE, text)
        files[STATE] = Stored(len(text), sha256(text).hexdigest())
        disk.write_file(staging.folder / MANIFEST, _manifest_text(files))
        staging.commit()
    progress(total, total)
    _retire(checkpoints, state.step, keep)
    return target


def load_state(folder: Path, *, device: torch.device | str = "cpu") -> TrainingState:
    """Return the state in a checkpoint's folder, every byte of it compared with the manifest; nothing is changed.

    Raises:
        TrainingError: it is damaged, cannot be read, or was written by another version.
    """
    try:
        return _read_state(folder, torch.device(device))
    except DamagedError as error:
        raise TrainingError("the checkpoint is damaged", where=str(folder), found=str(error)) from error
    except OSError as error:
        raise _unreadable(folder, error) from error


def newest_facts(run: Path) -> tuple[int, dict[str, Any]] | None:
    """Return step and facts of the newest checkpoint, its tensors unread; None where there is none that says them.

    Nothing is changed, and the tensors may be damaged: it is for a run that needs none of them.
    """
    for folder in state_folders(run)[-1:]:
        with contextlib.suppress(OSError, DamagedError, TrainingError):
            _, step, _, facts = _read_facts(folder)
            return step, facts
    return None


def newest_state(run: Path, *, device: torch.device | str = "cpu") -> TrainingState | None:
    """Return the state of the newest whole checkpoint of the folder ``run``; None where there never was a whole one.

    One that is damaged is set aside under another name, with a warning that says what is wrong, and the one before is
    used. What a dead run had not finished is cleared, also with a warning.

    Raises:
        TrainingError: every checkpoint is damaged, or the newest cannot be read or was written by another version.
        OutputBusyError: another process is writing a checkpoint.
    """
    checkpoints = Path(run) / CHECKPOINTS
    if not checkpoints.is_dir():
        return None
    _clear_leftovers(checkpoints)
    for folder in reversed(state_folders(run)):
        try:
            return _read_state(folder, torch.device(device))
        except DamagedError as error:
            _set_aside(folder, str(error))
        except OSError as error:
            if error.errno != errno.EIO:
                raise _unreadable(folder, error) from error
            _set_aside(folder, f"the disk cannot read it ({error.strerror})")
    damaged = sorted(name for name in os.listdir(checkpoints) if SET_ASIDE.fullmatch(name))
    if damaged:
        raise TrainingError(
            "no checkpoint of this run is whole",
            where=str(checkpoints),
            found=f"{len(damaged)} damaged, the last of them {damaged[-1]}",
            hint="restore a checkpoint from a backup; or begin a new run in another folder",
        )
    return None


def state_folders(run: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, whole or not, from the oldest to the newest."""
    checkpoints = Path(run) / CHECKPOINTS
    if not checkpoints.is_dir():
        return []
    found = ((int(match[1]), name) for name in os.listdir(checkpoints) if (match := FOLDER.fullmatch(name)))
    return [checkpoints / name for _, name in sorted(found)]


# --- what the JSON files say ------------------------------------------------------------------------------------------


def _state_text(state: TrainingState) -> bytes:
    if not 0 <= state.step < 10**18:
        raise ValueError(f"{state.step} is no number of steps")
    for name in state.tensors:
        if not GROUP.fullmatch(name):
            raise ValueError(f"a group of tensors cannot be called {printable(name)!r}")
    value = {
        "format": FORMAT,
        "step": state.step,
        "groups": {name: len(tensors) for name, tensors in state.tensors.items()},
        "facts": dict(state.facts),
    }
    text = (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
    if parse_object(text) != value:
        raise ValueError("the facts are no plain JSON: tuples, keys that are not strings")
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"the facts take {len(text)} bytes of JSON; {MAX_JSON_BYTES} may be read back")
    return text


def _manifest_text(files: Mapping[str, Stored]) -> bytes:
    """Return the manifest. There is one way to write it, so a file that differs by a byte was not written here."""
    value = {name: {"bytes": files[name].num_bytes, "sha256": files[name].sha256} for name in sorted(files)}
    return (json.dumps({"files": value}, indent=2) + "\n").encode()


def _read_manifest(folder: Path) -> dict[str, Stored]:
    text = _read_text(folder / MANIFEST, MAX_MANIFEST_BYTES)
    try:
        entries = parse_object(text)["files"]
        files = {name: Stored(int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        files = {}
    if STATE not in files or _manifest_text(files) != text:
        raise DamagedError(f"{MANIFEST} is not as it was written")
    return files


def _read_state(folder: Path, device: torch.device) -> TrainingState:
    """Read and compare everything in a checkpoint's folder; raises as :func:`_read_facts`."""
    files, step, groups, facts = _read_facts(folder)
    tensors = {}
    for name, number in groups.items():
        file = f"{name}.safetensors"
        tensors[name] = read_group(str(folder / file), files[file], device)
        if len(tensors[name]) != number:
            raise DamagedError(f"{file} has {len(tensors[name])} tensors, not {printable(number)}")
    return TrainingState(step, tensors, facts)


def _read_facts(folder: Path) -> tuple[dict[str, Stored], int, dict[str, Any], dict[str, Any]]:
    """Return what a checkpoint's JSON files say: the files, the step, the groups (name → tensors), the facts.

    Raises:
        DamagedError: it is not what was written.
        TrainingError: it is whole, and of another version's format.
        OSError: it cannot be read.
    """
    if not folder.is_dir():
        raise DamagedError("it is not a folder")
    files = _read_manifest(folder)
    text = _read_text(folder / STATE, MAX_JSON_BYTES, files[STATE])
    if sha256(text).hexdigest() != files[STATE].sha256:
        raise DamagedError(f"{STATE} has other bytes than were written (its SHA-256 differs)")
    try:
        value = parse_object(text)
    except ValueError as error:
        raise DamagedError(f"{STATE}: {printable(str(error))}") from error
    if value.get("format") != FORMAT:
        raise TrainingError(
            "the checkpoint was written by another version",
            where=str(folder),
            expected=FORMAT,
            found=printable(value.get("format")),
            hint="continue the run with the version of unet-surgery that began it",
        )
    step, groups, facts = value.get("step"), value.get("groups"), value.get("facts")
    if type(step) is not int or not isinstance(groups, dict) or not isinstance(facts, dict):
        raise DamagedError(f"{STATE} lacks step, groups or facts")
    # Only the names that a state can have are joined to a path.
    if not all(GROUP.fullmatch(name) for name in groups) or {f"{g}.safetensors" for g in groups} != files.keys() - {
        STATE
    }:
        raise DamagedError(f"{STATE} and {MANIFEST} name other groups")
    match = FOLDER.fullmatch(folder.name)
    if match is not None and int(match[1]) != step:
        raise DamagedError(f"it holds the state of step {step}")
    return files, step, groups, facts


def _read_text(path: Path, max_bytes: int, stored: Stored | None = None) -> bytes:
    with open(open_stored(str(path), stored), "rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise DamagedError(f"{path.name} is implausibly large")
    return text


# --- what is done to folders ------------------------------------------------------------------------------------------


def _make_checkpoints(checkpoints: Path) -> None:
    if checkpoints.is_dir():
        return
    try:
        disk.make_folder(checkpoints)
        disk.fsync_folder(checkpoints.parent)
    except OSError as error:
        raise OutputError(
            "the run's folder cannot be written", where=str(checkpoints), found=error.strerror or str(error)
        ) from error


def _write_groups(folder: Path, groups: Mapping[str, GroupFile], on_bytes: disk.OnBytes) -> dict[str, Stored]:
    """Write all groups, then force them to disk: what the first still has in flight is written beside the others."""
    files = {}
    with contextlib.ExitStack() as stack:
        fds = []
        for name, group in groups.items():
            fd = disk.create(folder / name)
            stack.callback(os.close, fd)
            fds.append(fd)
            files[name] = Stored(group.num_bytes, write_group(fd, group, on_bytes))
        for fd in fds:
            disk.fsync(fd)
    return files


def _retire(checkpoints: Path, step: int, keep: int) -> None:
    """Remove the checkpoints of later steps than ``step``, and the oldest beyond ``keep``; failing is only said."""
    folders = state_folders(checkpoints.parent)
    later = [folder for folder in folders if int(folder.name.removeprefix("step-")) > step]
    kept = folders[: len(folders) - len(later)]
    if later:
        log.warning("removing checkpoints of later steps, which the run has gone back from: %s", _names(later))
    for folder in (*later, *kept[:-keep]):
        try:
            _remove(folder)
        except OSError as error:
            log.warning("%s could not be removed (%s); the next save tries again", folder.name, error.strerror)


def _remove(folder: Path) -> None:
    """Remove a checkpoint. It loses its name first, on the disk too: half of one must not look like a whole one."""
    aside = folder.with_name(f".{folder.name}.unet-surgery")  # what is left of it is cleared as what was staged is
    disk.rename_new(folder, aside)
    disk.fsync_folder(folder.parent)
    if aside.is_symlink() or not aside.is_dir():
        disk.remove_file(aside)
    else:
        disk.remove_tree(aside)


def _clear_leftovers(checkpoints: Path) -> None:
    """Clear what dead runs left, by the same steps that the next writer of the same name would take.

    Raises:
        OutputBusyError: a living one is writing.
    """
    names = sorted({match[1] for name in os.listdir(checkpoints) if (match := LEFTOVER.fullmatch(name))})
    for name in names:
        try:
            with Staging(checkpoints / name, replace=lambda _: None):
                pass
        except OutputBusyError:
            raise
        except OutputError as error:  # it takes room, and harms nothing
            log.warning("what a dead run left of %s stays: %s (%s)", name, error.what, error.found)


def _set_aside(folder: Path, problem: str) -> None:
    number = 1
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.corrupt-{number}")):
        number += 1
    try:
        disk.rename_new(folder, aside)
    except OSError as error:
        raise TrainingError(
            "a damaged checkpoint cannot be set aside",
            where=str(folder),
            found=f"{problem}; {error.strerror}",
            hint="move it out of the run's folder yourself",
        ) from error
    log.warning("%s is damaged and was renamed to %s: %s", folder.name, aside.name, problem)


def _unreadable(folder: Path, error: OSError) -> TrainingError:
    return TrainingError(
        "the checkpoint cannot be read", where=str(folder), found=error.strerror or str(error), hint="then run again"
    )


def _names(folders: list[Path]) -> str:
    return ", ".join(folder.name for folder in folders)
