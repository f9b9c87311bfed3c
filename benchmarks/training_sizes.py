"""Networks to train, in three sizes, made on the device from configs: their weights are random, speed asks for no more.

``tiny`` and ``toy`` are the configs of the built-in teacher and of the toy world; ``sd1`` is Stable Diffusion v1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unet_surgery.checkpoint.bundled import bundled_folder
from unet_surgery.graph import build, parse_config
from unet_surgery.lower import SurgeryPlan, make_plan
from unet_surgery.recipe import load_recipe, select
from unet_surgery.runtime.parts import Parts

TOY_WORLD = Path(__file__).parents[1] / "examples" / "toy_world" / "pipeline"

SD1_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
SD1_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
SD1_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


@dataclass(frozen=True, slots=True)
class Size:
    """Configs of all parts, and the plan that makes the student's of the teacher's."""

    name: str
    plan: SurgeryPlan
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    noise: Mapping[str, Any]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        side = int(self.plan.teacher_config["sample_size"])
        return int(self.vae["latent_channels"]), side, side

    @property
    def pixel_side(self) -> int:
        return self.latent_shape[1] * int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def flops(self) -> int:
        """What the model itself needs for one image: the teacher's forward, the student's forward and backward."""
        return 2 * (self.plan.teacher.macs_all + 3 * self.plan.student.macs_all)


def size_named(name: str, recipe: str) -> Size:
    """Return ``tiny``, ``toy`` or ``sd1``, pruned by a built-in recipe."""
    if name == "sd1":
        unet = _read(bundled_folder("sd-v1-random") / "config.json")
        return Size(name, _plan(unet, recipe), SD1_VAE, SD1_TEXT, SD1_NOISE)
    folder = TOY_WORLD if name == "toy" else bundled_folder("tiny-random")
    unet, vae, text = (_read(folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    return Size(name, _plan(unet, recipe), vae, text, _read(folder / "scheduler" / "scheduler_config.json"))


def _plan(unet: Mapping[str, Any], name: str) -> SurgeryPlan:
    config, recipe = parse_config(dict(unet)), load_recipe(name)
    return make_plan(config, select(recipe, build(config)), recipe=recipe.to_data(), teacher_id="random")


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return value


def make_unets(size: Size, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return student and teacher in fp32; the student has the teacher's weights, as a pruned one has."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        teacher = UNet2DConditionModel.from_config(dict(size.plan.teacher_config))
        student = UNet2DConditionModel.from_config(dict(size.plan.student_config))
    held = teacher.state_dict()
    student.load_state_dict({name: held[source] for name, source in size.plan.weights.items() if source is not None})
    return student.train(), teacher.eval().requires_grad_(False)


def make_parts(size: Size, device: torch.device, *, dtype: torch.dtype, vae_dtype: torch.dtype) -> Parts:
    """Return frozen text encoder and VAE; there is no tokenizer, ids are random."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(), device:
        torch.manual_seed(1)
        text = CLIPTextModel(CLIPTextConfig.from_dict(dict(size.text)))
        vae = AutoencoderKL.from_config(dict(size.vae))
    for model, wanted in ((text, dtype), (vae, vae_dtype)):
        nn.Module.to(model, device=device, dtype=wanted).eval().requires_grad_(False)
    return Parts(None, text, vae, dict(size.noise), Path())


def random_ids(size: Size, count: int) -> torch.Tensor:
    """Return token ids, int64 [count, T], that end as captions do."""
    generator = torch.Generator().manual_seed(2)
    end = int(size.text["eos_token_id"])
    ids_NT = torch.randint(0, end - 1, (count, int(size.text["max_position_embeddings"])), generator=generator)
    ids_NT[:, -1] = end
    return ids_NT


def random_pictures(size: Size, count: int) -> torch.Tensor:
    """Return pixels, float32 [count, 3, H, W] in −1…1."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 3, size.pixel_side, size.pixel_side, generator=generator) * 2 - 1


def random_moments(size: Size, count: int) -> torch.Tensor:
    """Return what a cache holds, float16 [count, 2C, h, w]: means of SD's spread, small deviations."""
    generator = torch.Generator().manual_seed(4)
    mean = torch.randn(count, *size.latent_shape, generator=generator) * 5.0
    return torch.cat([mean, torch.full_like(mean, 0.1)], dim=1).half()
