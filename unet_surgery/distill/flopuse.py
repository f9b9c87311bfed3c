"""Model FLOP use while a run goes: what share of the device's peak its own mathematics reaches."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from unet_surgery.checkpoint.check import unet_folder
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.student import CONFIG
from unet_surgery.distill.config import RunConfig
from unet_surgery.distill.costs import peak_flops, stage_flops
from unet_surgery.distill.networks import Folders
from unet_surgery.distill.setup import Base
from unet_surgery.distill.world import World
from unet_surgery.errors import SurgeryError

__all__ = ["FlopUse", "flop_use", "peak_of"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FlopUse:
    """Model FLOPs of a sample, and the peak of all devices together in FLOP/s; either may be unknown."""

    flops: int | None = None
    peak: float | None = None

    def share(self, images_per_second: float) -> float | None:
        """Return the share of the peak; what is recomputed to save memory does not count. None: not known."""
        if self.flops is None or self.peak is None:
            return None
        return images_per_second * self.flops / self.peak


def peak_of(config: RunConfig, device: torch.device) -> float | None:
    """Return the device's peak in FLOP/s: what the run file says, else the datasheet's; None if neither is known."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), config.speed.dtype)


def flop_use(config: RunConfig, number: int, folders: Folders, base: Base, world: World) -> FlopUse:
    """Return what to measure stage ``number`` by. Networks that cannot be counted do not stop a run."""
    peak = peak_of(config, world.device)
    teacher, stage = folders.teachers[number], config.stages[number]
    try:
        counted = stage_flops(
            config,
            stage,
            student=read_object(unet_folder(folders.student) / CONFIG),
            teacher=None if teacher is None else read_object(unet_folder(teacher) / CONFIG),
            latent_size=base.latent_shape[1:],
            vae=dict(base.parts.vae.config),
            text_encoder=base.parts.text_encoder.config.to_dict(),
            online=base.samples.latents == "pixels",
        )
    except SurgeryError as error:
        log.warning("the share of the peak is not measured: %s", error.what)
        return FlopUse(None, peak)
    return FlopUse(counted.model, None if peak is None else peak * world.size)
