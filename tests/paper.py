"""Pipelines of which only the configs are there: enough for a dry run. Facts of SD v1 and v2, restated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import unet_surgery as us

VAE = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "layers_per_block": 2}
TEXT_V1 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
TEXT_V2 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
FAMILIES = {
    "sd-v1": ("sd-v1-random", TEXT_V1, "epsilon"),
    "sd-v2-base": ("sd-v2-random", TEXT_V2, "epsilon"),
    "sd-v2-768": ("sd-v2-768-random", TEXT_V2, "v_prediction"),
}


def write_paper_pipeline(folder: Path, family: str) -> Path:
    """Write a pipeline without weights; its U-Net is that of a built-in random teacher."""
    teacher, text, prediction = FAMILIES[family]
    parts: Mapping[str, Mapping[str, Any]] = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "unet/config.json": us.plan("bk_base", teacher).teacher_config,
        "vae/config.json": VAE,
        "text_encoder/config.json": text,
        "scheduler/scheduler_config.json": {"prediction_type": prediction},
    }
    for name, content in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def write_paper_student(path: Path, recipe: str, family: str) -> Path:
    """Write the plan of a student that is not made."""
    path.write_text(us.plan(recipe, FAMILIES[family][0]).to_json())
    return path
