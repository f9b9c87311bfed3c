"""Numbers and values as text for people."""

from __future__ import annotations

import json
from typing import Any

from unet_surgery.errors import printable
from unet_surgery.lower import StoredWeights

__all__ = ["change", "gigabytes", "share", "value", "weights_line"]


def share(part: int, whole: int) -> str:
    """Return ``part`` as a percentage of ``whole``."""
    return f"{part / whole:.1%}" if whole else "–"


def change(before: int, after: int) -> str:
    """Return the relative change."""
    return f"{after / before - 1:+.1%}" if before else "–"


def gigabytes(num_bytes: int) -> str:
    """Return a size in decimal units, as disks and the Hub count."""
    if num_bytes >= 10**9:
        return f"{num_bytes / 10**9:.2f} GB"
    return f"{num_bytes / 10**6:.1f} MB"


def value(item: Any) -> str:
    """Return a config value as it stands in JSON, on one line."""
    return item if item == "(absent)" else printable(json.dumps(item))


def weights_line(weights: StoredWeights | None) -> str:
    """Return one line on the weights that were read."""
    if weights is None:
        return "weights: none read (a config is enough for this)"
    dtypes = ", ".join(f"{count} {name}" for name, count in weights.dtypes.items())
    size = sum(file.bytes for file in weights.files)
    files = weights.files[0].name if len(weights.files) == 1 else f"{len(weights.files)} shards"
    return f"weights: {files}, {gigabytes(size)}, {dtypes}"
