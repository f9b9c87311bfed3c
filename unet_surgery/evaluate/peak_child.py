"""The process that :mod:`unet_surgery.evaluate.peak` measures: ``python -m unet_surgery.evaluate.peak_child``.

It reads what to run as JSON from stdin, makes the U-Net with random weights, runs it once, and says on stdout how far
its memory rose.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from unet_surgery.evaluate.benchnets import forward, random_unet
from unet_surgery.evaluate.drawers import DTYPES
from unet_surgery.evaluate.why import why_not

__all__ = ["main", "rise"]


def rise(wanted: dict[str, Any]) -> int | None:
    """Run what is ``wanted``; return the rise in bytes, None where the system does not tell."""
    torch.set_num_threads(wanted["threads"])
    before, mark = _memory("VmRSS"), _memory("VmHWM")
    unet = random_unet(wanted["config"], torch.device("cpu"), DTYPES[wanted["dtype"]]).eval().requires_grad_(False)
    if wanted["channels_last"]:
        unet = unet.to(memory_format=torch.channels_last)
    height, width = wanted["latent"]
    forward(unet, (height, width), wanted["batch"], channels_last=wanted["channels_last"])()
    after, high = _memory("VmRSS"), _memory("VmHWM")
    if before is None or mark is None or after is None or high is None:
        return None
    return max(after, high if high > mark else 0) - before  # an old mark is of loading the libraries


def _memory(key: str) -> int | None:
    """Return a line of /proc/self/status in bytes."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            found = next((line.split() for line in lines if line.startswith(f"{key}:")), None)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def main() -> None:
    """Answer on stdout, in JSON."""
    wanted = json.load(sys.stdin)
    try:
        answer: dict[str, int | str | None] = {"bytes": rise(wanted)}
    except RuntimeError as error:
        answer = {"failed": why_not(error)}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
