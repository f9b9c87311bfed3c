"""The samplers that latents of a text-to-image U-Net are denoised by: diffusers' schedulers, by short or class name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unet_surgery.errors import MissingExtraError, UsageError, printable

__all__ = [
    "SAMPLERS",
    "SCHEDULERS",
    "SchedulerKind",
    "check_scheduler_name",
    "check_steps",
    "draws_noise",
    "make_scheduler",
    "strength_steps",
]


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
"""Short names."""

SAMPLERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""diffusers' classes that denoise latents of such U-Nets, all of whose noise comes from generators that they are given.

The others are of flows, tokens or other conditionings, or of :data:`OWN_NOISE`.
"""

OWN_NOISE = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")
"""Those whose noise is torchsde's, drawn batch by batch."""

NOISY = (
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
)
"""Those that add noise between steps."""

AS_PIPELINES_DO = {"clip_sample": False, "steps_offset": 1}
"""What StableDiffusionPipeline corrects in every scheduler it is given: latents do not lie in −1 … 1."""


def check_scheduler_name(name: str) -> None:
    """Check that ``name`` is a key of :data:`SCHEDULERS` or one of :data:`SAMPLERS`; needs no library.

    Raises:
        UsageError: it is neither (offers the nearest), or one of :data:`OWN_NOISE`.
    """
    if name in SCHEDULERS or name in SAMPLERS:
        return
    if name in OWN_NOISE or f"{name}Scheduler" in OWN_NOISE:
        raise UsageError(
            f"{name} draws noise of its own, a batch at a time: a picture would depend on those drawn beside it",
            hint="dpmsolver++ is its solver without that noise",
        )
    names = (*SCHEDULERS, *SAMPLERS)
    begins = [known for known in names if known.lower().startswith(name.lower())] if name else []
    close = sorted(begins, key=len) or difflib.get_close_matches(name, names, n=1)
    raise UsageError(
        f"there is no scheduler {printable(name)}",
        expected=f"{', '.join(SCHEDULERS)}, or a class of diffusers that denoises latents, such as {SAMPLERS[4]}",
        hint=f"did you mean {close[0]}?" if close else None,
    )


def check_steps(scheduler: Any, steps: int) -> None:
    """Check that a scheduler, which this changes, takes so many steps: some 50 at most, some what they trained with.

    Raises:
        UsageError: it does not.
    """
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError) as error:
        raise UsageError(
            "the scheduler does not take this number of steps",
            where=type(scheduler).__name__,
            found=f"{steps}: {printable(str(error))}",
            hint="choose another number of --steps, or another --scheduler",
        ) from error


def strength_steps(steps: int, strength: float) -> int:
    """Return how many of ``steps`` are taken from a picture, as diffusers counts: the whole part of steps · strength.

    Raises:
        UsageError: it is none.
    """
    if not 0 <= strength <= 1:
        raise UsageError("strength is a share of the steps", expected="0 … 1", found=str(strength))
    taken = min(int(steps * strength), steps)
    if taken < 1:
        raise UsageError("no step is left", expected="steps × strength of 1 or more", found=f"{steps} × {strength:g}")
    return taken


def make_scheduler(config: Mapping[str, Any], name: str | None) -> Any:
    """Return a fresh diffusers scheduler by its short or class name, or the one that ``config`` names.

    Raises:
        UsageError: there is none of that name, or it is no sampler of latents.
        MissingExtraError: it needs a library that is not installed.
    """
    import diffusers

    if name is not None:
        check_scheduler_name(name)
    own = str(config.get("_class_name", ""))
    chosen = SCHEDULERS.get(own if name is None else name) or SchedulerKind(name or own, {})
    kind = getattr(diffusers, chosen.class_name, None) if chosen.class_name in SAMPLERS else None
    if kind is None:
        raise UsageError(
            "diffusers has no such scheduler"
            if name
            else "diffusers has no scheduler of the class that the model names",
            found=printable(chosen.class_name),
            hint=f"choose one of {', '.join(SCHEDULERS)}",
        )
    try:
        made = kind.from_config(dict(config), **chosen.options)
    except ImportError as error:  # LMS needs scipy
        raise MissingExtraError(
            f"the scheduler {chosen.class_name} needs a library", found=printable(str(error).strip())
        ) from error
    return kind.from_config(made.config, **{key: value for key, value in AS_PIPELINES_DO.items() if key in made.config})


def draws_noise(scheduler: Any) -> bool:
    """Tell whether a scheduler adds noise between steps, so that it draws more than a picture's start."""
    return type(scheduler).__name__ in NOISY or "sde" in str(scheduler.config.get("algorithm_type", ""))
