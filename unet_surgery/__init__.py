"""unet-surgery: make Stable Diffusion U-Nets smaller by taking blocks out, declaratively.

    import unet_surgery as us

    plan = us.plan("bk_tiny", "tiny-random")     # decide; nothing is written
    result = us.prune("bk_tiny", "tiny-random")  # write the student
    us.check(result.folder, "tiny-random")       # every byte is the teacher's
    us.verify(result.folder)                     # diffusers loads and runs it (needs torch)
    us.push(result.folder, "me/small")           # to the Hugging Face Hub

Names are loaded when they are first used, so importing this package costs nothing and never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unet_surgery.version import __version__

if TYPE_CHECKING:
    from unet_surgery.api import (
        ControlNetResult,
        ExportResult,
        ModelReport,
        PruneResult,
        PushResult,
        TransplantResult,
        check,
        controlnet,
        export,
        inspect_model,
        plan,
        prune,
        push,
        transplant,
    )
    from unet_surgery.app.demo import Demo, demo
    from unet_surgery.checkpoint.check import CheckReport
    from unet_surgery.checkpoint.scorecard import add_scores
    from unet_surgery.data.cache import CacheResult, make_cache
    from unet_surgery.data.get import DataResult, get_data
    from unet_surgery.data.latents import LatentCache
    from unet_surgery.errors import SurgeryError
    from unet_surgery.evaluate.bench import bench
    from unet_surgery.evaluate.benchresult import BenchReport
    from unet_surgery.evaluate.generate import GenerateResult, generate
    from unet_surgery.evaluate.metrics import ScoreReport
    from unet_surgery.evaluate.reference import make_statistics
    from unet_surgery.evaluate.score import score
    from unet_surgery.lower import SurgeryPlan
    from unet_surgery.picture import draw
    from unet_surgery.recipe import Recipe, load_recipe
    from unet_surgery.results.report import ReportResult, report
    from unet_surgery.runtime import ConvertResult, VerifyReport, convert, load_unet, verify

_HOMES = {
    "BenchReport": "unet_surgery.evaluate.benchresult",
    "CacheResult": "unet_surgery.data.cache",
    "CheckReport": "unet_surgery.checkpoint.check",
    "ExportResult": "unet_surgery.api",
    "ControlNetResult": "unet_surgery.api",
    "ConvertResult": "unet_surgery.runtime",
    "DataResult": "unet_surgery.data.get",
    "Demo": "unet_surgery.app.demo",
    "GenerateResult": "unet_surgery.evaluate.generate",
    "LatentCache": "unet_surgery.data.latents",
    "ModelReport": "unet_surgery.api",
    "PruneResult": "unet_surgery.api",
    "PushResult": "unet_surgery.api",
    "Recipe": "unet_surgery.recipe",
    "ReportResult": "unet_surgery.results.report",
    "ScoreReport": "unet_surgery.evaluate.metrics",
    "SurgeryError": "unet_surgery.errors",
    "SurgeryPlan": "unet_surgery.lower",
    "TransplantResult": "unet_surgery.api",
    "VerifyReport": "unet_surgery.runtime",
    "add_scores": "unet_surgery.checkpoint.scorecard",
    "bench": "unet_surgery.evaluate.bench",
    "check": "unet_surgery.api",
    "controlnet": "unet_surgery.api",
    "convert": "unet_surgery.runtime",
    "demo": "unet_surgery.app.demo",
    "draw": "unet_surgery.picture",
    "export": "unet_surgery.api",
    "generate": "unet_surgery.evaluate.generate",
    "get_data": "unet_surgery.data.get",
    "inspect_model": "unet_surgery.api",
    "load_recipe": "unet_surgery.recipe",
    "load_unet": "unet_surgery.runtime",
    "make_cache": "unet_surgery.data.cache",
    "make_statistics": "unet_surgery.evaluate.reference",
    "plan": "unet_surgery.api",
    "prune": "unet_surgery.api",
    "push": "unet_surgery.api",
    "report": "unet_surgery.results.report",
    "score": "unet_surgery.evaluate.score",
    "transplant": "unet_surgery.api",
    "verify": "unet_surgery.runtime",
}

__all__ = [
    "BenchReport",
    "CacheResult",
    "CheckReport",
    "ControlNetResult",
    "ConvertResult",
    "DataResult",
    "Demo",
    "ExportResult",
    "GenerateResult",
    "LatentCache",
    "ModelReport",
    "PruneResult",
    "PushResult",
    "Recipe",
    "ReportResult",
    "ScoreReport",
    "SurgeryError",
    "SurgeryPlan",
    "TransplantResult",
    "VerifyReport",
    "__version__",
    "add_scores",
    "bench",
    "check",
    "controlnet",
    "convert",
    "demo",
    "draw",
    "export",
    "generate",
    "get_data",
    "inspect_model",
    "load_recipe",
    "load_unet",
    "make_cache",
    "make_statistics",
    "plan",
    "prune",
    "push",
    "report",
    "score",
    "transplant",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
