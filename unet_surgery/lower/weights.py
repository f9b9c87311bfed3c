"""The weight map: where each tensor of the student comes from, by node identity, never by shape.

Equal shapes prove nothing: in ``up.0`` and ``up.3`` of SD 1 the wrong teacher layer fits silently.
"""

from __future__ import annotations

from collections.abc import Mapping

from unet_surgery.graph.nodes import UNetGraph
from unet_surgery.graph.select import Selection
from unet_surgery.lower.modules import modules

__all__ = ["Shape", "replaced_tensor", "shapes_of", "unused_tensors", "weight_map"]

Shape = tuple[int, ...]


def shapes_of(graph: UNetGraph) -> dict[str, Shape]:
    """Return name → shape of every tensor of ``graph``, in its own numbering."""
    return {placed.path + t.name: t.shape for placed in modules(graph) for t in placed.module.tensors}


def weight_map(student: UNetGraph) -> dict[str, str | None]:
    """Return student tensor → teacher tensor; None where the student's tensor is all zeros."""
    return {
        placed.path + t.name: None if placed.zeroed else placed.source + t.name
        for placed in modules(student)
        for t in placed.module.tensors
    }


def replaced_tensor(weights: Mapping[str, str | None], name: str) -> str:
    """Return the teacher tensor whose place the zeros called ``name`` take: the ``proj_out`` of the same attention."""
    attention, _, leaf = name.rpartition("proj_out.")
    sibling = weights[f"{attention}proj_in.weight"]
    assert sibling is not None
    return sibling.removesuffix("proj_in.weight") + f"proj_out.{leaf}"


def unused_tensors(
    teacher: UNetGraph, weights: Mapping[str, str | None], selection: Selection
) -> dict[str, tuple[str, ...]]:
    """Return selector → the teacher's tensors that the student does not use because of it.

    Together with the map's values they are all tensors of the teacher: nothing is lost without a name.
    """
    used = {source for source in weights.values() if source is not None}
    deepest_selector = _selector_of_deepest(teacher, selection)
    groups: dict[str, list[str]] = {}
    for placed in modules(teacher):
        names = [name for t in placed.module.tensors if (name := placed.path + t.name) not in used]
        if names:
            selector = _attribute(placed.path, selection) or deepest_selector
            groups.setdefault(selector, []).extend(names)
    return {selector: tuple(names) for selector, names in groups.items()}


def _attribute(path: str, selection: Selection) -> str | None:
    """Return the selector that removed the module at ``path`` or, outermost last, what it is inside of."""
    path = path.rstrip(".")
    while path:
        if path in selection.nodes:
            return selection.nodes[path]
        path = path.rpartition(".")[0]
    return None


def _selector_of_deepest(teacher: UNetGraph, selection: Selection) -> str:
    """Return what removed the deepest level: the downsampler above it goes for the same reason."""
    for stage in reversed(teacher.down):
        if stage.source in selection.nodes:
            return selection.nodes[stage.source]
    return "(none)"
