"""The networks of a bench on a device: loaded from files, or made with random weights by their configs.

Random weights are uniform, scaled by 1/√fan_in, so that activations stay finite: how long a network takes does not
depend on its values.

Shapes: B samples, C latent channels, H × W latents, T tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod, sqrt
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from unet_surgery.evaluate.benchmodels import BenchModel
from unet_surgery.hub import fetch_teacher
from unet_surgery.lower import CONTEXT_TOKENS
from unet_surgery.runtime.inputs import context_width, further_conditions
from unet_surgery.runtime.load import load_unet

__all__ = ["fetched", "forward", "load_network", "random_unet"]

SEED = 0
TIMESTEP = 500


def fetched(model: BenchModel, progress: Callable[[int, int], None]) -> BenchModel:
    """Return ``model`` with its U-Net's weights in its folder: fetched from the Hub, or made, where they were not.

    Raises:
        TeacherError, HubError, OutputError: they cannot be had.
    """
    assert model.found is not None
    found = fetch_teacher(model.found, unet_only=True, full=True, progress=progress)
    return replace(model, found=replace(model.found, folder=found.folder))


def load_network(
    model: BenchModel, device: torch.device, dtype: torch.dtype, *, random: bool, channels_last: bool
) -> Any:
    """Return the U-Net of ``model``, :func:`fetched` if not ``random``: frozen, evaluating, ready on ``device``."""
    if random:
        unet: Any = random_unet(model.config, device, dtype)
    else:
        assert model.found is not None
        unet = torch.nn.Module.to(load_unet(model.found.folder), device=device, dtype=dtype)  # diffusers' own warns
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    return unet.eval().requires_grad_(False)


def random_unet(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Return a U-Net of random weights by its config.json, made on ``device`` and in ``dtype`` at once.

    The global random state is left as it was.
    """
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    unet = torch.nn.Module.to(unet, dtype=dtype).to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(SEED)
    assert not list(unet.buffers())  # of which to_empty would have made noise
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if weight.dim() < 2:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                bound = 1 / sqrt(prod(weight.shape[1:]))
                weight.uniform_(-bound, bound, generator=generator)
    return unet


def forward(
    unet: Any, latent: tuple[int, int], batch: int, *, channels_last: bool = False, eager: bool = False
) -> Callable[[], torch.Tensor]:
    """Return what runs ``unet`` on the same seeded noise each time: the output, [B, C, H, W].

    ``latent`` is (H, W). Inputs lie on the device already. ``eager`` passes by what ``unet.compile()`` has made.
    """
    place = next(unet.parameters())
    here: dict[str, Any] = {"device": place.device, "dtype": place.dtype}
    noise = torch.Generator().manual_seed(SEED)
    config = unet.config
    latents_BCHW = torch.randn(batch, config.in_channels, *latent, generator=noise).to(**here)
    if channels_last:
        latents_BCHW = latents_BCHW.contiguous(memory_format=torch.channels_last)
    text_BTD = torch.randn(batch, CONTEXT_TOKENS, context_width(config), generator=noise).to(**here)
    timestep = torch.tensor(TIMESTEP, device=place.device)
    conditions = further_conditions(unet, batch, **here)
    call = unet.forward if eager else unet

    def run() -> torch.Tensor:
        with torch.no_grad():
            output = call(latents_BCHW, timestep, encoder_hidden_states=text_BTD, return_dict=False, **conditions)[0]
        assert isinstance(output, torch.Tensor)
        return output

    return run
