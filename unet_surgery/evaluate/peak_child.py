"""The process that :mod:`unet_surgery.evaluate.peak` measures.

It reads what to run as JSON from stdin, makes the U-Net with random weights, runs it once, and says on stdout how far
its memory rose.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from unet_surgery.evaluate.benchnets import forward, random_unet
from unet_surgery.evaluate.drawers import DTYPES
from unet_surgery.evaluate.why import why_not
from unet_surgery.runtime.machine import offer_memory

__all__ = ["main", "rises"]


def rises(wanted: dict[str, Any]) -> Iterator[int | None]:
    """Make the U-Net, run it with each number of samples, and yield the rise after each; None: the system is silent."""
    torch.set_num_threads(wanted["threads"])
    before, mark = _memory("VmRSS"), _memory("VmHWM")
    unet = random_unet(wanted["config"], torch.device("cpu"), DTYPES[wanted["dtype"]]).eval().requires_grad_(False)
    if wanted["channels_last"]:
        unet = unet.to(memory_format=torch.channels_last)
    height, width = wanted["latent"]
    for samples in wanted["samples"]:
        forward(unet, (height, width), samples, channels_last=wanted["channels_last"])()
        after, high = _memory("VmRSS"), _memory("VmHWM")
        if before is None or mark is None or after is None or high is None:
            yield None
        else:
            yield max(after, high if high > mark else 0) - before  # an old mark is of loading the libraries


def _memory(key: str) -> int | None:
    """Return a line of /proc/self/status in bytes."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            found = next((line.split() for line in lines if line.startswith(f"{key}:")), None)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def main() -> None:
    """Answer on stdout: a line of JSON for each number of samples, at once, for the next may be the end."""
    wanted = json.load(sys.stdin)
    offer_memory()
    try:
        for num_bytes in rises(wanted):
            _say({"num_bytes": num_bytes})
    except Exception as error:
        if (why := why_not(error)) is None:
            raise
        _say({"failed": why})


def _say(answer: dict[str, int | str | None]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
