"""From what the user wrote to a folder on this machine: what a plan needs first, everything else when it is wanted."""

from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.bundled import bundled_folder, bundled_names, is_shipped, make_bundled
from unet_surgery.checkpoint.components import INDEX
from unet_surgery.checkpoint.disk import Progress
from unet_surgery.checkpoint.student import CONFIG
from unet_surgery.checkpoint.teacher import LocalWeights
from unet_surgery.errors import OutputBusyError, OutputError, TeacherError, printable
from unet_surgery.hub.cache import cache_folder
from unet_surgery.hub.names import corrected
from unet_surgery.hub.remote import RemoteWeights
from unet_surgery.hub.teacher import HubTeacher, find_hub_teacher

__all__ = ["ResolvedTeacher", "Transfer", "check_teacher_name", "fetch_teacher", "local_path", "resolve_teacher"]


log = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 600.0
_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_TEACHER = re.compile(rf"(?P<id>{_PART}/{_PART})(?P<inside>(?:/[\w-][\w.-]*)*)(?:@(?P<revision>[\w./-]+))?")
_SITE = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/")


@dataclass(frozen=True, slots=True)
class Transfer:
    """What came from the Hub in this run: whole files, and ranges of weights of which the whole has ``weights_bytes``.

    ``by_range`` says that the U-Net's weights were not fetched whole, now or earlier.
    """

    file_bytes: int = 0
    range_bytes: int = 0
    weights_bytes: int = 0
    by_range: bool = False

    @property
    def num_bytes(self) -> int:
        return self.file_bytes + self.range_bytes

    @property
    def saved_bytes(self) -> int:
        """How many bytes of the weights never had to come."""
        return self.weights_bytes - self.range_bytes if self.by_range else 0


@dataclass(frozen=True, slots=True)
class ResolvedTeacher:
    """A teacher's folder; ``teacher_id`` is known where it came by name, ``name`` is for output folders.

    Of a single file, ``file`` is that (or what errors call it, where it lies on the Hub), and ``folder`` has its card.
    Of a teacher on the Hub, ``remote`` are the U-Net's weights that are not here, ``local`` those that are (the cache
    may hold others), and ``transfer`` is what came from there.
    """

    folder: Path
    teacher_id: str | None
    name: str
    variant: str | None
    file: Path | None = None
    hub: HubTeacher | None = None
    remote: RemoteWeights | None = None
    local: LocalWeights | None = None
    transfer: Transfer | None = None

    @property
    def commit(self) -> str | None:
        return None if self.hub is None else self.hub.repository.commit

    @property
    def address(self) -> str | None:
        """What one writes to mean this teacher again: None where its id says all."""
        if self.hub is None:
            return None
        place = f"{self.hub.repository.id}/{self.hub.inside}{self.hub.file or ''}"
        return f"{place.rstrip('/')}@{self.hub.repository.commit}"


def resolve_teacher(text: str, *, variant: str | None = None) -> ResolvedTeacher:
    """Find the teacher ``text``: an existing path, a built-in name, or ``org/name[/path][@revision]`` of the Hub.

    Nothing large is made or fetched: configs are enough to plan.

    Raises:
        TeacherError: it is none of the three; offers the nearest name or form.
        HubError: the Hub cannot be reached or has no such model.
    """
    path = local_path(text)
    if path is not None and path.is_file():
        return ResolvedTeacher(path.parent, None, path.stem, variant, file=path)
    if path is not None:
        return ResolvedTeacher(path, None, os.path.basename(os.path.abspath(path)), variant)
    if text in bundled_names():
        cached = cache_folder() / text
        is_made = cached.is_dir() and not is_shipped(text)
        return ResolvedTeacher(cached if is_made else bundled_folder(text), text, text, variant)
    match = _hub_form(text)
    return _on_the_hub(match["id"], match["inside"].strip("/"), match["revision"], variant)


def check_teacher_name(text: str) -> None:
    """Check that ``text`` may be a teacher, as far as can be told without the Hub: at once, before anything is loaded.

    Raises:
        TeacherError: it is no path, no built-in name and has not the Hub's form; offers the nearest name or form.
    """
    if local_path(text) is None and text not in bundled_names():
        _hub_form(text)


