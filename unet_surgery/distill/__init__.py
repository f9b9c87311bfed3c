"""Training a student to do what its teacher does.

    from unet_surgery.distill import distill, load_run

    run = load_run("examples/runs/toy_bk_tiny.yaml", ["steps=100"])
    result = distill(run.config, on_progress=print)

Names are loaded when they are first used: a run file can be read and checked without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unet_surgery.distill.config import RunConfig
    from unet_surgery.distill.run import Progress, Result, distill
    from unet_surgery.distill.runfile import RunFile, load_run, to_yaml

_HOMES = {
    "Progress": "unet_surgery.distill.run",
    "Result": "unet_surgery.distill.run",
    "RunConfig": "unet_surgery.distill.config",
    "RunFile": "unet_surgery.distill.runfile",
    "distill": "unet_surgery.distill.run",
    "load_run": "unet_surgery.distill.runfile",
    "to_yaml": "unet_surgery.distill.runfile",
}

__all__ = ["Progress", "Result", "RunConfig", "RunFile", "distill", "load_run", "to_yaml"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
