"""Fetching a teacher from the Hugging Face Hub into the ordinary Hub cache, only the files that are needed."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.checkpoint.components import INDEX
from unet_surgery.checkpoint.layout import choose_weights, component_files, shard_files
from unet_surgery.checkpoint.licence import CARD, is_licence_file
from unet_surgery.errors import HubError, OutputError, SurgeryError, TeacherError
from unet_surgery.hub.refusals import refused as _refused
from unet_surgery.hub.refusals import unreachable as _unreachable

__all__ = ["Download", "download", "needed_files"]

log = logging.getLogger(__name__)


def needed_files(names: Sequence[str], *, weights: bool, variant: str | None, unet_only: bool, where: str) -> list[str]:
    """Return which of a repository's files a surgery needs.

    Raises:
        TeacherError: the repository holds no U-Net with safetensors weights.
    """
    pipeline = INDEX in names
    unet = "unet/" if pipeline or "unet/config.json" in names else ""
    if f"{unet}config.json" not in names:
        raise TeacherError("the repository holds no U-Net", where=where, expected="unet/config.json or config.json")
    needed = [name for name in (INDEX, f"{unet}config.json") if name in names]
    if not weights:
        return needed
    inside = [name.removeprefix(unet) for name in names if name.startswith(unet) and "/" not in name.removeprefix(unet)]
    needed += [name for name in names if name == CARD or is_licence_file(name)]  # what the student's card carries on
    choice = choose_weights(inside, variant, where=where)
    needed.append(unet + choice.file)
    if choice.sharded:
        needed += [unet + name for name in shard_files(inside, choice)]
    if pipeline and not unet_only:
        folders = sorted({name.partition("/")[0] for name in names if name.count("/") == 1} - {"unet"})
        for folder in folders:
            files = [name.partition("/")[2] for name in names if name.startswith(folder + "/") and name.count("/") == 1]
            needed += [f"{folder}/{name}" for name in component_files(files, variant)]
    return needed


@dataclass(frozen=True, slots=True)
class Download:
    """A snapshot in the Hub cache, and which variant of the U-Net's weights was meant (the cache may hold others)."""

    folder: Path
    variant: str | None


def download(repository: str, revision: str | None, *, weights: bool, variant: str | None, unet_only: bool) -> Download:
    """Return the local snapshot of ``repository``; files that the Hub cache holds already are not fetched again.

    Where the Hub cannot be reached, what the cache holds is used if it is enough.

    Raises:
        HubError: the Hub cannot be reached, breaks off, or refuses; says which, and what to do.
        OutputError: the cache cannot be written.
        TeacherError: the repository holds no U-Net with safetensors weights.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repository, revision=revision)
    except HfHubHTTPError as error:
        raise _refused(repository, revision, error) from error
    except Exception as error:  # the HTTP client's own exceptions are not part of huggingface_hub's interface
        cached = _cached(repository, revision)
        if cached is None:
            raise _unreachable(repository, error) from error
        log.warning("the Hub cannot be reached; using the cached copy of %s", repository)
        if weights:
            _check_cached(cached, repository, variant)
        return Download(cached, variant)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    files = needed_files(names, weights=weights, variant=variant, unet_only=unet_only, where=repository)
    try:
        # By the name the user gave, not by commit: only so does the cache remember what the name stood for.
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except HfHubHTTPError as error:
        raise _refused(repository, revision, error) from error
    except Exception as error:
        raise _broken_off(repository, error) from error
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise HubError("the download is incomplete", where=f"{repository}/{missing[0]}", hint="run again: it resumes")
    return Download(folder, _variant_of(names, variant, repository))


def _variant_of(names: Sequence[str], variant: str | None, repository: str) -> str | None:
    """Return the variant that the repository's own listing gives, whatever the cache holds."""
    folder = "unet/" if "unet/config.json" in names else ""
    inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
    try:
        return choose_weights(inside, variant, where=repository).variant
    except TeacherError:  # a plan needs no weights
        return variant


def _check_cached(folder: Path, repository: str, variant: str | None) -> None:
    """Without the Hub's listing, nothing may stand in for the weights that were asked for."""
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    try:
        choose_weights([path.name for path in unet.iterdir()], variant, where=repository, exact=True)
    except TeacherError as error:
        raise HubError(
            "the Hugging Face Hub cannot be reached, and its cache lacks these weights",
            where=repository,
            expected=f"variant {variant}" if variant else "the plain weights",
            found=error.found,
            hint="try again with a network, or name the variant that is cached",
        ) from error


def _broken_off(repository: str, error: Exception) -> SurgeryError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return OutputError("the Hub cache cannot be written", where=repository, found=error.strerror)
    return HubError(
        "the download from the Hugging Face Hub broke off",
        where=repository,
        found=type(error).__name__,
        hint="run again: it resumes",
    )


def _cached(repository: str, revision: str | None) -> Path | None:
    """Return the cached snapshot that holds the U-Net's config, however much else it holds."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("unet/config.json", "config.json"):
        found = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parents[name.count("/")]
    return None
