"""Where this package keeps what it made or fetched: built-in teachers, and parts of files of the Hub."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return ``$UNET_SURGERY_CACHE``, else ``unet-surgery`` below the user's cache folder."""
    if own := os.environ.get("UNET_SURGERY_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "unet-surgery"
