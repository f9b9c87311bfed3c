"""Where denoising starts: from noise alone, from a picture with noise on it, or from noise beside a masked picture.

All noise of a picture is drawn from its own generator, and in the order in which diffusers' pipelines draw it: for
text alone the start; for image to image the sample of the VAE's posterior, then the start; for inpainting the start,
then the sample of the masked picture's posterior.

Shapes: B pictures, C latent channels, H × W their latents' sides, in pixels Y × X; the U-Net takes E channels beside
the noisy latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unet_surgery.sample.schedulers import strength_steps

__all__ = ["Source", "Start", "generators", "one_stream", "start_from", "start_noise"]

NUM_SEEDS = 1 << 32  # torch's CPU generator looks at 32 bits of its seed


@dataclass(frozen=True, slots=True)
class Source:
    """What pictures are made from beside text: uint8 [B, Y, X, 3], and for inpainting masks, bool [B, Y, X].

    Where a mask is True, the picture is drawn anew. ``strength`` in 0 … 1 is the share of the steps that is taken.
    """

    pictures_BYX3: NDArray[np.uint8]
    strength: float
    masks_BYX: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Noisy latents, fp32 [B, C, H, W] on the CPU; which of the timesteps is the first; what goes beside them."""

    latents_BCHW: torch.Tensor
    first: int = 0
    extra_BEHW: torch.Tensor | None = None


def generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return the CPU generator of each prompt index under ``seed``, fresh: its first draw is the start noise.

    No two indices below 2³² share one under the same seed.
    """
    first = int.from_bytes(hashlib.blake2b(b"sample %d" % seed, digest_size=4).digest(), "big")
    return [torch.Generator().manual_seed((first + index) % NUM_SEEDS) for index in indices]


def start_noise(noise: Sequence[torch.Generator], shape_CHW: Sequence[int]) -> torch.Tensor:
    """Return standard normal noise, one picture from each generator: fp32 [B, C, H, W] on the CPU."""
    return torch.stack([torch.randn(tuple(shape_CHW), generator=generator) for generator in noise])


def one_stream(
    stream: torch.Generator, count: int, shape_CHW: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the start noise of a batch as a pipeline with one generator draws it: [B, C, H, W], in ``dtype``.

    It is drawn at once, on the generator's device: what a picture gets depends on all batches before and on the
    batch's size. Callers that leave a batch to others draw its noise and drop it.
    """
    return torch.randn((count, *shape_CHW), generator=stream, device=stream.device, dtype=dtype)


def start_from(
    vae: Any, scheduler: Any, steps: int, source: Source, noise: Sequence[torch.Generator], shape_CHW: Sequence[int]
) -> Start:
    """Return where to start from pictures. ``scheduler`` has its timesteps set, and is told where it begins.

    Without masks that is image to image (SDEdit, Meng et al., 2108.01073): the picture's latents with the noise of the
    first timestep that is taken. With masks it is what inpainting U-Nets of SD take: beside the noisy latents the mask
    at the latents' size, and the latents of the picture with the masked part grey.

    Raises:
        UsageError: ``strength`` leaves no step.
    """
    first = (steps - strength_steps(steps, source.strength)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    pixels_B3YX = _pixels(source.pictures_BYX3)
    if source.masks_BYX is None:
        latents_BCHW = _encode(vae, pixels_B3YX, noise)
        return Start(_noised(scheduler, latents_BCHW, start_noise(noise, shape_CHW), first), first)
    if source.strength == 1:
        noisy_BCHW = start_noise(noise, shape_CHW) * scheduler.init_noise_sigma
    else:
        latents_BCHW = _encode(vae, pixels_B3YX, noise)
        noisy_BCHW = _noised(scheduler, latents_BCHW, start_noise(noise, shape_CHW), first)
    mask_B1YX = torch.from_numpy(source.masks_BYX).float()[:, None]
    masked_BCHW = _encode(vae, pixels_B3YX * (1 - mask_B1YX), noise)
    mask_B1HW = torch.nn.functional.interpolate(mask_B1YX, size=tuple(shape_CHW[1:]))
    return Start(noisy_BCHW, first, torch.cat([mask_B1HW, masked_BCHW], dim=1))


def _noised(scheduler: Any, latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, first: int) -> torch.Tensor:
    timesteps_B = scheduler.timesteps[first].repeat(len(latents_BCHW))
    noisy_BCHW = scheduler.add_noise(latents_BCHW, noise_BCHW, timesteps_B)
    assert isinstance(noisy_BCHW, torch.Tensor)
    return noisy_BCHW


def _pixels(pictures_BYX3: NDArray[np.uint8]) -> torch.Tensor:
    """Return pictures as a VAE takes them: fp32 [B, 3, Y, X] in −1 … 1."""
    return 2 * (torch.from_numpy(pictures_BYX3).permute(0, 3, 1, 2).float() / 255) - 1


def _encode(vae: Any, pixels_B3YX: torch.Tensor, noise: Sequence[torch.Generator]) -> torch.Tensor:
    """Return scaled samples of the VAE's posterior, each by its own generator: fp32 [B, C, H, W] on the CPU."""
    with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(pixels_B3YX.to(vae.device, vae.dtype)).latent_dist
    mean_BCHW, std_BCHW = posterior.mean.float().cpu(), posterior.std.float().cpu()
    drawn_BCHW = start_noise(noise, mean_BCHW.shape[1:])
    scaled_BCHW = (mean_BCHW + std_BCHW * drawn_BCHW) * vae.config.scaling_factor
    assert isinstance(scaled_BCHW, torch.Tensor)
    return scaled_BCHW
