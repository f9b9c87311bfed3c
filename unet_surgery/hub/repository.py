"""What a repository of the Hub holds at one commit: looked up once, and every later request is by that commit.

Which commit a name stood for is remembered, so that the same name means the same without a network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from unet_surgery.checkpoint import disk
from unet_surgery.errors import HubError
from unet_surgery.hub.cache import cache_folder
from unet_surgery.hub.patience import patiently
from unet_surgery.hub.refusals import refusal, refused, unreachable

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

__all__ = ["RemoteFile", "Repository", "cached_repository", "look_up"]

LARGEST_FILE_BYTES = 1 << 50
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. ``sha256`` is known of large ones, ``blob_id`` (git's hash of it) of all."""

    size: int | None
    sha256: str | None
    blob_id: str | None

    @property
    def identity(self) -> str | None:
        """A hash of the content."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository at one commit. ``files`` is None where the Hub could not be asked."""

    id: str
    commit: str
    files: Mapping[str, RemoteFile] | None

    @property
    def folder(self) -> Path:
        """Where this package keeps what it has of this commit."""
        return _home(self.id) / self.commit

    @property
    def snapshot(self) -> Path:
        """Where the Hub's own cache keeps what it has of this commit."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE, f"models--{self.id.replace('/', '--')}", "snapshots", self.commit)


def look_up(repository: str, revision: str | None) -> Repository:
    """Ask the Hub which commit ``revision`` (default: the main branch) is, and what files it holds.

    Where the Hub cannot be reached, the commit is the one that the name stood for when it last could be.

    Raises:
        HubError: the Hub refuses, or it cannot be reached and nothing is cached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    def ask() -> ModelInfo:  # without a limit the client would wait for ever
        return HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=HF_HUB_DOWNLOAD_TIMEOUT)

    try:
        info = patiently(ask)
    except Exception as error:  # the HTTP client's own exceptions are not part of huggingface_hub's interface
        if (answer := refusal(error)) is not None:
            raise refused(repository, revision, answer) from error
        found = cached_repository(repository, revision)
        if found is None:
            raise unreachable(repository, error) from error
        return found
    commit = info.sha
    if commit is None or not _COMMIT.fullmatch(commit):
        raise HubError("the Hub does not say which commit this is", where=repository)
    if revision is not None and _COMMIT.fullmatch(revision) and commit != revision:
        raise HubError(
            "the Hub answers with another commit than was asked for", where=repository, expected=revision, found=commit
        )
    files = {
        sibling.rfilename: RemoteFile(
            sibling.size if type(sibling.size) is int and 0 <= sibling.size <= LARGEST_FILE_BYTES else None,
            None if sibling.lfs is None else _matching(_SHA256, sibling.lfs.sha256),
            _matching(_COMMIT, sibling.blob_id),
        )
        for sibling in info.siblings or ()
        if _is_inside(sibling.rfilename)
    }
    _remember(repository, revision, commit)
    return Repository(repository, commit, files)


def cached_repository(repository: str, revision: str | None) -> Repository | None:
    """Return the repository without asking the Hub: its commit as it was last seen here or by the Hub's own tools."""
    from huggingface_hub import try_to_load_from_cache

    if revision is not None and _COMMIT.fullmatch(revision):
        pinned = Repository(repository, revision, None)
        return pinned if pinned.folder.is_dir() or pinned.snapshot.is_dir() else None
    try:
        commit = _reference(repository, revision).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    if _COMMIT.fullmatch(commit):
        return Repository(repository, commit, None)
    for name in ("model_index.json", "unet/config.json", "config.json"):
        found = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            return Repository(repository, Path(found).parents[name.count("/")].name, None)
    return None


def _is_inside(name: object) -> bool:
    """True for a path that stays below the folder it is put into: names of a listing become names of files here."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and "\\" not in name
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def _matching(pattern: re.Pattern[str], text: object) -> str | None:
    """Return a hash that a listing names, if it has the form of one: it becomes a file's name here."""
    return text if isinstance(text, str) and pattern.fullmatch(text) else None


def _remember(repository: str, revision: str | None, commit: str) -> None:
    if revision == commit:
        return
    path = _reference(repository, revision)
    try:
        disk.make_folders(path.parent)
        disk.replace_file(path, commit.encode() + b"\n", force=True)
    except OSError:
        return  # only what can be done without a network is less then


def _reference(repository: str, revision: str | None) -> Path:
    return _home(repository) / "refs" / quote(revision or "main", safe="")


def _home(repository: str) -> Path:
    return cache_folder() / "hub" / f"models--{repository.replace('/', '--')}"
