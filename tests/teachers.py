"""Teachers with random weights: every element different, so that a tensor in the wrong place cannot go unseen."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from unet_surgery.graph import build, parse_config
from unet_surgery.lower import shapes_of

WEIGHTS = "diffusion_pytorch_model.safetensors"


def random_tensors(config: Mapping[str, Any], seed: int = 0, dtype: str = "<f4") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes_of(build(parse_config(config))).items():
        fan_in = int(np.prod(shape[1:])) or 1
        values = rng.standard_normal(shape).astype(dtype) / np.sqrt(fan_in if len(shape) > 1 else 16)
        if len(shape) == 1 and name.endswith("weight"):
            values += 1
        tensors[name] = values.astype(dtype)
    return tensors


def write_unet(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> Path:
    """Write a U-Net folder the way diffusers does, by safetensors' own writer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    save_file(dict(tensors or random_tensors(config)), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def write_sharded(folder: Path, config: Mapping[str, Any], num_shards: int, variant: str | None = None) -> Path:
    """Write a U-Net folder in shards with an index, tensors dealt round robin so that neighbours are apart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    tensors = random_tensors(config)
    weight_map = {}
    tag = f".{variant}" if variant else ""
    for k in range(num_shards):
        name = f"diffusion_pytorch_model{tag}-{k + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {n: t for i, (n, t) in enumerate(sorted(tensors.items())) if i % num_shards == k}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / f"diffusion_pytorch_model.safetensors.index{tag}.json").write_text(json.dumps(index))
    return folder


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return relative path → content of every file below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def entries(folder: Path) -> list[str]:
    """Return the names in a folder, hidden ones included."""
    return sorted(os.listdir(folder))
