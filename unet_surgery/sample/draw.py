"""Pictures from prompts, by any of the usual samplers; what is drawn depends on seed and prompt index alone.

All noise of a picture, its start and a sampler's own, comes from one CPU generator keyed by (seed, index): the batch
size, the number of processes and a resumption change nothing beyond rounding.

Shapes: B pictures, C latent channels, H × W their latents' sides, T tokens, D text width.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unet_surgery.errors import UsageError, VerificationError
from unet_surgery.runtime.parts import Parts, encode_prompts, pixels_per_latent
from unet_surgery.sample.schedulers import SCHEDULERS, SchedulerKind, make_scheduler
from unet_surgery.sample.start import Source, Start, generators, start_from, start_noise

__all__ = [
    "SCHEDULERS",
    "Sampling",
    "SchedulerKind",
    "check_conditions",
    "check_unet",
    "decode",
    "draw_batch",
    "generators",
    "latent_sides",
    "make_scheduler",
    "sample",
    "start_noise",
]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How pictures are drawn: what ``sample`` says of these arguments; (C, H, W) is the shape of a picture's latents.

    ``scheduler`` is one that :func:`make_scheduler` made, begun anew for each batch; ``uncond_1TD`` is the embedding of
    the negative prompt, None without guidance.
    """

    steps: int
    guidance: float
    scheduler: Any
    shape_CHW: tuple[int, int, int]
    uncond_1TD: torch.Tensor | None


def sample(
    unet: torch.nn.Module,
    parts: Parts,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int = 20,
    guidance: float = 2.0,
    negative: str = "",
    indices: Sequence[int] | None = None,
    scheduler: str | None = None,
    size: int | tuple[int, int] | None = None,
    batch: int = 8,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.uint8]:
    """Draw a picture of each prompt: uint8 [n, height, width, 3].

    ``indices`` are the prompts' numbers in the whole set (0 … n−1 if None), ``scheduler`` a name of
    :data:`SCHEDULERS` (the model's own if None), ``size`` a side or (height, width) in pixels (what the U-Net was
    trained at if None). With ``guidance`` w above 1 the prediction is (1 − w)·negative + w·prompt (Ho and Salimans,
    2207.12598, in diffusers' count), both halves in one batch; else the prompt's alone. ``dtype`` other than the
    U-Net's own runs it under autocast. ``progress`` is called with (pictures done, of how many).

    The U-Net may be in the midst of training: its modules' modes are put back, no graph is kept, and no global random
    state is read or written.

    Raises:
        UsageError: an argument has no sense, or the U-Net is not one of plain text to image.
        VerificationError: a picture's latents or pixels are not finite.
    """
    numbers = list(range(len(prompts))) if indices is None else list(indices)
    config: Any = unet.config
    _check(prompts, numbers, steps, batch)
    check_unet(config, parts)
    height, width = latent_sides(config, parts.vae, size)
    shape_CHW = (parts.vae.config.latent_channels, height, width)
    factor = pixels_per_latent(parts.vae)
    pictures = np.empty((len(prompts), height * factor, width * factor, 3), dtype=np.uint8)
    with torch.no_grad(), _evaluating(unet), _precision(unet, dtype):
        uncond_1TD = encode_prompts(parts, [negative]) if guidance > 1 else None
        how = Sampling(steps, guidance, make_scheduler(parts.scheduler_config, scheduler), shape_CHW, uncond_1TD)
        for start in range(0, len(prompts), batch):
            chosen = slice(start, min(start + batch, len(prompts)))
            pictures[chosen] = draw_batch(
                unet, parts, how, prompts[chosen], numbers[chosen], generators(seed, numbers[chosen])
            )
            if progress is not None:
                progress(chosen.stop, len(prompts))
    return pictures


