"""What of a student's folder goes up to the Hub: decided from what lies there, before anything is sent."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.checkpoint.components import INDEX, check_inside, component_names
from unet_surgery.checkpoint.jsonfile import kind_of
from unet_surgery.checkpoint.layout import is_weights_file
from unet_surgery.checkpoint.licence import CARD, is_licence_file
from unet_surgery.checkpoint.student import CONFIG, PLAN, RECIPE
from unet_surgery.errors import TeacherError, UsageError

__all__ = ["Entry", "Upload", "UploadFile", "decide", "list_entries", "plan_upload"]


@dataclass(frozen=True, slots=True)
class Entry:
    """What lies in the folder; ``fault`` says why it cannot go up, None where it can."""

    path: str
    num_bytes: int
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class UploadFile:
    """A file that goes up: its path in folder and repository, and its size."""

    path: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Upload:
    """What goes up, sorted by path, and path → reason of what stays."""

    files: tuple[UploadFile, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def plan_upload(folder: Path) -> Upload:
    """Return what of a student's folder goes up; nothing is sent.

    Raises:
        UsageError: a file that belongs to the student cannot go up.
    """
    components = component_names(folder) if (folder / INDEX).is_file() else {}
    return decide(list_entries(folder), components)


def decide(entries: Iterable[Entry], components: Collection[str]) -> Upload:
    """Choose what goes up: everything but hidden files and what is no file of this folder.

    Raises:
        UsageError: what cannot go up is a part of the student, which would be incomplete without it.
    """
    files, left_out = [], []
    for entry in sorted(entries, key=lambda entry: entry.path):
        if any(part.startswith(".") for part in entry.path.split("/")):
            left_out.append((entry.path, "hidden"))
        elif entry.fault is None:
            files.append(UploadFile(entry.path, entry.num_bytes))
        elif _is_part(entry.path.partition("/")[0], components):
            raise UsageError(
                "a part of the student cannot be sent",
                where=entry.path,
                expected="a file in the student's folder",
                found=entry.fault,
                hint="put the file itself there",
            )
        else:
            left_out.append((entry.path, entry.fault))
    return Upload(tuple(files), tuple(left_out))


def _is_part(name: str, components: Collection[str]) -> bool:
    own = name in {CONFIG, PLAN, RECIPE, CARD, INDEX, "unet"} or name in components
    return own or is_weights_file(name) or is_licence_file(name)


def list_entries(folder: Path) -> list[Entry]:
    """Return the files below ``folder``, and what else is there; hidden folders are not looked into.

    Raises:
        UsageError: a folder cannot be read.
    """
    return list(_below(folder, ""))


def _below(root: Path, inside: str) -> Iterator[Entry]:
    try:
        with os.scandir(root / inside) as found:
            children = sorted(found, key=lambda child: child.name)
    except OSError as error:
        raise UsageError("a folder cannot be read", where=str(root / inside), found=error.strerror) from error
    for child in children:
        path = f"{inside}/{child.name}" if inside else child.name
        if not child.is_dir(follow_symlinks=False):
            yield _entry(root, path, child)
        elif child.name.startswith("."):
            yield Entry(f"{path}/", 0)
        else:
            yield from _below(root, path)


def _entry(root: Path, path: str, child: os.DirEntry[str]) -> Entry:
    try:
        status = child.stat()
    except OSError as error:
        kind = "a link that leads nowhere" if child.is_symlink() else error.strerror
        return Entry(path, 0, kind)
    if child.is_symlink():
        try:
            check_inside(root, root / path)
        except TeacherError:
            return Entry(path, 0, "a link that leads out of the folder")
    if stat.S_ISDIR(status.st_mode):  # the Hub's client does not follow it either
        return Entry(f"{path}/", 0, "a link to a folder")
    if not stat.S_ISREG(status.st_mode):
        return Entry(path, 0, kind_of(status.st_mode))
    return Entry(path, status.st_size)
