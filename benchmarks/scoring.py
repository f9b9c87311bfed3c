"""Pictures a second of whole commands: ``stats`` beside pytorch-fid 0.3.0's, ``score -m is`` beside torch-fidelity's.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --device cuda --count 10000

The same pictures and the same weights file (random, from seeds), from the start of a process to its end, theirs in the
environment of make parity. Commands take turns, each the first in every second turn, so that a busy machine slows both
alike; then it says how far what they computed is apart.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

THEIRS = "--theirs"
WEIGHTS = Path("hub", "checkpoints", "pt_inception-2015-12-05-6726825d.pth")
"""Where all of them look for the network below $TORCH_HOME."""


def main() -> None:
    if sys.argv[1:2] == [THEIRS]:
        run_theirs(sys.argv[2], sys.argv[3:])
        return
    options = parse_options()
    from measure import machine

    what = f"{options.count} pictures of {options.size}×{options.size}, batch {options.batch}, {options.device}"
    print(f"{machine()}; {what}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sha256 = prepare(folder, options.count, options.size)
        for what in options.what:
            compare(*COMMANDS[what](options, sha256), folder, options)
            print(f"    what they computed is {APART[what](folder):.1e} apart", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=list(COMMANDS), nargs="+", default=list(COMMANDS))
    parser.add_argument("--count", type=int, default=2048, help="pictures; statistics take no fewer than 2,048")
    parser.add_argument("--size", type=int, default=256, help="their side")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--parity", type=Path, default=ROOT / ".venv-parity" / "bin" / "python", help="its python")
    return parser.parse_args()


def prepare(folder: Path, count: int, size: int) -> str:
    """Write pictures and weights; return the weights' sha256."""
    import seeded
    import torch

    from unet_surgery.evaluate.inception import tensor_shapes

    seeded.write_pictures(folder / "pictures", seeded.pictures(count, size, size))
    (folder / WEIGHTS).parent.mkdir(parents=True)
    torch.save({n: torch.from_numpy(v) for n, v in seeded.seeded_tensors(tensor_shapes()).items()}, folder / WEIGHTS)
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def fid_commands(options: argparse.Namespace, sha256: str) -> tuple[list[str], list[str]]:
    """Return the words that make statistics, ours and theirs."""
    ours = ["stats", "pictures", "--out", "ours.npz", "--force", *our_options(options, sha256)]
    theirs = ["pytorch_fid.fid_score", "--save-stats", "pictures", "theirs.npz"]
    return ours, [*theirs, "--device", options.device, "--batch-size", str(options.batch)]


def is_commands(options: argparse.Namespace, sha256: str) -> tuple[list[str], list[str]]:
    """Return the words that compute IS, ours and theirs."""
    ours = ["score", "pictures", "-m", "is", "--out", "ours.json", "--force", *our_options(options, sha256)]
    theirs = ["torch_fidelity.fidelity", "--isc", "--input1", "pictures", "--json", "--silent"]
    theirs += ["--feature-extractor-weights-path", str(WEIGHTS), "--batch-size", str(options.batch)]
    return ours, [*theirs, *(["--cpu"] if options.device == "cpu" else ["--gpu", "0"])]


def our_options(options: argparse.Namespace, sha256: str) -> list[str]:
    words = ["--inception", str(WEIGHTS), "--weights-sha256", sha256, "--quiet"]
    return [*words, "--device", options.device, "--batch", str(options.batch)]


def compare(ours: list[str], theirs: list[str], folder: Path, options: argparse.Namespace) -> None:
    commands = {
        f"{theirs[0].partition('.')[0]} {theirs[1]}": [str(options.parity), __file__, THEIRS, *theirs],
        f"unet-surgery {ours[0]}": [sys.executable, "-m", "unet_surgery", *ours],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(options.repeats):
        for name in list(commands)[:: 1 if turn % 2 else -1]:
            (folder / "theirs.npz").unlink(missing_ok=True)  # which theirs refuses to replace
            seconds[name].append(run(commands[name], folder))
    reference = statistics.median(next(iter(seconds.values())))
    for name, found in seconds.items():
        median = statistics.median(found)
        span = f"({min(found):.1f}–{max(found):.1f} s)"
        print(f"{name:<28}{options.count / median:8.2f} pictures/s  {span:<18}{reference / median:5.2f} x", flush=True)


def run(words: Sequence[str], folder: Path) -> float:
    """Run a command in ``folder``; return the seconds it took. What it prints is kept for :func:`is_apart`."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TORCH_HOME": str(folder), "PYTHONPATH": path}
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    took = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr}")
    if THEIRS in words:
        (folder / "said.txt").write_text(done.stdout)
    return took


def run_theirs(module: str, words: list[str]) -> None:
    """Do what the console script of a library does, in this process."""
    from parity import declare_operators

    operators = declare_operators()  # which end with what declared them
    sys.argv = [module, *words]
    importlib.import_module(module).main()
    del operators


def statistics_apart(folder: Path) -> float:
    """Return the largest difference between both μ and Σ, as a share of theirs at the largest."""
    import numpy as np

    with np.load(folder / "ours.npz") as ours, np.load(folder / "theirs.npz") as theirs:
        return float(max(np.abs(ours[key] - theirs[key]).max() / np.abs(theirs[key]).max() for key in ("mu", "sigma")))


def is_apart(folder: Path) -> float:
    """Return the difference between both IS, as a share of theirs."""
    said = (folder / "said.txt").read_text()
    theirs = json.loads(said[said.index("{") :])["inception_score_mean"]
    ours = json.loads((folder / "ours.json").read_text())["scores"][0]["value"]
    return float(abs(ours - theirs) / theirs)


COMMANDS = {"fid": fid_commands, "is": is_commands}
APART = {"fid": statistics_apart, "is": is_apart}


if __name__ == "__main__":
    main()
