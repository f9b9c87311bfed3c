"""Several processes on one machine, each with parts of a cache."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from unet_surgery.data.cache import CacheRequest, CacheResult, Progress, write_part
from unet_surgery.data.cacheplan import Part
from unet_surgery.errors import SurgeryError, TrainingError

__all__ = ["run_parts"]

MAX_SECONDS_TO_END = 10.0


def run_parts(request: CacheRequest, parts: Sequence[Part], progress: Progress) -> list[CacheResult]:
    """Run every part in a process of its own; the first error ends them all and is raised."""
    context = multiprocessing.get_context("spawn")
    processes: list[Any] = []
    done: dict[Connection, tuple[int, int]] = {}
    results: list[CacheResult] = []
    try:
        for number, part in enumerate(parts):
            here, there = context.Pipe(duplex=False)
            arguments = (replace(request, device=_device(request.device, number)), part, there, len(parts), os.getpid())
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            there.close()
            processes.append(process)
            done[here] = (0, 0)
        while len(results) < len(parts):
            for end in wait([end for end in done if not end.closed]):
                assert isinstance(end, Connection)
                message = _hear(end)
                if isinstance(message, CacheResult):
                    results.append(message)
                    end.close()
                else:
                    done[end] = message
                    progress(sum(n for n, _ in done.values()), sum(n for _, n in done.values()))
        return results
    finally:
        _end(processes)


def _hear(end: Connection) -> CacheResult | tuple[int, int]:
    """Take one message of a worker: its progress, or at its end what it did."""
    try:
        message = end.recv()
    except EOFError:
        raise TrainingError("a process that encodes pictures died", hint="run the same command again") from None
    if isinstance(message, SurgeryError):
        raise message
    assert isinstance(message, (CacheResult, tuple))
    return message


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.join(0.5)
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + MAX_SECONDS_TO_END
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()


def _device(device: str, number: int) -> str:
    """Deal the machine's GPUs to the workers."""
    if device not in ("auto", "cuda"):
        return device
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if count else device


def _work(request: CacheRequest, part: Part, channel: Connection, count: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that what is half-written is removed
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // count))

    def progress(num_done: int, total: int) -> None:
        if os.getppid() != parent:  # it was killed
            sys.exit(1)
        channel.send((num_done, total))

    try:
        channel.send(write_part(request, part, progress))
    except SurgeryError as error:
        channel.send(_plain(error))
    except BrokenPipeError:
        sys.exit(1)


def _plain(error: SurgeryError) -> SurgeryError:
    """Without its cause, which may not survive the way to another process."""
    error.__cause__ = error.__context__ = None
    return error
