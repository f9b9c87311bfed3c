"""What a machine says of itself: its processor, and the memory that is free. Without torch."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

from unet_surgery.checkpoint import disk

__all__ = ["available_bytes", "cpu_name", "offer_memory"]

FIRST_TO_END = b"1000"


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name; its architecture where the system does not say more."""
    return _value(cpuinfo, "model name") or platform.processor() or platform.machine()


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return how much memory Linux could give to a program now; None where the system does not say."""
    value = (_value(meminfo, "MemAvailable") or "").split()
    return int(value[0]) * 1024 if value and value[0].isdecimal() else None


def offer_memory() -> None:
    """Have Linux end this process, rather than another, when there is no memory left; elsewhere do nothing."""
    with contextlib.suppress(OSError):
        fd = disk.open_for_update(Path("/proc/self/oom_score_adj"))
        try:
            disk.write(fd, FIRST_TO_END)
        finally:
            os.close(fd)


def _value(path: Path, wanted: str) -> str | None:
    """Return the first value of a file of lines ``name: value``."""
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() == wanted), None)
