"""Into the original layout and out of it, beside ``cp`` and ``sync`` of the finished file, on the same disk.

``export`` of a full-size student, and ``prune`` of a full-size single file. Runs alternate, the source is in the page
cache, the disk is quiet before each run, and both sides force their bytes to disk. Needs 10 GB of disk; the folder can
be given as the first argument.
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
WEIGHTS = "diffusion_pytorch_model.safetensors"


def main() -> None:
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    folder = Path(tempfile.mkdtemp(prefix="unet-surgery-bench-", dir=parent))
    os.environ.setdefault("UNET_SURGERY_CACHE", str(folder / "cache"))
    student, single, out = folder / "student", folder / "single.safetensors", folder / "out"
    prune = [TOOL, "prune", "--recipe", RECIPE, "--quiet", "--teacher"]
    try:
        print(machine())
        print(f"median of {ROUNDS} alternating runs (range), peak memory, ratio to cp + sync\n")
        run([*prune, TEACHER, "--out", str(student)])
        for numbering in NUMBERINGS:
            export = [TOOL, "export", str(student), "--numbering", numbering, "--quiet", "--out", f"{out}.safetensors"]
            measure(f"export {numbering} of {RECIPE}", export, Path(f"{out}.safetensors"), folder)
        shutil.rmtree(student)
        run([TOOL, "export", str(Path(os.environ["UNET_SURGERY_CACHE"]) / TEACHER), "--quiet", "--out", str(single)])
        measure(f"prune {RECIPE} of {single.name}", [*prune, str(single), "--out", str(out)], out / WEIGHTS, folder)
    finally:
        shutil.rmtree(folder)


def measure(label: str, command: list[str], result: Path, folder: Path) -> None:
    """Run ``command``, which writes ``result``, and the copying of what it wrote, in turns."""
    finished, copy = folder / "finished", folder / "copy"
    run(command)
    result.rename(finished)
    _remove(result, folder)
    ours, reference = [], []
    for _ in range(ROUNDS):
        os.sync()
        reference.append(run(["sh", "-c", f"cp --reflink=never {finished} {copy} && sync {copy}"]))
        copy.unlink()
        os.sync()
        ours.append(run(command))
        _remove(result, folder)
    print(f"{label}: {finished.stat().st_size / 1e9:.2f} GB to write")
    finished.unlink()
    print(median_line("cp --reflink=never + sync FILE", reference))
    print(median_line(f"unet-surgery {command[1]}", ours, reference) + "\n")


def _remove(result: Path, folder: Path) -> None:
    """Remove a result: a file, or the student's folder that it is in."""
    if result.parent == folder:
        result.unlink(missing_ok=True)
    else:
        shutil.rmtree(result.parent)


if __name__ == "__main__":
    main()
