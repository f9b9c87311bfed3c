"""A checkpoint of 2 GB saved and loaded, beside ``torch.save`` and ``safetensors`` of the same tensors.

All force their bytes to the same disk; runs alternate, and the disk is quiet before each. Files are read from the page
cache. Ours alone hashes what it writes and compares what it reads. Needs 4.5 GB of disk and 7 GB of memory; the folder
can be given as the first argument.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from measure import machine

from unet_surgery.distill.state import TrainingState, load_state, save_state

ROUNDS = 5
GROUPS = ("weights", "exp_avg", "exp_avg_sq", "ema")
NUM_TENSORS = 125  # of a million values, in each group

Call = Callable[[], object]


def main() -> None:
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    folder = Path(tempfile.mkdtemp(prefix="unet-surgery-bench-", dir=parent))
    state = TrainingState(1, {group: _tensors(number) for number, group in enumerate(GROUPS)}, {"cursor": 256})
    ours = folder / "checkpoints" / "step-00000001"
    pickle = folder / "pickle.pt"
    flat = {f"{group}.{name}": tensor for group in GROUPS for name, tensor in state.tensors[group].items()}
    single = folder / "single.safetensors"
    saves: dict[str, tuple[Call, Path]] = {
        "torch.save + fsync": (lambda: _synced(lambda: torch.save(flat, pickle), pickle), pickle),
        "safetensors + fsync": (lambda: _synced(lambda: safetensors.torch.save_file(flat, single), single), single),
        "unet-surgery save_state": (lambda: save_state(folder, state), ours),
    }
    loads: dict[str, tuple[Call, Path]] = {
        "torch.load": (lambda: torch.load(pickle, weights_only=True), pickle),
        "safetensors load_file": (lambda: safetensors.torch.load_file(single), single),
        "unet-surgery load_state": (lambda: load_state(ours), ours),
    }
    try:
        print(machine())
        print(f"median of {ROUNDS} alternating runs (range), ratio to torch; {len(flat)} tensors, 2.00 GB\n")
        report(saves, _remove)
        for save, _ in saves.values():
            save()
        report(loads, lambda _: None)
    finally:
        shutil.rmtree(folder)


def report(calls: dict[str, tuple[Call, Path]], tidy: Callable[[Path], None]) -> None:
    """Time the calls in turns, and print a line for each; ``tidy`` gets what a call has made."""
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for number in range(ROUNDS + 1):
        for label, (call, made) in calls.items():
            os.sync()
            start = time.perf_counter()
            result = call()
            if number:  # the first round warms up
                seconds[label].append(time.perf_counter() - start)
            del result
            tidy(made)
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    reference = next(iter(medians.values()))
    for label, times in seconds.items():
        spread = f"({min(times):.2f}–{max(times):.2f})"
        print(f"{label:<28}{medians[label]:6.2f} s  {spread:<14}{medians[label] / reference:6.2f} x")
    print()


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"block.{i}.weight": torch.randn(1000, 1000, generator=generator) for i in range(NUM_TENSORS)}


def _synced(save: Call, path: Path) -> None:
    save()
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _remove(made: Path) -> None:
    if made.is_dir():
        shutil.rmtree(made)
    else:
        made.unlink()


if __name__ == "__main__":
    main()
