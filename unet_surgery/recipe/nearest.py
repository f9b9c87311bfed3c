"""The nearest built-in recipe: what an error offers instead of a recipe that does not fit."""

from __future__ import annotations

from collections.abc import Collection, Set

from unet_surgery.errors import SurgeryError
from unet_surgery.graph import Selection, UNetGraph, family_of
from unet_surgery.lower import modules
from unet_surgery.recipe.load import builtin_names, load_recipe, select
from unet_surgery.recipe.schema import Recipe

__all__ = ["nearest_for_family", "nearest_for_selection"]


def nearest_for_family(recipe: Recipe, family: str | None) -> str | None:
    """Return the built-in recipe for ``family`` that shares most selectors with ``recipe`` (Jaccard index)."""
    wanted = set(recipe.remove)
    scores = {r.name: _overlap(wanted, set(r.remove)) for r in _builtins() if family in (r.families or ())}
    return max(scores, key=lambda name: scores[name], default=None)


def nearest_for_selection(graph: UNetGraph, selection: Selection) -> str | None:
    """Return the built-in recipe for ``graph`` whose removals overlap most with ``selection``, by modules."""
    wanted = _removed_modules(graph, selection.nodes)
    scores = {}
    for recipe in _builtins():
        if family_of(graph) not in (recipe.families or ()):
            continue
        try:
            scores[recipe.name] = _overlap(wanted, _removed_modules(graph, select(recipe, graph).nodes))
        except SurgeryError:
            continue
    return max(scores, key=lambda name: scores[name], default=None)


def _builtins() -> list[Recipe]:
    return [load_recipe(name) for name in builtin_names()]


def _removed_modules(graph: UNetGraph, nodes: Collection[str]) -> set[str]:
    prefixes = tuple(f"{node}." for node in nodes)
    return {placed.path for placed in modules(graph) if placed.path.startswith(prefixes)}


def _overlap(a: Set[str], b: Set[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0
