"""Families: which published architecture a graph is, decided from the graph alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from unet_surgery.graph.nodes import UNetGraph

__all__ = ["FAMILIES", "describe", "family_of"]

FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "sd1": "Stable Diffusion v1: 4 stages of 2 layers, attention in the first 3, convolutional projections",
        "sd2": "Stable Diffusion v2: as v1, with linear projections",
        "sdxl": "Stable Diffusion XL: 3 stages of 2 layers, attention in the last 2, text and time embedding",
    }
)


def family_of(graph: UNetGraph) -> str | None:
    """Return the key of :data:`FAMILIES` that ``graph`` belongs to, or None.

    Widths, head counts and the number of input channels do not matter, so inpainting and depth
    variants and small copies belong to the family of their architecture. A pruned network belongs to none.
    """
    if any(len(stage.layers) != 2 for stage in graph.down) or graph.mid is None or graph.mid.attention is None:
        return None
    attention = tuple((down.has_attention, up.has_attention) for down, up in graph.pairs())
    with_both, without = (True, True), (False, False)
    if attention == (with_both, with_both, with_both, without):
        depths = {a.depth for stage in graph.stages for layer in stage.layers if (a := layer.attention)}
        if graph.stem.addition_embedding_dim is None and depths | {graph.mid.attention.depth} == {1}:
            return "sd2" if graph.stem.linear_projection else "sd1"
    if attention == (without, with_both, with_both) and graph.stem.addition_embedding_dim is not None:
        return "sdxl"
    return None


def describe(graph: UNetGraph) -> str:
    """Return one line that says what ``graph`` is, for errors and tables."""
    family = family_of(graph)
    if family:
        return f"{family} ({FAMILIES[family]})"
    layers = ", ".join(str(len(stage.layers)) for stage in graph.down)
    attention = ", ".join("yes" if stage.has_attention else "no" for stage in graph.down)
    mid = "no mid" if graph.mid is None else "a mid" if graph.mid.attention else "a mid without attention"
    return f"no known family ({graph.num_levels} stages, layers {layers}, attention {attention}, {mid})"
