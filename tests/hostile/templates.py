"""Good inputs, made once, of which every hostile one is a damaged copy."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs import CONFIGS
from teachers import WEIGHTS, write_sharded, write_unet

import unet_surgery
from unet_surgery.checkpoint.bundled import make_bundled

__all__ = ["INDEX", "SHARDS", "WEIGHTS", "Build", "copy", "edit_json", "pipeline", "read_json", "sharded", "unet"]

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = tuple(f"diffusion_pytorch_model-{k:05d}-of-00002.safetensors" for k in (1, 2))

Build = Callable[[Path], object]


@functools.cache
def _template(name: str) -> Path:
    root = Path(tempfile.mkdtemp(prefix="hostile-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    target = root / name
    if name == "unet":
        write_unet(target, CONFIGS["sd1"])
    elif name == "sharded":
        write_sharded(target, CONFIGS["sd1"], 2)
    elif name == "pipeline":
        make_bundled("tiny-random", target, lambda done, total: None)
    elif name == "student":
        unet_surgery.prune("bk_tiny", _template("unet"), target)
    elif name == "pipeline-student":
        unet_surgery.prune("bk_tiny", _template("pipeline"), target)
    return target


def copy(name: str, target: Path) -> Path:
    """Copy a template to ``target`` and return it."""
    shutil.copytree(_template(name), target)
    return target


def unet(change: Build) -> Build:
    """Build ``teacher``, a U-Net folder, and change it."""
    return lambda work: change(copy("unet", work / "teacher"))


def sharded(change: Build) -> Build:
    return lambda work: change(copy("sharded", work / "teacher"))


def pipeline(change: Build) -> Build:
    return lambda work: change(copy("pipeline", work / "teacher"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    data = read_json(path)
    change(data)
    path.write_text(json.dumps(data), "utf-8")
