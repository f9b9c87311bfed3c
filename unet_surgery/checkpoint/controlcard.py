"""The card (README.md) of a student's ControlNet: what it is, what was made of what, and what one may do."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import yaml

from unet_surgery.checkpoint.licence import Licence
from unet_surgery.checkpoint.teacher import LOCAL, is_hub_id
from unet_surgery.lower import ControlNetPlan, SurgeryPlan, quantity

__all__ = ["write_control_card"]

TAGS = ["controlnet", "diffusers", "stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "unet-surgery"]
PROJECT = "[unet-surgery](https://pypi.org/project/unet-surgery/)"

_ORIGINS = {
    "student": "the student's own weights",
    "teacher": "the teacher's weights",
    "controlnet": "the weights of the ControlNet that was trained for the teacher",
    "zeros": "zeros",
    "fresh": "random numbers, as torch initialises such layers (seed {seed})",
}
_PARTS = (
    ("down side and embeddings", ("conv_in.", "time_embedding.", "class_embedding.", "add_embedding.", "down_blocks.")),
    ("mid", ("mid_block.",)),
    ("embedding of the picture", ("controlnet_cond_embedding.",)),
    ("zero convolutions", ("controlnet_down_blocks.", "controlnet_mid_block.")),
)


def write_control_card(plan: SurgeryPlan, decided: ControlNetPlan, licence: Licence, version: str, seed: int) -> str:
    """Return the card as Markdown with the Hub's YAML metadata in front; text from files is escaped or has a form."""
    recipe = _word(plan.recipe.get("name"))
    sections = [
        _front(plan, licence),
        f"# ControlNet for {recipe} of {_teacher(plan)}\n\n{_opening(decided)}\n\nMade by {PROJECT} {version}.",
        "## What was made of what\n\n" + _origins(decided, seed),
        "## Loading\n\n" + _LOADING,
        "## Licence\n\n" + _licence(licence),
    ]
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


_LOADING = """```python
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

controlnet = ControlNetModel.from_pretrained("this/model")
pipeline = StableDiffusionControlNetPipeline.from_pretrained("the/student", controlnet=controlnet)
```

For a student of SDXL it is `StableDiffusionXLControlNetPipeline`."""


def _front(plan: SurgeryPlan, licence: Licence) -> str:
    tags = sorted([*TAGS, "stable-diffusion-xl"]) if plan.family == "sdxl" else TAGS
    metadata: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    if is_hub_id(plan.teacher_id):
        metadata |= {"base_model": plan.teacher_id, "base_model_relation": "adapter"}
    if licence.id is not None:
        named = {"license": licence.id, "license_name": licence.name, "license_link": licence.link}
        metadata |= {key: value for key, value in named.items() if value is not None}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True)}---"


def _opening(decided: ControlNetPlan) -> str:
    size = quantity(sum(prod(shape) for _, shape, _, _ in decided.tensors))
    what = f"A stock `ControlNetModel` of {size} parameters for a U-Net that blocks were taken out of."
    if any(tensor.origin == "controlnet" for tensor in decided.tensors):
        return (
            f"{what}\n\n> **To be trained further.** Its weights were trained for the student's teacher. "
            "They are where to begin; what it steers now is another network."
        )
    return (
        f"{what}\n\n> **Not trained yet.** Its zero convolutions are zero, so as it is it adds exactly nothing: train "
        "it on pictures and what is to steer them before you use it."
    )


def _origins(decided: ControlNetPlan, seed: int) -> str:
    lines = ["| part | tensors | made of |", "|---|---:|---|"]
    for label, starts in _PARTS:
        counts: dict[str, int] = {}
        for name, _, origin, _ in decided.tensors:
            if name.startswith(starts):
                counts[origin] = counts.get(origin, 0) + 1
        lines += [f"| {label} | {n} | {_ORIGINS[origin].format(seed=seed)} |" for origin, n in counts.items()]
    if decided.mid_note:
        lines += ["", f"The mid is a new one (`UNetMidBlock2D`): {decided.mid_note}."]
    return "\n".join(lines)


def _licence(licence: Licence) -> str:
    texts = ", ".join(f"[{name}]({name.replace(' ', '%20')})" for name in licence.files)
    if licence.id is None and not texts:
        return "Unknown: what this is made of names none. Add it, here and in the metadata, before you publish."
    name = f", `{licence.id}`" if licence.id else ""
    text = f"This model is a derivative of what it is made of, and stays under its licence{name}"
    return text + (f"; its text is in {texts}." if texts else ".")


def _teacher(plan: SurgeryPlan) -> str:
    return "a local model" if plan.teacher_id == LOCAL else _word(plan.teacher_id)


def _word(text: object) -> str:
    """Return a name for a heading; a plan that was read may hold anything there."""
    return text if isinstance(text, str) and re.fullmatch(r"[\w./-]{1,120}", text) else "an unnamed one"
