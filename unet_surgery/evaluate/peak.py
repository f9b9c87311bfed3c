"""The most memory that a U-Net's forward takes: on a GPU by torch's allocator, on a CPU by a process of its own.

CUDA: what torch's allocator had handed out at most during the forward, less what it had handed out before, plus the
U-Net's own weights; so other models on the device do not count, nor does what CUDA and its libraries take for
themselves.

CPU: how far the resident memory of a fresh process rose from before the U-Net was made to after its forward, by
Linux's high-water mark (VmHWM). Libraries are loaded before. Weights are random, of the same size. Linux ends that
process first when there is no memory left, and this one goes on.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from unet_surgery.errors import printable
from unet_surgery.evaluate.benchmodels import BenchModel
from unet_surgery.evaluate.why import OUT_OF_MEMORY

__all__ = ["CPU_PEAK", "CUDA_PEAK", "Peak", "cpu_peaks", "cuda_peak", "network_bytes", "read_peaks"]

CUDA_PEAK = "torch's CUDA allocator: weights and the most that a forward adds"
CHILD = "import sys; sys.path[:] = sys.argv[1:]; from unet_surgery.evaluate.peak_child import main; main()"
"""It imports from where this process does, in the same order, and not from the folder it stands in."""
CPU_PEAK = "rise of a fresh process's resident memory: weights and an eager forward"


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes, or why there are none; both None where this system does not say."""

    num_bytes: int | None = None
    failed: str | None = None


def network_bytes(network: torch.nn.Module) -> int:
    """Return what a network's parameters and buffers take."""
    tensors = (*network.parameters(), *network.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cuda_peak(call: Callable[[], object], own_bytes: int, device: torch.device) -> int:
    """Run ``call`` of a network of ``own_bytes`` on a GPU; return the peak, as if it were alone there."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - int(before) + own_bytes


def cpu_peaks(model: BenchModel, samples: Sequence[int], *, dtype: str, channels_last: bool) -> dict[int, Peak]:
    """Run one forward of each number of ``samples`` in a process of its own; return by how much its memory rose."""
    wanted = {
        "config": dict(model.config),
        "dtype": dtype,
        "latent": list(model.latent),
        "samples": sorted(samples),  # a high-water mark does not fall
        "channels_last": channels_last,
        "threads": torch.get_num_threads(),
    }
    child = subprocess.Popen(  # noqa: S603  # this Python, and a module of this package
        [sys.executable, "-P", "-W", "ignore", "-c", CHILD, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        output, complaints = child.communicate(json.dumps(wanted).encode())
    finally:
        if child.poll() is None:  # interrupted: nothing goes on behind the user's back
            child.kill()
            child.communicate()
    return read_peaks(sorted(samples), child.returncode, output, complaints)


def read_peaks(samples: Sequence[int], status: int, output: bytes, complaints: bytes) -> dict[int, Peak]:
    """Return what the other process said, a line for each of ``samples``; for the rest, what became of it.

    The process stops at the first that fails, and larger ones fail as that did. Lines that it did not write, but a
    library of its, are left out.
    """
    lines = output.split(b"\n")[:-1]  # the last one is empty, or was cut off
    said = [peak for peak in map(_peak, lines) if peak is not None][: len(samples)]
    rest = said[-1] if said and said[-1].failed is not None else Peak(failed=_what_became(status, complaints))
    return dict(zip(samples, [*said, *[rest] * (len(samples) - len(said))], strict=True))


def _peak(line: bytes) -> Peak | None:
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    match answer:
        case {"num_bytes": int() | None as num_bytes}:
            return Peak(num_bytes)
        case {"failed": str() as failed}:
            return Peak(failed=printable(failed))
    return None


def _what_became(status: int, complaints: bytes) -> str:
    if status == -signal.SIGKILL:
        return f"{OUT_OF_MEMORY}: the system ended the process (signal {-status})"
    if status < 0:
        return f"the process ended by signal {-status}"
    last = complaints.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return printable(last) or f"the process ended with status {status}"
