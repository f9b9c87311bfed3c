"""prune of a teacher on the Hub: how many bytes come over the wire, beside what the student keeps and the whole file.

The Hub is a stand-in on loopback (the one of the tests) that the real client speaks to; the teacher is a full-size fp32
SD v1 U-Net. Needs 12 GB of disk; the folder can be given as the first argument.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from hub_server import HubStandIn, client_env
from measure import TOOL, machine, run

TEACHER = "sd-v1-random"
NAME = "org/sd-v1"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def main() -> None:
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    folder = Path(tempfile.mkdtemp(prefix="unet-surgery-bench-", dir=parent))
    cache = Path(os.environ.setdefault("UNET_SURGERY_CACHE", str(folder / "cache")))
    try:
        print(machine())
        run([TOOL, "prune", "-r", "bk_tiny", "-t", TEACHER, "-q", "-o", str(folder / "local")])
        hub = HubStandIn()
        hub.add(NAME, cache / TEACHER)
        with hub.serve() as endpoint:
            os.environ |= {**client_env(endpoint, folder / "hf"), "UNET_SURGERY_CACHE": str(folder / "own")}
            for recipe in ("bk_tiny", "bk_tiny", "bk_base"):
                measure(hub, recipe, folder, cache / TEACHER / WEIGHTS)
    finally:
        shutil.rmtree(folder)


def measure(hub: HubStandIn, recipe: str, folder: Path, whole: Path) -> None:
    out = folder / "out"
    before = len(hub.requests)
    seconds, peak_bytes = timed([TOOL, "prune", "-r", recipe, "-t", NAME, "-q", "-o", str(out)])
    seen = [record for record in hub.requests[before:] if record.method == "GET"]
    sent, student = sum(record.body_bytes for record in seen), (out / WEIGHTS).stat().st_size
    same = recipe != "bk_tiny" or (out / WEIGHTS).read_bytes() == (folder / "local" / WEIGHTS).read_bytes()
    print(
        f"{recipe}: {sent / 1e9:.3f} GB over the wire in {len(seen)} requests, {sent / student:.4f} of the student's "
        f"{student / 1e9:.3f} GB, {sent / whole.stat().st_size:.2f} of the whole file; {seconds:.1f} s, "
        f"{peak_bytes / 1e6:.0f} MB peak" + ("" if same else "; NOT THE LOCAL STUDENT")
    )
    shutil.rmtree(out)


def timed(command: list[str]) -> tuple[float, int]:
    """Run ``command`` and return its wall time and peak memory, as seen by a small process.

    A child of this one would begin with the memory of the stand-in's files, and the system would count that.
    """
    code = (
        "import json, resource, subprocess, sys, time; start = time.perf_counter(); "
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024; "
        "print(json.dumps([time.perf_counter() - start, peak]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    seconds, peak_bytes = json.loads(done.stdout)
    return seconds, peak_bytes


if __name__ == "__main__":
    main()
