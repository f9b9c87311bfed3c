"""From pictures to the moments of their latents.

Shapes: B pictures, H × W their size, C latent channels, h × w the latents' size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from unet_surgery.data.sides import check_side
from unet_surgery.runtime.parts import pixels_per_latent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["as_pixels", "check_resolution", "encode_moments", "in_half"]

AT_ONCE = 16


def as_pixels(pictures_BHW3: NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
    """Return uint8 pictures as a VAE takes them: float32 [B, 3, H, W] in −1…1, on the device they are on."""
    values = torch.as_tensor(pictures_BHW3)
    return values.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


def encode_moments(vae: Any, pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """Return mean and standard deviation of the posterior, unscaled, as float32 [B, 2C, h, w] on the VAE's device.

    ``vae`` is an ``AutoencoderKL`` and runs in its own dtype, on 16 pictures at a time (an activation of SD's at 512
    pixels takes 134 MB of each); the exponential is taken in fp32.
    """
    weight = next(vae.parameters())
    moments = []
    with torch.no_grad():
        for part_B3HW in pixels_B3HW.split(AT_ONCE):
            posterior = vae.encode(part_B3HW.to(weight.device, weight.dtype)).latent_dist
            moments.append(torch.cat([posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())], dim=1))
    return torch.cat(moments)


def in_half(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return moments as float16, and which of them [B] are finite there: half precision ends at 65,504."""
    halves = moments.to(torch.float16)
    return halves, torch.isfinite(halves).flatten(1).all(1)


def check_resolution(vae: Any, resolution: int) -> None:
    """Raise UsageError if pictures of this size do not become whole latents."""
    check_side(resolution, pixels_per_latent(vae))
