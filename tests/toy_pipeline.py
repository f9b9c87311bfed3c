"""A stand-in for the toy teacher: the pipeline of ``examples/toy_world`` with random weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[1]
TOY_WORLD = ROOT / "examples" / "toy_world"
PIPELINE = TOY_WORLD / "pipeline"
SMALL = (16, 16, 32, 32)


def write_parts(out: Path, *, seed: int = 0) -> Path:
    """Write what train_parts.py writes, untrained: VAE, text encoder, tokenizer, scheduler, and a gate not passed."""
    torch.manual_seed(seed)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(PIPELINE / name, out / name)
    vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(str(PIPELINE / "vae")))
    vae.save_pretrained(str(out / "vae"))
    config = json.loads((PIPELINE / "text_encoder" / "config.json").read_text())
    (out / "text_encoder").mkdir()
    (out / "text_encoder" / "config.json").write_text(json.dumps(config))
    tensors = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor.contiguous()
        for name, tensor in CLIPTextModel(CLIPTextConfig(**config)).state_dict().items()
        if not name.endswith("position_ids")
    }
    save_file(tensors, out / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    (out / "gate.json").write_text('{"passed": false}\n')
    return out


def write_configs(out: Path, widths: Sequence[int] = SMALL) -> Path:
    """Write model_index.json and the config of a U-Net of ``widths``."""
    (out / "unet").mkdir(parents=True)
    shutil.copy(PIPELINE / "model_index.json", out)
    config = json.loads((PIPELINE / "unet" / "config.json").read_text())
    config |= {"block_out_channels": list(widths), "norm_num_groups": 4}
    (out / "unet" / "config.json").write_text(json.dumps(config))
    return out


def write_unet_weights(pipeline: Path, *, seed: int = 0) -> Path:
    """Give a pipeline's U-Net random weights."""
    torch.manual_seed(seed)
    unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(pipeline / "unet")))
    unet.save_pretrained(str(pipeline / "unet"))
    return pipeline


def write_pipeline(out: Path, scratch: Path, widths: Sequence[int] = SMALL) -> Path:
    """Write a whole pipeline with random weights; ``scratch`` is a folder for what it is made of."""
    sys.path.insert(0, str(TOY_WORLD))
    try:
        from assemble import assemble
    finally:
        sys.path.remove(str(TOY_WORLD))
    assemble(write_parts(scratch / "parts"), out, write_configs(scratch / "configs", widths))
    return write_unet_weights(out)
