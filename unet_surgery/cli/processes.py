"""Many processes of one command: which part of the work is this one's, and which device."""

from __future__ import annotations

import os

from unet_surgery.errors import UsageError, printable

__all__ = ["own_device", "part_of_work"]


def part_of_work(text: str | None) -> tuple[int, int]:
    """Return this process's part, counted from 0, and how many there are; torchrun and accelerate say it by RANK."""
    if text is None:
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        return (int(rank), int(size)) if rank.isdecimal() and size.isdecimal() else (0, 1)
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UsageError("--part is not a part", expected="i/n, such as 1/4", found=printable(text))
    return int(index) - 1, int(count)


def own_device(device: str) -> str:
    """Give each process of a launcher the GPU that it is meant to use."""
    rank = os.environ.get("LOCAL_RANK", "")
    if device not in ("auto", "cuda") or not rank.isdecimal():
        return device
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() else device
