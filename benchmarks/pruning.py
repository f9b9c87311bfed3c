"""prune of a full-size fp32 SD v1 U-Net beside ``cp`` and ``sync`` of the finished student, on the same disk.

Runs alternate, the teacher is in the page cache, the disk is quiet before each run, and both sides force their bytes to
disk. Needs 6 GB of disk; the folder can be given as the first argument.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from measure import TOOL, machine, median_line, run

ROUNDS = 7
TEACHER = "sd-v1-random"
RECIPES = ("bk_tiny", "bk_base")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def main() -> None:
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    folder = Path(tempfile.mkdtemp(prefix="unet-surgery-bench-", dir=parent))
    os.environ.setdefault("UNET_SURGERY_CACHE", str(folder / "cache"))
    try:
        print(machine())
        print(f"median of {ROUNDS} alternating runs (range), peak memory, ratio to cp + sync\n")
        for recipe in RECIPES:
            measure(recipe, folder)
    finally:
        shutil.rmtree(folder)


def measure(recipe: str, folder: Path) -> None:
    finished, out, copy = folder / f"finished-{recipe}", folder / "out", folder / "copy"
    prune = [TOOL, "prune", "--recipe", recipe, "--teacher", TEACHER, "--quiet", "--out"]
    run([*prune, str(finished)])
    size = (finished / WEIGHTS).stat().st_size
    ours, reference = [], []
    for _ in range(ROUNDS):
        os.sync()
        reference.append(run(["sh", "-c", f"cp --reflink=never {finished / WEIGHTS} {copy} && sync {copy}"]))
        copy.unlink()
        os.sync()
        ours.append(run([*prune, str(out)]))
        shutil.rmtree(out)
    shutil.rmtree(finished)
    print(f"{recipe} of {TEACHER} (3.44 GB, fp32): {size / 1e9:.2f} GB to write")
    print(median_line("cp --reflink=never + sync FILE", reference))
    print(median_line("unet-surgery prune", ours, reference) + "\n")


if __name__ == "__main__":
    main()