def draw_batch(
    unet: Any,
    parts: Parts,
    how: Sampling,
    prompts: Sequence[str] | torch.Tensor,
    indices: Sequence[int],
    noise: Sequence[torch.Generator] | torch.Tensor,
    source: Source | None = None,
) -> NDArray[np.uint8]:
    """Draw a picture of each prompt, all at once: uint8 [B, height, width, 3].

    ``prompts`` may be token ids [B, T]. ``noise`` is a generator a picture, or, for schedulers that draw none between
    steps, the start noise itself. The U-Net is in evaluation mode, and no graph is wanted: callers see to both.
    ``indices`` are for messages.

    Raises:
        VerificationError: a picture's latents or pixels are not finite.
    """
    embeds_BTD = encode_prompts(parts, prompts)
    scheduler = how.scheduler
    scheduler.set_timesteps(how.steps)  # on the CPU, where its tables are: no step waits for the device
    if isinstance(noise, torch.Tensor):
        start = Start(noise.float() * scheduler.init_noise_sigma)
    elif source is None:
        start = Start(start_noise(noise, how.shape_CHW) * scheduler.init_noise_sigma)
    else:
        start = start_from(parts.vae, scheduler, how.steps, source, noise, how.shape_CHW)
    draws = None if isinstance(noise, torch.Tensor) else list(noise)
    latents_BCHW = _denoise(unet, scheduler, embeds_BTD, how.uncond_1TD, how.guidance, start, draws)
    _check_finite(latents_BCHW, indices, "latents")
    return decode(parts.vae, latents_BCHW, batch=len(prompts), indices=indices)


