"""A generated folder: pictures by their prompts' numbers, metadata.csv, and generation.json, which says how they came.

While it is made, ``.unfinished`` holds the settings it was begun with, and what each process that drew pictures had of
its own; a picture that is there is whole, so a run that was killed goes on with what is missing. Whoever finds all of
them writes metadata.csv, and generation.json last.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.target import check_apart
from unet_surgery.errors import DataError, OutputBusyError, OutputError, SurgeryError, brief, printable
from unet_surgery.sample.keep import is_whole_png, picture_name
from unet_surgery.version import __version__

__all__ = ["FORMAT", "GENERATION_FILE", "GeneratedFolder", "check_output", "read_generation"]

FORMAT, FORMAT_VERSION = "unet-surgery-generation", 1
GENERATION_FILE = "generation.json"
METADATA_FILE = "metadata.csv"
UNFINISHED = ".unfinished"
SETTINGS_FILE = "settings.json"
DRAWN_BY = "drawn-by-"
COLUMNS = ("file_name", "caption")
BUSY_TRIES = 100
MAX_SHOWN = 6
LEFT_BY_THE_DEAD = ".unet-surgery"

NAMES_ONLY = {"name"}
"""What may change between two parts of a run, wherever it stands: a folder may be moved, its contents are compared."""


@dataclass(frozen=True, slots=True)
class GeneratedFolder:
    """A folder of one picture a prompt, all of ``size`` (width, height). ``settings`` is all that decides them."""

    root: Path
    captions: Sequence[str]
    size: tuple[int, int]
    settings: Mapping[str, Any]

    def path(self, index: int) -> Path:
        return self.root / picture_name(index, len(self.captions))

    def begin(self) -> None:
        """Make the folder, or find that it was begun with the same settings; nothing is made where all is there.

        Raises:
            OutputError: it was begun with others; names them. Or it is damaged, or cannot be written.
        """
        for _ in range(BUSY_TRIES):
            if (self.root / GENERATION_FILE).is_file():
                self._refuse_others(_known(self.root))
                if not self.missing():
                    return
            try:
                there = self._settings_there()
            except (BlockingIOError, FileNotFoundError):  # another process begins, or finishes, just now
                time.sleep(0.1)
                continue
            except OSError as error:
                raise _unwritten(self.root, error) from error
            self._refuse_others(there)
            return
        raise OutputBusyError("another process is writing this folder", where=str(self.root), hint="wait for it")

    def _settings_there(self) -> dict[str, Any]:
        """Return the settings that the folder was begun with; these, if it is begun now.

        Raises:
            FileNotFoundError: another process has just finished, and removed them.
            OutputError: they are damaged.
        """
        path = self.root / UNFINISHED / SETTINGS_FILE
        try:
            disk.make_folders(path.parent)
        except FileNotFoundError as error:
            raise _unwritten(self.root, error) from error
        with contextlib.suppress(FileExistsError):
            disk.replace_file(path, _json(self.settings))
        return _read_own(path)

    def drawn_by(self, facts: Mapping[str, Any]) -> None:
        """Leave word of a process that is going to draw pictures, for generation.json.

        Raises:
            OutputError: the disk refuses.
        """
        data = _json(facts)
        path = self.root / UNFINISHED / f"{DRAWN_BY}{hashlib.sha256(data).hexdigest()[:16]}.json"
        try:
            disk.make_folders(path.parent)
            with contextlib.suppress(FileExistsError, BlockingIOError):  # another one has the same to say
                disk.replace_file(path, data)
        except OSError as error:
            raise _unwritten(self.root, error) from error

    def missing(self) -> list[int]:
        """Return the indices of the pictures that are not there whole."""
        return [index for index in range(len(self.captions)) if not self._is_there(index)]

    def write(self, index: int, data: bytes) -> None:
        """Write a picture's PNG: it is there whole afterwards, or not at all.

        Raises:
            OutputError: another process is writing it, or the disk refuses.
        """
        path = self.path(index)
        try:
            disk.replace_file(path, data, force=True)
        except BlockingIOError as error:
            raise OutputBusyError("another process is drawing this picture", where=str(path)) from error
        except OSError as error:
            raise _unwritten(path, error) from error

    @contextlib.contextmanager
    def part(self, index: int, count: int) -> Iterator[None]:
        """Hold the lock of a part of the work.

        Raises:
            OutputBusyError: another process draws this part.
        """
        with contextlib.ExitStack() as stack:
            try:
                lock = disk.open_for_update(self.root / UNFINISHED / f"part-{index + 1}-of-{count}.lock")
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputBusyError(
                    "another process is drawing this part of the pictures",
                    where=str(self.root),
                    hint="wait for it, or share the work: --part 1/2 and --part 2/2",
                ) from error
            except FileNotFoundError:  # another process has finished all
                pass
            except OSError as error:
                raise _unwritten(self.root, error) from error
            yield

    def finish(self, facts: Mapping[str, Any]) -> bool:
        """Write metadata.csv and generation.json; True in the one process that finds neither there yet.

        ``facts`` go into generation.json with what :meth:`drawn_by` was told: all of it under ``drawn_by``, and beside
        that each key with the value that all agree on, null where they do not. Where the folder was finished before,
        and some pictures were drawn anew, what is new is added.

        Raises:
            OutputError: the disk refuses, or what is there is damaged.
        """
        unfinished, is_first = self.root / UNFINISHED, False
        try:
            with contextlib.ExitStack() as stack:
                try:
                    lock = disk.open_for_update(unfinished / "lock")
                except FileNotFoundError:  # another process has finished, or all was there before
                    return False
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_still(lock, unfinished / "lock"):  # another process has finished while this one waited
                    return False
                told = self._told()
                if not (self.root / GENERATION_FILE).is_file():
                    is_first = True
                    disk.replace_file(self.root / METADATA_FILE, self._metadata(), force=True)
                    self._write_generation({**_header(), **self.settings, **_agreed(told), **facts}, told)
                else:
                    before = _known(self.root)
                    by = before.get("drawn_by") or [{key: before.get(key) for key in one} for one in told[:1]]
                    if new := [one for one in told if one not in by]:
                        self._write_generation({**before, **_agreed([*by, *new])}, [*by, *new])
                self._clear()
                _remove_unfinished(unfinished)
        except OSError as error:
            raise _unwritten(self.root, error) from error
        return is_first

    def _told(self) -> list[dict[str, Any]]:
        """Return what the processes that drew pictures left."""
        found = []
        for path in sorted((self.root / UNFINISHED).glob(f"{DRAWN_BY}*.json")):
            with contextlib.suppress(FileNotFoundError):
                found.append(_read_own(path))
        return found

    def _write_generation(self, data: Mapping[str, Any], told: Sequence[Mapping[str, Any]]) -> None:
        disk.replace_file(self.root / GENERATION_FILE, _json({**data, "drawn_by": list(told)}), force=True)

    def _metadata(self) -> bytes:
        file = io.StringIO(newline="")
        rows = csv.writer(file)  # whose line ends, CR LF, are what makes it quote either
        rows.writerow(COLUMNS)
        rows.writerows((self.path(index).name, caption) for index, caption in enumerate(self.captions))
        return file.getvalue().encode()

    def _clear(self) -> None:
        """Remove what processes that were killed had begun to write."""
        for path in self.root.glob(f".*{LEFT_BY_THE_DEAD}"):
            with contextlib.suppress(FileNotFoundError):
                disk.remove_file(path)

    def _is_there(self, index: int) -> bool:
        try:
            with open(self.path(index), "rb") as file:
                start = file.read(24)
                file.seek(-12, os.SEEK_END)
                return is_whole_png(start, file.read(12), self.size)
        except OSError:
            return False

    def _refuse_others(self, there: Mapping[str, Any]) -> None:
        old, new = _flat(there), _flat(self.settings)
        changes = {key: (old.get(key), value) for key, value in new.items() if old.get(key) != value}
        if changes:
            shown = "; ".join(
                f"{key}: {brief(before)} → {brief(now)}" for key, (before, now) in list(changes.items())[:MAX_SHOWN]
            )
            raise OutputError(
                f"the pictures in this folder were begun with other settings ({len(changes)} differ)",
                where=str(self.root),
                expected="the settings they were begun with",
                found=shown,
                hint="undo the change, or choose another --out",
            )


def check_output(out: Path, *inputs: Path) -> None:
    """Raise OutputError if ``out`` is something else than such a folder or an empty one, or holds an input."""
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError("the output path is a file", where=str(out), hint="choose another --out")
    above = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise OutputError(
            "the output path leads through what is no folder",
            where=str(out),
            expected="folders all the way, there or to be made",
            found=f"{above} is a file",
            hint="choose another --out",
        )
    is_ours = any((out / name).exists() for name in (GENERATION_FILE, UNFINISHED))
    if out.is_dir() and any(out.iterdir()) and not is_ours:
        raise OutputError(
            "the output folder holds something else than generated pictures",
            where=str(out),
            hint="choose another --out",
        )
    for folder in inputs:
        if folder.is_dir():
            check_apart(out, folder, "input")


def read_generation(folder: Path) -> dict[str, Any]:
    """Return what a folder's generation.json says.

    Raises:
        DataError: it is not there, since the pictures are not all drawn or it is another folder; or it is damaged.
    """
    path = folder / GENERATION_FILE
    if not path.is_file():
        is_begun = (folder / UNFINISHED).is_dir()
        raise DataError(
            "the pictures are not all drawn yet" if is_begun else "this folder was not made by unet-surgery generate",
            where=str(folder),
            expected=GENERATION_FILE,
            hint="run the same unet-surgery generate command again: it goes on where it was" if is_begun else None,
        )
    try:
        data = read_object(path)
    except SurgeryError as error:
        raise DataError(error.what, where=error.where, found=error.found) from error
    if (data.get("format"), data.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise DataError(
            "this is no generation.json that is known",
            where=str(path),
            expected=f"{FORMAT} {FORMAT_VERSION}",
            found=printable(f"{data.get('format')} {data.get('format_version')}"),
        )
    return data


def _known(folder: Path) -> dict[str, Any]:
    """Return what a folder's generation.json says, which pictures are to be added to."""
    try:
        return read_generation(folder)
    except DataError as error:
        raise OutputError(
            error.what, where=error.where, expected=error.expected, found=error.found, hint="choose another --out"
        ) from error


