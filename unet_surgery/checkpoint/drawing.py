"""What of a generation.json decides its pictures, whoever draws them: two scores are of one protocol where it agrees.

What names a file, a machine or a version is left out, and what a model brings itself: its kind of prediction, its
noise schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["deciding", "sampler_options"]

DECIDING = (
    "width", "height", "drawn_width", "drawn_height", "resize", "jpeg", "steps", "guidance", "negative", "seed",
    "seeding", "stream", "strength", "init", "masks",
)  # fmt: skip

MODELS_OWN = frozenset({
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
})  # fmt: skip
"""A scheduler's options that its model was trained with. All others are the sampler's, those of later versions too."""


def sampler_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a scheduler that are not its model's, sorted.

    None, false and empty ones are left out: it is what a version that lacks an option does.
    """
    return {
        key: options[key]
        for key in sorted(options)
        if key not in MODELS_OWN and not key.startswith("_") and options[key] not in (None, False, "", [])
    }


def deciding(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the pictures of a generation.json: prompts by their hash, or by name where they have none.

    Raises:
        AttributeError, TypeError: prompts or scheduler are no mappings.
    """
    prompts, scheduler = generation.get("prompts") or {}, generation.get("scheduler") or {}
    return {
        "prompts": prompts.get("sha256") or prompts.get("name"),
        "scheduler": scheduler.get("class"),
        "options": sampler_options(scheduler.get("options") or {}),
        **{key: generation.get(key) for key in DECIDING},
    }