def decode(
    vae: Any, latents_BCHW: torch.Tensor, *, batch: int, indices: Sequence[int] | None = None
) -> NDArray[np.uint8]:
    """Decode scaled latents as the U-Net knows them, ``batch`` at a time: uint8 [B, height, width, 3] (numpy).

    Raises:
        VerificationError: a pixel is not finite; fp16 VAEs overflow.
    """
    pictures = []
    for start in range(0, len(latents_BCHW), batch):
        some_BCHW = latents_BCHW[start : start + batch].to(vae.device, vae.dtype) / vae.config.scaling_factor
        with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
            pixels_B3HW = vae.decode(some_BCHW, return_dict=False)[0].float()
        _check_finite(pixels_B3HW, range(start, len(latents_BCHW)) if indices is None else indices[start:], "pixels")
        levels_B3HW = ((pixels_B3HW / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        pictures.append(levels_B3HW.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(pictures)


def _denoise(
    unet: Any,
    scheduler: Any,
    embeds_BTD: torch.Tensor,
    uncond_1TD: torch.Tensor | None,
    guidance: float,
    start: Start,
    noise: list[torch.Generator] | None,
) -> torch.Tensor:
    """Return the denoised latents, fp32 [B, C, H, W]; the sampler works in fp32 whatever the U-Net's dtype."""
    place = next(unet.parameters())
    latents_BCHW = start.latents_BCHW.to(place.device)
    extra_BEHW = None if start.extra_BEHW is None else start.extra_BEHW.to(place.device)
    if uncond_1TD is not None:
        embeds_BTD = torch.cat([uncond_1TD.expand_as(embeds_BTD), embeds_BTD])
    embeds_BTD = embeds_BTD.to(place.device, place.dtype)
    takes_noise = noise is not None and "generator" in inspect.signature(scheduler.step).parameters
    draws = {"generator": noise} if takes_noise else {}
    timesteps = scheduler.timesteps[start.first :]
    for timestep, there in zip(timesteps, timesteps.to(place.device), strict=True):
        input_BCHW = scheduler.scale_model_input(latents_BCHW, timestep)
        if extra_BEHW is not None:
            input_BCHW = torch.cat([input_BCHW, extra_BEHW], dim=1)
        if uncond_1TD is not None:
            input_BCHW = torch.cat([input_BCHW, input_BCHW])
        input_BCHW = input_BCHW.to(place.dtype)
        output_BCHW = unet(input_BCHW, there, encoder_hidden_states=embeds_BTD, return_dict=False)[0].float()
        if uncond_1TD is not None:
            without_BCHW, with_BCHW = output_BCHW.chunk(2)
            output_BCHW = without_BCHW + guidance * (with_BCHW - without_BCHW)
        latents_BCHW = scheduler.step(output_BCHW, timestep, latents_BCHW, return_dict=False, **draws)[0]
    return latents_BCHW


@contextlib.contextmanager
def _evaluating(unet: torch.nn.Module) -> Iterator[None]:
    """Set every module to evaluation, and each back to its own mode: parts of a network in training may be frozen."""
    modes = [(module, module.training) for module in unet.modules()]
    unet.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _precision(unet: torch.nn.Module, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    own = next(unet.parameters())
    if dtype is None or dtype == own.dtype:
        return contextlib.nullcontext()
    if own.dtype != torch.float32:
        raise UsageError("only an fp32 U-Net can be run in another dtype", expected=str(own.dtype), found=str(dtype))
    context: contextlib.AbstractContextManager[Any] = torch.autocast(own.device.type, dtype=dtype)
    return context


def latent_sides(config: Any, vae: Any, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Return height and width of the latents of pictures of ``size``, a side or (height, width) in pixels.

    Raises:
        UsageError: there are none, or ``size`` is None and the U-Net's config does not say what it was trained at.
    """
    factor = pixels_per_latent(vae)
    if size is None:
        if config.sample_size is None:
            raise UsageError("the U-Net's config has no sample_size", hint="give the pictures' size in pixels")
        sides = config.sample_size
        return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])
    height, width = (size, size) if isinstance(size, int) else size
    if height < factor or width < factor or height % factor or width % factor:
        raise UsageError(
            "the VAE has no latents for this size", expected=f"multiples of {factor} pixels", found=f"{width}×{height}"
        )
    return height // factor, width // factor


def check_unet(config: Any, parts: Parts, *, masks: bool = False) -> None:
    """Check that a U-Net of this config can draw with these parts: from text, or with ``masks`` as inpainting ones do.

    Raises:
        UsageError: it cannot.
    """
    channels, width = parts.vae.config.latent_channels, parts.text_encoder.config.hidden_size
    wanted = 2 * channels + 1 if masks else channels
    if not masks and config.in_channels == 2 * channels + 1:
        raise UsageError(
            "this U-Net inpaints: it takes pictures and masks beside text",
            found=f"{config.in_channels} channels in",
            hint="give both: unet-surgery generate … --init FOLDER --masks FOLDER",
        )
    if config.in_channels != wanted or config.cross_attention_dim != width:
        raise UsageError(
            "the U-Net does not fit these parts",
            expected=f"{wanted} channels in, text {width} wide",
            found=f"{config.in_channels}, {config.cross_attention_dim}",
            hint="masks are for inpainting U-Nets; those of other families cannot be sampled here",
        )
    check_conditions(config)


def check_conditions(config: Mapping[str, Any]) -> None:
    """Check by a U-Net's config alone that time and text are all that it is conditioned on.

    Raises:
        UsageError: there is more, as in SDXL's.
    """
    more = [key for key in ("addition_embed_type", "time_cond_proj_dim") if config.get(key) is not None]
    if more:
        raise UsageError(
            "U-Nets with conditions beside time and text cannot be sampled here",
            expected="a U-Net as of SD v1 or v2",
            found=", ".join(f"{key}: {config[key]}" for key in more),
        )


def _check(prompts: Sequence[str], indices: list[int], steps: int, batch: int) -> None:
    if isinstance(prompts, str):
        raise UsageError("prompts are a sequence of texts", found="one text")
    if len(indices) != len(prompts):
        raise UsageError("every prompt needs one index", expected=f"{len(prompts)}", found=f"{len(indices)}")
    for what, value in (("steps", steps), ("batch", batch)):
        if value < 1:
            raise UsageError(f"{what} must be 1 or more", found=str(value))


def _check_finite(tensor: torch.Tensor, indices: Sequence[int], what: str) -> None:
    finite_B = torch.isfinite(tensor).flatten(1).all(dim=1).tolist()
    bad = [str(index) for index, is_finite in zip(indices, finite_B, strict=False) if not is_finite]
    if bad:
        raise VerificationError(
            f"the {what} of {len(bad)} pictures are NaN or Inf",
            found=f"prompt indices {', '.join(bad[:8])}",
            hint="the weights are damaged or training diverged; in fp16, try bf16 or fp32",
        )
