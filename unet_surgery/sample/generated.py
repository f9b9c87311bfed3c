"""A generated folder: pictures by their prompts' numbers, metadata.csv, and generation.json, which says how they came.

While it is made, ``.unfinished`` holds the settings it was begun with; a picture that is there is whole, so a run that
was killed goes on with what is missing. Whoever finds all of them writes metadata.csv, and generation.json last.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.target import check_apart
from unet_surgery.errors import DataError, OutputBusyError, OutputError, SurgeryError, printable
from unet_surgery.sample.keep import is_whole_png, picture_name
from unet_surgery.version import __version__

__all__ = ["FORMAT", "GENERATION_FILE", "GeneratedFolder", "check_output", "read_generation"]

FORMAT, FORMAT_VERSION = "unet-surgery-generation", 1
GENERATION_FILE = "generation.json"
METADATA_FILE = "metadata.csv"
UNFINISHED = ".unfinished"
SETTINGS_FILE = "settings.json"
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
        """Make the folder, or find that it was begun with the same settings.

        Raises:
            OutputError: it was begun with others; names them. Or it cannot be written.
        """
        unfinished = self.root / UNFINISHED
        for _ in range(BUSY_TRIES):
            try:
                if (self.root / GENERATION_FILE).is_file():
                    self._refuse_others(read_generation(self.root))
                disk.make_folders(unfinished)
                with contextlib.suppress(FileExistsError):
                    disk.replace_file(unfinished / SETTINGS_FILE, _json(self.settings))
                there = read_object(unfinished / SETTINGS_FILE)
            except (BlockingIOError, FileNotFoundError):  # another process begins, or finishes, just now
                time.sleep(0.1)
                continue
            except OSError as error:
                raise _unwritten(self.root, error) from error
            except SurgeryError as error:
                if isinstance(error, OutputError):
                    raise
                raise OutputError(
                    "the settings of this unfinished folder are damaged", where=str(unfinished), hint="remove it"
                ) from error
            self._refuse_others(there)
            return
        raise OutputBusyError("another process is writing this folder", where=str(self.root), hint="wait for it")

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

    def finish(self, facts: Mapping[str, Any], before: Callable[[], None] | None = None) -> None:
        """Write metadata.csv and generation.json, once; ``before`` is called first, by the one process that does it."""
        unfinished = self.root / UNFINISHED
        try:
            with contextlib.ExitStack() as stack:
                try:
                    lock = disk.open_for_update(unfinished / "lock")
                except FileNotFoundError:  # another process has finished
                    return
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (self.root / GENERATION_FILE).is_file():
                    if before is not None:
                        before()
                    disk.replace_file(self.root / METADATA_FILE, self._metadata(), force=True)
                    disk.replace_file(self.root / GENERATION_FILE, _json({**_header(), **self.settings, **facts}))
                self._clear()
                disk.remove_tree(unfinished)
        except OSError as error:
            raise _unwritten(self.root, error) from error

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
                f"{key}: {printable(before)} → {printable(now)}"
                for key, (before, now) in list(changes.items())[:MAX_SHOWN]
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
    if not out.parent.is_dir():
        raise OutputError(
            "the folder that should hold the output does not exist",
            where=str(out.parent),
            hint=f"mkdir -p {out.parent}",
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
    return (json.dumps(dict(value), indent=2) + "\n").encode()
