"""``resolve_teacher``: from what the user wrote to a folder on this machine."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.bundled import bundled_folder, bundled_names, make_bundled
from unet_surgery.checkpoint.disk import Progress
from unet_surgery.checkpoint.teacher import is_hub_id
from unet_surgery.errors import OutputBusyError, OutputError, TeacherError, printable
from unet_surgery.hub.download import download

__all__ = ["ResolvedTeacher", "cache_folder", "resolve_teacher"]


log = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class ResolvedTeacher:
    """A teacher's folder; ``teacher_id`` is known where it came by name, ``name`` is for output folders.

    ``exact``: the folder may hold other variants than ``variant``, and only that one is meant.
    """

    folder: Path
    teacher_id: str | None
    name: str
    variant: str | None
    exact: bool = False


def cache_folder() -> Path:
    """Return where built-in teachers are written: ``$UNET_SURGERY_CACHE``, else below the user's cache folder."""
    if own := os.environ.get("UNET_SURGERY_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "unet-surgery"


def resolve_teacher(
    text: str, *, weights: bool, variant: str | None = None, unet_only: bool = False, progress: Progress
) -> ResolvedTeacher:
    """Return the folder of the teacher ``text``: an existing path, a built-in name, or ``org/name[@revision]``.

    Without ``weights`` nothing large is made or fetched: configs are enough.

    Raises:
        TeacherError: it is none of the three; offers the nearest name.
        HubError: the Hub cannot be reached or has no such model.
        OutputError: a built-in teacher has no room in the cache.
    """
    path = Path(os.path.expanduser(text))
    if path.exists():
        return ResolvedTeacher(path, None, os.path.basename(os.path.abspath(path)), variant)
    if text in bundled_names():
        return ResolvedTeacher(_bundled(text, weights, progress), text, text, variant)
    repository, _, revision = text.partition("@")
    if is_hub_id(repository):
        found = download(repository, revision or None, weights=weights, variant=variant, unet_only=unet_only)
        return ResolvedTeacher(found.folder, repository, repository.rpartition("/")[2], found.variant, exact=True)
    close = get_close_matches(text, bundled_names(), n=1)
    raise TeacherError(
        f"there is no teacher {printable(text)!r}",
        expected=f"a folder, a Hub id org/name[@revision], or one of {', '.join(bundled_names())}",
        hint=f"did you mean {close[0]!r}?" if close else None,
    )


def _bundled(name: str, weights: bool, progress: Progress) -> Path:
    cached = cache_folder() / name
    if cached.is_dir():
        return cached
    if not weights:
        return bundled_folder(name)
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