def local_path(text: str) -> Path | None:
    """Return the path that ``text`` means as a teacher, or None: it is a name.

    A folder that is called as a built-in teacher and holds no model is not meant: it may be of pictures that this drew.
    """
    path = Path(os.path.expanduser(text))
    is_other = text in bundled_names() and not any((path / name).exists() for name in (INDEX, CONFIG))
    return path if os.path.exists(path) and not is_other else None  # which does not mind a name too long to be one


def _hub_form(text: str) -> re.Match[str]:
    match = _HUB_TEACHER.fullmatch(text)
    if match is not None and not _SITE.match(text):
        return match
    raise TeacherError(
        f"there is no model {printable(text)!r}",
        expected="a folder or a single file, a Hub id org/name[/folder or /file][@revision], or one of "
        + ", ".join(bundled_names()),
        hint=_nearest(text),
    )


def fetch_teacher(
    found: ResolvedTeacher,
    *,
    unet_only: bool = False,
    parts_only: bool = False,
    full: bool = False,
    progress: Progress,
) -> ResolvedTeacher:
    """Make or fetch what a surgery needs of the teacher besides the U-Net's weights on the Hub; these only if ``full``.

    ``unet_only`` leaves out a pipeline's other parts, ``parts_only`` the weights.

    Raises:
        HubError: the Hub refuses or breaks off.
        OutputError: a cache has no room or cannot be written.
        TeacherError: the repository holds no U-Net with safetensors weights.
    """
    if found.hub is not None:
        by_range = found.remote is not None and not full and (parts_only or found.remote.has_ranges())
        num_bytes = found.hub.fetch(unet_only=unet_only, weights=not parts_only and not by_range)
        return replace(
            found,
            file=found.hub.path or found.file,
            remote=found.remote if by_range else None,
            local=None if by_range else found.hub.cached(),
            transfer=Transfer(num_bytes),
        )
    if found.teacher_id in bundled_names() and not is_shipped(found.teacher_id):
        return replace(found, folder=_made(found.teacher_id, progress))
    return found


def _on_the_hub(repository: str, inside: str, revision: str | None, variant: str | None) -> ResolvedTeacher:
    teacher = find_hub_teacher(repository, inside, revision, variant)
    remote = teacher.remote()
    if teacher.file is not None and remote is not None and not remote.has_ranges():
        log.warning("the Hub sends whole files only, and a single file's config is in its names: fetching all of it")
        teacher.fetch(unet_only=True, weights=True)
        remote = None
    return ResolvedTeacher(
        teacher.configs(),
        repository,
        repository.rpartition("/")[2] if teacher.file is None else Path(teacher.file).stem,
        variant,
        file=None if teacher.file is None else teacher.path or teacher.repository.folder / inside,
        hub=teacher,
        remote=remote,
        local=teacher.cached(),
    )


def _nearest(text: str) -> str | None:
    if (meant := corrected(text)) is not None:
        return f"did you mean {meant!r}?"
    names = bundled_names()
    close = [name for name in names if name.startswith(text)] or get_close_matches(text, names, n=1)
    return f"did you mean {close[0]!r}?" if close else None


def _made(name: str, progress: Progress) -> Path:
    """Return the folder of a built-in teacher with its weights, making them once."""
    cached = cache_folder() / name
    if cached.is_dir():
        return cached
    try:
        disk.make_folders(cached.parent)
    except OSError as error:
        raise OutputError(
            "the cache folder cannot be made",
            where=str(cached.parent),
            found=error.strerror,
            hint="set UNET_SURGERY_CACHE to a folder that can be written",
        ) from error
    log.info("making %s with random weights in %s, once", name, cached)
    try:
        make_bundled(name, cached, progress)
    except OutputBusyError:
        log.info("another process is making it: waiting")
        _wait_for(cached)
    return cached


def _wait_for(folder: Path) -> None:
    """Wait until another process has put ``folder`` in place."""
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise OutputError("another process did not finish making it", where=str(folder), hint="run again")
        time.sleep(0.1)
