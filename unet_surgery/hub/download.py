"""Fetching whole files of a repository into the ordinary Hub cache, and comparing each with the hash the Hub names.

The client itself does not compare, so a file that it fetched earlier is looked at as well; what was found whole is
remembered by its inode, size and time.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.errors import HubError, OutputError, SurgeryError
from unet_surgery.hub.cache import cache_folder
from unet_surgery.hub.patience import patiently
from unet_surgery.hub.refusals import refusal, refused
from unet_surgery.hub.repository import RemoteFile, Repository

__all__ = ["cached_file", "check_room", "download", "missing_bytes"]

log = logging.getLogger(__name__)

SPARE_BYTES = 16 << 20
ATTEMPTS = 2
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def cached_file(repository: Repository, name: str) -> Path | None:
    """Return the path of a file that the Hub cache holds of this commit, None if it does not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository.id, name, revision=repository.commit)
    return Path(found) if isinstance(found, str) else None


def missing_bytes(repository: Repository, names: Sequence[str]) -> int:
    """Return how many bytes of these files are not in the Hub cache."""
    files = repository.files or {}
    return sum(files[name].size or 0 for name in names if name in files and cached_file(repository, name) is None)


def download(repository: Repository, names: Sequence[str]) -> Path:
    """Return the folder of the Hub cache that holds the files ``names`` of ``repository``, fetched where they lack.

    Raises:
        HubError: the Hub refuses or breaks off, or what it sends is not what it says it has.
        OutputError: the cache cannot be written or has no room.
    """
    if repository.files is None:
        return _from_cache(repository, names)
    _check_cache_room(repository, names)
    for _ in range(ATTEMPTS):
        folder = _snapshot(repository, names)
        damaged = [name for name in names if not _is_whole(folder / name, repository.files[name])]
        if not damaged:
            return folder
        for name in damaged:
            log.warning("%s/%s is damaged in the cache: fetching it again", repository.id, name)
            _remove(folder / name)
    raise HubError(
        "a file of the Hub arrives damaged",
        where=f"{repository.id}/{damaged[0]}",
        expected=f"content with the hash {repository.files[damaged[0]].identity}",
        hint="run again later; if it stays so, tell the model's owner",
    )


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuse a transfer for which the cache's disk has no room.

    Raises:
        OutputError: it has not.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = disk.free_bytes(there)
    if free < num_bytes + SPARE_BYTES:
        raise OutputError(
            "there is not enough room on the disk for the transfer",
            where=str(folder),
            expected=f"{num_bytes / 1e9:.2f} GB",
            found=f"{free / 1e9:.2f} GB free",
            hint="free some; HF_HOME and UNET_SURGERY_CACHE say where caches lie",
        )


def _check_cache_room(repository: Repository, names: Sequence[str]) -> None:
    from huggingface_hub import constants

    num_bytes = missing_bytes(repository, names)
    if num_bytes:
        check_room(Path(constants.HF_HUB_CACHE), num_bytes)


def _from_cache(repository: Repository, names: Sequence[str]) -> Path:
    found = {name: cached_file(repository, name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise HubError(
            "the Hugging Face Hub cannot be reached, and its cache lacks a file",
            where=f"{repository.id}/{missing[0]}",
            hint="try again with a network, or give a local folder",
        )
    name, path = next(iter(found.items()))
    assert path is not None
    return path.parents[name.count("/")]


def _snapshot(repository: Repository, names: Sequence[str]) -> Path:
    """Fetch what the Hub cache lacks, file by file and by commit: the Hub is asked for no listing again."""
    from huggingface_hub import hf_hub_download

    for name in names:
        if cached_file(repository, name) is not None:
            continue
        try:
            patiently(partial(hf_hub_download, repository.id, name, revision=repository.commit))
        except Exception as error:  # the HTTP client's own exceptions are not part of huggingface_hub's interface
            if (answer := refusal(error)) is not None:
                raise refused(repository.id, repository.commit, answer) from error
            raise _broken_off(repository.id, error) from error
    return _from_cache(repository, names)


def _is_whole(path: Path, file: RemoteFile) -> bool:
    """Compare a file with the Hub's hash of it: sha256 of large ones, git's of the others."""
    if file.identity is None:
        return True
    status = path.stat()
    stamp = f"{status.st_ino} {status.st_size} {status.st_mtime_ns}\n".encode()
    note = cache_folder() / "hub" / "verified" / file.identity
    try:
        if note.read_bytes() == stamp:
            return True
    except OSError:
        pass
    if _digest(path, file, status.st_size) != file.identity:
        return False
    try:
        disk.make_folders(note.parent)
        disk.replace_file(note, stamp, force=True)
    except OSError:
        pass  # it will be compared again next time
    return True


def _digest(path: Path, file: RemoteFile, size: int) -> str:
    """Return the file's own hash of the kind that the Hub names."""

    def start() -> hashlib._Hash:
        if file.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    with path.open("rb") as data:
        return hashlib.file_digest(data, start).hexdigest()


def _remove(path: Path) -> None:
    """Remove a file from the Hub cache: its name in the snapshot, and its content among the blobs."""
    blob = Path(os.path.realpath(path))
    try:
        disk.remove_file(path)
        if blob != path and blob.parent.name == "blobs":
            disk.remove_file(blob)
    except OSError as error:
        raise OutputError(
            "a damaged file cannot be removed from the cache", where=str(path), found=error.strerror
        ) from error


def _broken_off(repository: str, error: Exception) -> SurgeryError:
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return OutputError("the Hub cache cannot be written", where=repository, found=error.strerror)
    return HubError(
        "the download from the Hugging Face Hub broke off",
        where=repository,
        found=type(error).__name__,
        hint="run again: it resumes",
    )
