"""What is benched: networks by their configs, with exact parameters and MACs. Without torch, and without weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.check import read_plan, unet_folder
from unet_surgery.checkpoint.student import CONFIG, PLAN
from unet_surgery.errors import UsageError, first_few, printable
from unet_surgery.graph import UNetGraph, build, parse_config
from unet_surgery.hub import ResolvedTeacher, resolve_teacher
from unet_surgery.hub.open import open_resolved
from unet_surgery.lower import Counts, count

__all__ = ["BenchModel", "check_weights", "find_models"]

MAX_LATENT = 4096


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A U-Net by its config.json: ``graph`` at the latent size it is benched at, ``counts`` at that size and batch 1.

    ``found`` is where it came from; None for a plan, which has no weights. ``has_weights`` is False where there are
    none that can be loaded, or made.
    """

    name: str
    text: str
    config: Mapping[str, Any]
    graph: UNetGraph
    counts: Counts
    found: ResolvedTeacher | None
    has_weights: bool

    @property
    def latent(self) -> tuple[int, int]:
        """(height, width) of the latents."""
        return self.graph.latent_size


def find_models(texts: Sequence[str | Path], *, latent: tuple[int, int] | None = None) -> list[BenchModel]:
    """Return the models called ``texts``, with names that no two share; of the Hub, configs alone are fetched.

    A model is a folder (pipeline or U-Net), a built-in name, a Hub id, a single file, or a plan: a plan.json, or a
    folder that has only that. ``latent`` is (height, width), each model's own if None.

    Raises:
        UsageError: there is none, or ``latent`` is no size.
        SurgeryError: one cannot be found, or its config is no U-Net's that is supported.
    """
    if not texts:
        raise UsageError("there is no model to bench", hint="name one or more")
    if latent is not None and not all(1 <= side <= MAX_LATENT for side in latent):
        raise UsageError(
            "this is no size of latents",
            expected=f"sides of 1 to {MAX_LATENT}",
            found=f"{latent[1]}×{latent[0]} (width × height)",
        )
    models: list[BenchModel] = []
    for text in texts:
        model = _find(str(text), latent)
        models.append(replace(model, name=_unused(model.name, [known.name for known in models])))
    return models


def _find(text: str, latent: tuple[int, int] | None) -> BenchModel:
    path = Path(os.path.expanduser(text))
    if path.is_file() and path.suffix == ".json":
        name = os.path.basename(os.path.abspath(path.parent)) if path.name == PLAN else path.stem
        return _model(name, text, read_plan(path).student_config, latent, None, has_weights=False)
    if (path / PLAN).is_file() and not (unet_folder(path) / CONFIG).is_file():
        name = os.path.basename(os.path.abspath(path))
        return _model(name, text, read_plan(path).student_config, latent, None, has_weights=False)
    if not text:
        raise UsageError("the model is empty text", hint="give a folder, a Hub id or a built-in name")
    found = resolve_teacher(text)
    opened = open_resolved(found, config_only=found.file is None and found.hub is not None)
    if found.hub is not None:  # whose weights were not opened; there may be none, or .bin alone
        there = found.remote is not None or found.local is not None
    else:
        there = opened.weights is not None or found.teacher_id is not None
    has_weights = found.file is None and there
    return _model(found.teacher_id or found.name, text, opened.config, latent, found, has_weights=has_weights)


def _model(
    name: str,
    text: str,
    config: Mapping[str, Any],
    latent: tuple[int, int] | None,
    found: ResolvedTeacher | None,
    *,
    has_weights: bool,
) -> BenchModel:
    graph = build(parse_config(config))
    if latent is not None:
        graph = replace(graph, latent_size=latent)
    return BenchModel(name, text, config, graph, count(graph), found, has_weights)


def _unused(name: str, used: Sequence[str]) -> str:
    names = (name if number == 1 else f"{name} ({number})" for number in range(1, len(used) + 2))
    return next(free for free in names if free not in used)


def check_weights(models: Sequence[BenchModel]) -> None:
    """Check that all models have weights, or can get some.

    Raises:
        UsageError: some have not; names them.
    """
    without = [model.text for model in models if not model.has_weights]
    if without:
        raise UsageError(
            "there are no weights that can be loaded",
            where=first_few([printable(text) for text in without]),
            expected="a diffusers folder, a Hub id or a built-in name",
            hint="--random makes random ones by the config: they take as long; --no-run counts only",
        )