def _read_own(path: Path) -> dict[str, Any]:
    """Return what this package itself left in ``.unfinished``.

    Raises:
        FileNotFoundError: another process has removed it.
        OutputError: it is damaged.
    """
    try:
        return read_object(path)
    except SurgeryError as error:
        os.lstat(path)
        raise OutputError(
            "the settings of this unfinished folder are damaged",
            where=str(path.parent),
            found=error.found,
            hint="remove it",
        ) from error


def _agreed(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return each key with the value that all agree on, else None."""
    keys = dict.fromkeys(key for one in told for key in one)
    return {key: told[0].get(key) if all(one.get(key) == told[0].get(key) for one in told) else None for key in keys}


def _is_still(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove_unfinished(folder: Path) -> None:
    """Remove the folder, though others that begin just now may put something into it: they look again."""
    for _ in range(BUSY_TRIES):
        try:
            disk.remove_tree(folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            time.sleep(0.01)


def _header() -> dict[str, Any]:
    """Return what generation.json begins with."""
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "unet_surgery": __version__}


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, Mapping):
        return {
            k: v
            for key, value in data.items()
            if key not in NAMES_ONLY
            for k, v in _flat(value, f"{prefix}{key}.").items()
        }
    return {prefix.removesuffix("."): data}


def _unwritten(path: Path, error: OSError) -> OutputError:
    return OutputError(
        "the pictures cannot be written; what is drawn stays, and the same command goes on with it",
        where=str(path),
        found=error.strerror or str(error),
    )


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(value), indent=2, allow_nan=False) + "\n").encode()
