"""Files of weights that are not a teacher's: found on this machine, or fetched from their own place on the Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.errors import HubError
from unet_surgery.hub.download import cached_file, download
from unet_surgery.hub.repository import look_up

__all__ = ["HubFiles", "fetch_files", "named_sha256", "torch_hub_file", "torch_hub_folder"]

ASK_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Files of a repository at one commit, in the Hub's cache; ``names`` lie in ``folder``."""

    repository: str
    commit: str
    folder: Path
    names: tuple[str, ...]


def torch_hub_file(*names: str) -> Path | None:
    """Return the first of these files that PyTorch's own cache holds, None if it holds none."""
    return next((path for name in names if (path := torch_hub_folder() / name).is_file()), None)


def torch_hub_folder() -> Path:
    """Return the folder of PyTorch's own cache of weights (``$TORCH_HOME``)."""
    home = os.environ.get("TORCH_HOME")
    if home is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        home = os.path.join(cache, "torch")
    return Path(os.path.expanduser(home), "hub", "checkpoints")


def named_sha256(repository: str, names: Sequence[str], *, revision: str | None = None) -> frozenset[str]:
    """Return the hashes that the Hub names of those files of a repository; none where it cannot be asked at once."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=ASK_SECONDS)
    except Exception:  # noqa: BLE001  # whatever keeps the answer away, the client's own exceptions among it
        return frozenset()
    found = (sibling.lfs.sha256 for sibling in info.siblings or () if sibling.rfilename in names and sibling.lfs)
    return frozenset(sha256 for sha256 in found if isinstance(sha256, str))


def fetch_files(
    repository: str, one_of: Sequence[str], others: Sequence[str] = (), *, revision: str | None = None
) -> HubFiles:
    """Fetch the first of ``one_of`` that the repository has at ``revision``, and those of ``others`` that it has.

    Each is compared with the Hub's hash of it. Without a network, what the Hub's cache holds is taken.

    Raises:
        HubError: the Hub refuses or cannot be reached, or the repository has none of ``one_of``.
        OutputError: the cache cannot be written or has no room.
    """
    found = look_up(repository, revision)

    def is_there(name: str) -> bool:
        return cached_file(found, name) is not None if found.files is None else name in found.files

    first = next((name for name in one_of if is_there(name)), None)
    if first is None:
        raise HubError(
            "the repository lacks the weights" if found.files is not None else "the Hub's cache lacks the weights",
            where=repository,
            expected=" or ".join(one_of),
        )
    names = (first, *(name for name in others if is_there(name)))
    return HubFiles(repository, found.commit, download(found, names), names)
