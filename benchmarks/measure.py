"""Timing whole processes: what every benchmark here shares."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.runtime.machine import cpu_name

__all__ = ["TOOL", "Run", "machine", "median_line", "run"]

TOOL = str(Path(sys.executable).with_name("unet-surgery"))


@dataclass(frozen=True)
class Run:
    """One finished process."""

    seconds: float
    peak_rss_bytes: int


def run(command: Sequence[str]) -> Run:
    """Run ``command`` silently, and return its wall time and its peak resident memory; a failure ends the benchmark."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/")
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        assert process.stderr is not None
        sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read().decode()}")
    return Run(seconds, usage.ru_maxrss * 1024)


def median_line(label: str, runs: Sequence[Run], reference: Sequence[Run] | None = None) -> str:
    """Return one line: median, range, peak memory, and the ratio of medians to ``reference``."""
    seconds = [r.seconds for r in runs]
    line = f"{label:<34}{statistics.median(seconds):8.3f} s  ({min(seconds):.3f}–{max(seconds):.3f})"
    line += f"  {max(r.peak_rss_bytes for r in runs) / 1e6:7.1f} MB peak"
    if reference is not None:
        ratio = statistics.median(seconds) / statistics.median([r.seconds for r in reference])
        line += f"  {ratio:5.2f} x"
    return line


def machine() -> str:
    """Return what the numbers were measured on."""
    cores = len(os.sched_getaffinity(0))
    return f"{cpu_name()}, {cores} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"
