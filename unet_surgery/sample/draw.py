"""Pictures from prompts, by any of the usual samplers; what is drawn depends on seed and prompt index alone.

All noise of a picture, its start and a sampler's own, comes from one CPU generator keyed by (seed, index): the batch
size, the number of processes and a resumption change nothing beyond rounding.

Shapes: B pictures, C latent channels, H × W their latents' sides, T tokens, D text width.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unet_surgery.errors import UsageError, VerificationError, printable
from unet_surgery.runtime.parts import Parts, encode_prompts, pixels_per_latent

__all__ = ["SCHEDULERS", "SchedulerKind", "decode", "generators", "make_scheduler", "sample", "start_noise"]

NUM_SEEDS = 1 << 32  # torch's CPU generator looks at 32 bits of its seed


@dataclass(frozen=True, slots=True)
class SchedulerKind:
    """A sampler: the name of its class in diffusers, and what it sets beside the model's own scheduler_config.json."""

    class_name: str
    options: Mapping[str, Any]


SCHEDULERS: dict[str, SchedulerKind] = {
    "ddim": SchedulerKind("DDIMScheduler", {}),
    # The timesteps of a student whose steps were distilled, from the last one down to the clean end.
    "ddim-trailing": SchedulerKind("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
    "ddpm": SchedulerKind("DDPMScheduler", {}),
    "dpmsolver++": SchedulerKind("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "euler": SchedulerKind("EulerDiscreteScheduler", {}),
    "euler-a": SchedulerKind("EulerAncestralDiscreteScheduler", {}),
    "heun": SchedulerKind("HeunDiscreteScheduler", {}),
    "lcm": SchedulerKind("LCMScheduler", {}),
    "pndm": SchedulerKind("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": SchedulerKind("UniPCMultistepScheduler", {}),
}

AS_PIPELINES_DO = {"clip_sample": False, "steps_offset": 1}
"""What StableDiffusionPipeline corrects in every scheduler it is given: latents do not lie in −1 … 1."""


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
    _check(config, parts, prompts, numbers, steps, batch)
    height, width = _latent_sides(config, parts.vae, size)
    shape_CHW = (parts.vae.config.latent_channels, height, width)
    factor = pixels_per_latent(parts.vae)
    pictures = np.empty((len(prompts), height * factor, width * factor, 3), dtype=np.uint8)
    with torch.no_grad(), _evaluating(unet), _precision(unet, dtype):
        uncond_1TD = encode_prompts(parts, [negative]) if guidance > 1 else None
        for start in range(0, len(prompts), batch):
            chosen = slice(start, min(start + batch, len(prompts)))
            embeds_BTD = encode_prompts(parts, prompts[chosen])
            kind = make_scheduler(parts.scheduler_config, scheduler)
            noise = generators(seed, numbers[chosen])
            latents_BCHW = _denoise(unet, kind, embeds_BTD, uncond_1TD, guidance, steps, noise, shape_CHW)
            _check_finite(latents_BCHW, numbers[chosen], "latents")
            pictures[chosen] = decode(parts.vae, latents_BCHW, batch=batch, indices=numbers[chosen])
            if progress is not None:
                progress(chosen.stop, len(prompts))
    return pictures


def generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return the CPU generator of each prompt index under ``seed``, fresh: its first draw is the start noise.

    No two indices below 2³² share one under the same seed.
    """
    first = int.from_bytes(hashlib.blake2b(b"sample %d" % seed, digest_size=4).digest(), "big")
    return [torch.Generator().manual_seed((first + index) % NUM_SEEDS) for index in indices]


def start_noise(noise: Sequence[torch.Generator], shape_CHW: Sequence[int]) -> torch.Tensor:
    """Return standard normal noise, one picture from each generator: fp32 [B, C, H, W] on the CPU."""
    return torch.stack([torch.randn(tuple(shape_CHW), generator=generator) for generator in noise])


def make_scheduler(config: Mapping[str, Any], name: str | None) -> Any:
    """Return a fresh diffusers scheduler by its name in :data:`SCHEDULERS`, or the one that ``config`` names.

    Raises:
        UsageError: there is none of that name.
    """
    import diffusers

    if name is not None and name not in SCHEDULERS:
        close = difflib.get_close_matches(name, SCHEDULERS, n=1)
        raise UsageError(
            f"there is no scheduler {printable(name)}",
            expected=", ".join(SCHEDULERS),
            hint=f"did you mean {close[0]}?" if close else None,
        )
    own = str(config.get("_class_name", ""))
    chosen = SchedulerKind(own, {}) if name is None else SCHEDULERS[name]
    kind = getattr(diffusers, chosen.class_name, None) if chosen.class_name.endswith("Scheduler") else None
    if kind is None or not issubclass(kind, diffusers.SchedulerMixin):
        raise UsageError(
            "diffusers has no scheduler of the class that the model names",
            found=printable(own),
            hint=f"choose one of {', '.join(SCHEDULERS)}",
        )
    made = kind.from_config(dict(config), **chosen.options)
    return kind.from_config(made.config, **{key: value for key, value in AS_PIPELINES_DO.items() if key in made.config})


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
    steps: int,
    noise: list[torch.Generator],
    shape_CHW: tuple[int, int, int],
) -> torch.Tensor:
    """Return the denoised latents, fp32 [B, C, H, W]; the sampler works in fp32 whatever the U-Net's dtype."""
    place = next(unet.parameters())
    scheduler.set_timesteps(steps, device=place.device)
    latents_BCHW = start_noise(noise, shape_CHW).to(place.device) * scheduler.init_noise_sigma
    if uncond_1TD is not None:
        embeds_BTD = torch.cat([uncond_1TD.expand_as(embeds_BTD), embeds_BTD])
    embeds_BTD = embeds_BTD.to(place.device, place.dtype)
    draws = {"generator": noise} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        input_BCHW = latents_BCHW if uncond_1TD is None else torch.cat([latents_BCHW, latents_BCHW])
        input_BCHW = scheduler.scale_model_input(input_BCHW, timestep).to(place.dtype)
        output_BCHW = unet(input_BCHW, timestep, encoder_hidden_states=embeds_BTD, return_dict=False)[0].float()
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


def _latent_sides(config: Any, vae: Any, size: int | tuple[int, int] | None) -> tuple[int, int]:
    factor = pixels_per_latent(vae)
    if size is None:
        if config.sample_size is None:
            raise UsageError("the U-Net's config has no sample_size", hint="give the pictures' size in pixels")
        sides = config.sample_size
        return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])
    height, width = (size, size) if isinstance(size, int) else size
    if height < factor or width < factor or height % factor or width % factor:
        raise UsageError(
            "the VAE has no latents for this size", expected=f"multiples of {factor} pixels", found=f"{height}×{width}"
        )
    return height // factor, width // factor


def _check(config: Any, parts: Parts, prompts: Sequence[str], indices: list[int], steps: int, batch: int) -> None:
    if isinstance(prompts, str):
        raise UsageError("prompts are a sequence of texts", found="one text")
    if len(indices) != len(prompts):
        raise UsageError("every prompt needs one index", expected=f"{len(prompts)}", found=f"{len(indices)}")
    for what, value in (("steps", steps), ("batch", batch)):
        if value < 1:
            raise UsageError(f"{what} must be 1 or more", found=str(value))
    channels, width = parts.vae.config.latent_channels, parts.text_encoder.config.hidden_size
    if config.in_channels != channels or config.cross_attention_dim != width:
        raise UsageError(
            "the U-Net does not fit these parts",
            expected=f"{channels} latent channels in, text {width} wide",
            found=f"{config.in_channels}, {config.cross_attention_dim}",
            hint="inpainting U-Nets and those of other families cannot be sampled here",
        )
    if config.time_cond_proj_dim is not None or config.addition_embed_type is not None:
        raise UsageError("U-Nets with conditions beside time and text cannot be sampled here")


def _check_finite(tensor: torch.Tensor, indices: Sequence[int], what: str) -> None:
    finite_B = torch.isfinite(tensor).flatten(1).all(dim=1).tolist()
    bad = [str(index) for index, is_finite in zip(indices, finite_B, strict=False) if not is_finite]
    if bad:
        raise VerificationError(
            f"the {what} of {len(bad)} pictures are NaN or Inf",
            found=f"prompt indices {', '.join(bad[:8])}",
            hint="the weights are damaged or training diverged; in fp16, try bf16 or fp32",
        )
