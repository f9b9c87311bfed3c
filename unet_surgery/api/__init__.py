"""The verbs, without torch: thin compositions of the packages below."""

from unet_surgery.api.adapters import ControlNetResult, TransplantResult, controlnet, transplant
from unet_surgery.api.surgery import (
    ModelReport,
    PruneResult,
    check,
    copy_recipe,
    inspect_model,
    no_progress,
    plan,
    plan_families,
    plan_whole,
    prune,
)
from unet_surgery.checkpoint.ldm.export import ExportResult, export
from unet_surgery.hub.push import PushResult, push

__all__ = [
    "ControlNetResult",
    "ExportResult",
    "ModelReport",
    "PruneResult",
    "PushResult",
    "TransplantResult",
    "check",
    "controlnet",
    "copy_recipe",
    "export",
    "inspect_model",
    "no_progress",
    "plan",
    "plan_families",
    "plan_whole",
    "prune",
    "push",
    "transplant",
]
