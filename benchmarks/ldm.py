"""export of a full-size student beside ``cp`` and ``sync`` of the finished file, on the same disk.

Runs alternate, the student is in the page cache, the disk is quiet before each run, and both sides force their bytes to
disk. Needs 8 GB of disk; the folder can be given as the first argument.
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
RECIPE = "bk_tiny"
NUMBERINGS = ("dense", "gapped")


def main() -> None:
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    folder = Path(tempfile.mkdtemp(prefix="unet-surgery-bench-", dir=parent))
    os.environ.setdefault("UNET_SURGERY_CACHE", str(folder / "cache"))
    try:
        print(machine())
        print(f"median of {ROUNDS} alternating runs (range), peak memory, ratio to cp + sync\n")
        student = folder / "student"
        run([TOOL, "prune", "--recipe", RECIPE, "--teacher", TEACHER, "--quiet", "--out", str(student)])
        for numbering in NUMBERINGS:
            measure(student, numbering, folder)
    finally:
        shutil.rmtree(folder)


def measure(student: Path, numbering: str, folder: Path) -> None:
    finished, out, copy = (folder / f"{name}.safetensors" for name in ("finished", "out", "copy"))
    export = [TOOL, "export", str(student), "--numbering", numbering, "--quiet", "--out"]
    run([*export, str(finished)])
    ours, reference = [], []
    for _ in range(ROUNDS):
        os.sync()
        reference.append(run(["sh", "-c", f"cp --reflink=never {finished} {copy} && sync {copy}"]))
        copy.unlink()
        os.sync()
        ours.append(run([*export, str(out)]))
        out.unlink()
    print(f"{RECIPE} of {TEACHER}, {numbering}: {finished.stat().st_size / 1e9:.2f} GB to write")
    finished.unlink()
    print(median_line("cp --reflink=never + sync FILE", reference))
    print(median_line("unet-surgery export", ours, reference) + "\n")


if __name__ == "__main__":
    main()
