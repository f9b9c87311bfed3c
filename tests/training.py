"""Small runs for tests: a student of tiny-random, a dozen pictures of 16 pixels, steps of a tenth of a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from warm import run_tool

import unet_surgery as us

ROOT = Path(__file__).resolve().parents[1]
NUM_PICTURES = 10
SIDE = 16


def write_pictures(folder: Path, *, count: int = NUM_PICTURES, side: int = SIDE) -> Path:
    """Write an imagefolder with metadata.csv: smooth pictures of many colours."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["file_name,text"]
    for i in range(count):
        corners = rng.uniform(0, 255, (2, 2, 3))
        y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j][..., None]
        picture = (1 - y) * ((1 - x) * corners[0, 0] + x * corners[0, 1]) + y * (
            (1 - x) * corners[1, 0] + x * corners[1, 1]
        )
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i:03}.png")
        lines.append(f"{i:03}.png,picture number {i}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def make_places(root: Path) -> dict[str, Path]:
    """Make a pruned student, pictures, and a latent cache of them."""
    us.prune("bk_tiny", "tiny-random", root / "student")
    pictures = write_pictures(root / "pictures")
    us.make_cache(pictures, "tiny-random", root / "cache", resolution=SIDE)
    return {"student": root / "student", "pictures": pictures, "cache": root / "cache"}


def run_data(output: Path, student: Path, data: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a run of 6 steps of 4 samples, all three terms, fp32."""
    return {
        "output": str(output),
        "student": str(student),
        "teacher": "tiny-random",
        "data": dict(data),
        "steps": 6,
        "batch": 4,
        "speed": {"dtype": "fp32", "channels_last": False},
        "optimizer": {"lr": 1e-3},
        "ema": {"decay": 0.9, "every": 2},
        "save": {"every": 2},
        "log": {"every": 1},
        **changes,
    }


def write_run(path: Path, data: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(data)))
    return path


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "unet_surgery", *words]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run_command(*words: str, timeout: float = 240, **more: str) -> subprocess.CompletedProcess[str]:
    return run_tool(words, env=environment(**more), timeout=timeout)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what is a matter of time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
