"""The parts beside the U-Net that whole pictures take, for a bench: a pipeline's own, or random ones by their configs.

Configs are read, and checked against the U-Net, before anything large is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from transformers import CLIPTextConfig, CLIPTextModel

from unet_surgery.checkpoint.components import INDEX
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.errors import UsageError, VerificationError, printable
from unet_surgery.evaluate.benchmodels import BenchModel
from unet_surgery.graph.config import DEFAULTS
from unet_surgery.hub import ResolvedTeacher, fetch_teacher, resolve_teacher
from unet_surgery.runtime.parts import SCHEDULER_CONFIG, Parts, load_parts
from unet_surgery.sample.draw import check_unet

__all__ = ["PartConfigs", "fetched_parts", "find_parts", "load_all_parts"]

# The parts of SD v1 and v2, for a U-Net alone: facts of their configs. The text encoder goes by its width.
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
TEXT_ENCODERS = {
    768: {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "quick_gelu"},
    1024: {"num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096, "hidden_act": "gelu"},
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True, slots=True)
class PartConfigs:
    """A pipeline's parts by their configs; ``found`` is the pipeline, None where they stand in for missing ones."""

    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    found: ResolvedTeacher | None


def find_parts(model: BenchModel, base: str | None, *, random: bool) -> PartConfigs:
    """Return the parts that ``model`` draws with: of ``base`` if given, else its own; stand-ins only if ``random``.

    Raises:
        UsageError: there are none, or the U-Net cannot draw with them.
        TeacherError, HubError: ``base`` cannot be had, or a config cannot be read.
    """
    found = model.found if base is None else resolve_teacher(base)
    configs = None if found is None or found.file is not None else _configs_of(found)
    if configs is None and base is None and random:
        configs = _stand_ins(model)
    if configs is None:
        raise UsageError(
            "whole pictures take a VAE and a text encoder as well",
            where=printable(base or model.text),
            expected=f"a pipeline's folder, with {INDEX}",
            hint="name a pipeline that brings them (--base PIPELINE), or leave --steps out",
        )
    _check_fit(model, configs)
    return configs


def fetched_parts(configs: PartConfigs, progress: Callable[[int, int], None]) -> PartConfigs:
    """Return ``configs`` of a pipeline whose parts' weights are in its folder: fetched, or made, where they were not.

    Raises:
        TeacherError, HubError, OutputError: they cannot be had.
    """
    if configs.found is None:
        return configs
    found = fetch_teacher(configs.found, parts_only=True, progress=progress)
    return replace(configs, found=replace(configs.found, folder=found.folder))


def load_all_parts(configs: PartConfigs, device: torch.device, dtype: torch.dtype, *, random: bool) -> Parts:
    """Load the parts, :func:`fetched_parts`, or make them with ``random`` weights, on ``device``: without a tokenizer.

    Raises:
        VerificationError: they are not whole.
    """
    if not random and configs.found is not None:
        return load_parts(configs.found.folder, device=device, dtype=dtype)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        try:
            vae: Any = AutoencoderKL.from_config(dict(configs.vae))
            text_encoder: Any = CLIPTextModel(CLIPTextConfig(**configs.text_encoder))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise VerificationError("the parts cannot be made by their configs", found=printable(str(error))) from error
    for part in (vae, text_encoder):
        torch.nn.Module.to(part, dtype=dtype).eval().requires_grad_(False)
    return Parts(None, text_encoder, vae, dict(configs.scheduler), Path())


def _configs_of(found: ResolvedTeacher) -> PartConfigs | None:
    if found.hub is not None:
        found.hub.part_configs()
    folder = found.folder
    if not (folder / INDEX).is_file():
        return None
    if (folder / "text_encoder_2").is_dir() or "text_encoder_2" in read_object(folder / INDEX):
        raise UsageError(
            "pipelines with two text encoders cannot draw here",
            where=found.teacher_id or found.name,
            hint="leave --steps out: the U-Net alone can be timed",
        )
    vae, text = (read_object(folder / part / "config.json") for part in ("vae", "text_encoder"))
    return PartConfigs(vae, text, read_object(folder / "scheduler" / SCHEDULER_CONFIG), found)


def _stand_ins(model: BenchModel) -> PartConfigs | None:
    width = model.config.get("cross_attention_dim")
    text = TEXT_ENCODERS.get(width) if isinstance(width, int) else None
    return None if text is None else PartConfigs(VAE, {"hidden_size": width, **text}, SCHEDULER, None)


def _check_fit(model: BenchModel, configs: PartConfigs) -> None:
    """Check by the configs what :func:`unet_surgery.sample.draw.check_unet` checks of networks."""
    vae = SimpleNamespace(latent_channels=configs.vae.get("latent_channels", 4))
    text = SimpleNamespace(hidden_size=configs.text_encoder.get("hidden_size"))
    parts: Any = SimpleNamespace(vae=SimpleNamespace(config=vae), text_encoder=SimpleNamespace(config=text))
    try:
        check_unet(FrozenDict({**DEFAULTS, **model.config}), parts)
    except UsageError as error:
        raise error.at(printable(model.text)) from None
