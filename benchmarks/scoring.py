"""Pictures a second through the Inception network: ours beside pytorch-fid 0.3.0 and torch-fidelity 0.4.0.

The same pictures and the same weights file (random, from seeds). Each library runs its own code in a process of its
own, theirs in the environment of make parity; what is timed is from the files to the features, after one round to warm
up. Processes take turns, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

import seeded  # noqa: E402

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"


def main() -> None:
    options = parse_options()
    if options.child is not None:
        print(json.dumps(timed(CHILDREN[options.child], options)))
        return
    from measure import machine

    what = f"{options.count} pictures of {options.size}×{options.size}, batch {options.batch}, {options.device}"
    print(f"{machine()}; {what}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.count, options.size)
        seconds: dict[str, list[float]] = {name: [] for name in CHILDREN}
        for _ in range(options.repeats):
            for child, found in seconds.items():
                found.append(run_child(child, folder, options))
    for ours, theirs in (("ours-fid", "pytorch-fid"), ("ours-is", "torch-fidelity")):
        for child in (theirs, ours):
            print(line(child, seconds[child], options.count, seconds[theirs] if child == ours else None))


def line(name: str, seconds: list[float], count: int, reference: list[float] | None) -> str:
    median = statistics.median(seconds)
    text = f"{name:<16}{count / median:8.2f} pictures/s  ({min(seconds):.2f}–{max(seconds):.2f} s)"
    return text if reference is None else f"{text}  {statistics.median(reference) / median:5.2f} x"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64, help="pictures")
    parser.add_argument("--size", type=int, default=256, help="their side")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--parity", type=Path, default=ROOT / ".venv-parity" / "bin" / "python", help="its python")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(folder: Path, count: int, size: int) -> None:
    import torch

    from unet_surgery.evaluate.inception import tensor_shapes

    seeded.write_pictures(folder / "pictures", seeded.pictures(count, size, size))
    weights = folder / "hub" / "checkpoints" / WEIGHTS
    weights.parent.mkdir(parents=True)
    torch.save({n: torch.from_numpy(v) for n, v in seeded.seeded_tensors(tensor_shapes()).items()}, weights)


def run_child(child: str, folder: Path, options: argparse.Namespace) -> float:
    python = sys.executable if child.startswith("ours") else str(options.parity)
    words = [python, __file__, "--child", child, "--folder", str(folder), "--device", options.device]
    words += ["--batch", str(options.batch), "--count", str(options.count)]
    environment = {**os.environ, "TORCH_HOME": str(folder)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        sys.exit(f"{child} failed:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def timed(load: Callable[[argparse.Namespace], Callable[[], object]], options: argparse.Namespace) -> float:
    run = load(options)
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def pytorch_fid(options: argparse.Namespace) -> Callable[[], object]:
    operators = declared()
    from pytorch_fid.fid_score import get_activations
    from pytorch_fid.inception import InceptionV3

    model = InceptionV3([3]).to(options.device)
    files = sorted((options.folder / "pictures").iterdir())
    workers = min(len(os.sched_getaffinity(0)), 8)  # its command line's default

    def run() -> object:
        return operators, get_activations(files, model, options.batch, 2048, options.device, workers)

    return run


def torch_fidelity(options: argparse.Namespace) -> Callable[[], object]:
    operators = declared()
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    settings = {
        "input1": str(options.folder / "pictures"),
        "cuda": options.device != "cpu",
        "batch_size": options.batch,
        "feature_extractor_weights_path": str(options.folder / "hub" / "checkpoints" / WEIGHTS),
        "verbose": False,
    }
    network = create_feature_extractor("inception-v3-compat", ["logits_unbiased"], **settings)

    def run() -> object:
        return operators, extract_featuresdict_from_input_id(1, network, **settings)

    return run


def declared() -> object:
    from parity import declare_operators

    return declare_operators()


def ours(options: argparse.Namespace, *, fid: bool) -> Callable[[], object]:
    import torch

    from unet_surgery.evaluate.features import Compute, inception_features
    from unet_surgery.evaluate.inception import FidInception
    from unet_surgery.evaluate.pictures import survey
    from unet_surgery.evaluate.weights import read_tensors

    net = FidInception(read_tensors(options.folder / "hub" / "checkpoints" / WEIGHTS)).to(options.device)
    compute = Compute(torch.device(options.device), batch=options.batch)

    def run() -> object:
        return inception_features(net, survey(options.folder / "pictures"), compute, moments=fid, logits=not fid)

    return run


def ours_fid(options: argparse.Namespace) -> Callable[[], object]:
    return ours(options, fid=True)


def ours_is(options: argparse.Namespace) -> Callable[[], object]:
    return ours(options, fid=False)


CHILDREN = {"pytorch-fid": pytorch_fid, "ours-fid": ours_fid, "torch-fidelity": torch_fidelity, "ours-is": ours_is}


if __name__ == "__main__":
    main()
