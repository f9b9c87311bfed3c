"""The student's model card (README.md), written from its plan."""

from __future__ import annotations

from typing import Any

import yaml

from unet_surgery.checkpoint.teacher import LOCAL, is_hub_id
from unet_surgery.lower import SurgeryPlan, quantity

__all__ = ["write_card"]

TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "unet-surgery"]


def write_card(plan: SurgeryPlan, *, pipeline: bool) -> str:
    """Return the card: Hub metadata, what was done, sizes before and after, how to load it, what it lacks."""
    recipe, teacher_id = str(plan.recipe["name"]), plan.teacher_id
    metadata: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": TAGS}
    if is_hub_id(teacher_id):
        metadata |= {"base_model": teacher_id, "base_model_relation": "finetune"}
    front = yaml.safe_dump(metadata, sort_keys=True)
    teacher = "a local model" if teacher_id == LOCAL else f"`{teacher_id}`"
    selectors = "\n".join(f"- `{selector}`" for selector in plan.recipe["remove"])
    rows = "\n".join(_row(*row) for row in _sizes(plan))
    return f"""---
{front}---

# {recipe} of {teacher_id}

A Stable Diffusion U-Net made smaller by removing blocks: {teacher} with the recipe `{recipe}`
of [unet-surgery](https://pypi.org/project/unet-surgery/).

**It is not trained yet.** The weights that remain are the teacher's own, and no layer has learned to do without
what was removed: pictures come out broken until the student is distilled from its teacher.

| | teacher | student | |
|---|---:|---:|---:|
{rows}

MACs are of one U-Net forward at batch 1 and the native latent size; convolutions and linear layers, and with the
attention products.

## What was removed

{selectors}

`recipe.yaml` is the whole recipe, `plan.json` the whole surgery: the config before and after, and where every tensor
comes from.

## Loading

{_loading(pipeline)}
"""


def _sizes(plan: SurgeryPlan) -> list[tuple[str, int, int]]:
    before, after = plan.teacher, plan.student
    return [
        ("parameters", before.params, after.params),
        ("MACs (conv + linear)", before.macs, after.macs),
        ("MACs (all)", before.macs_all, after.macs_all),
    ]


def _row(label: str, before: int, after: int) -> str:
    return f"| {label} | {quantity(before)} | {quantity(after)} | {after / before - 1:+.1%} |"


def _loading(pipeline: bool) -> str:
    if pipeline:
        return """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this/folder")
```"""
    return """```python
from diffusers import DiffusionPipeline, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("this/folder")
pipeline = DiffusionPipeline.from_pretrained("the/teacher", unet=unet)
```"""
