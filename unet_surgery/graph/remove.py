"""``remove``: the one verb of surgery, a pure function from a graph and a set of nodes to a smaller graph."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from unet_surgery.errors import InexpressibleError
from unet_surgery.graph.nodes import Attention, Layer, Mid, Stage, UNetGraph

__all__ = ["remove"]


def remove(graph: UNetGraph, nodes: Collection[str]) -> UNetGraph:
    """Return ``graph`` without ``nodes`` (module paths, as :func:`resolve` gives them).

    Removing a stage, resnet or attention removes what is inside it. Removing the deepest level also removes the
    sampler of the level above it. An attention removed where its stage keeps others becomes a bypass (see
    :class:`Attention`); where it keeps none, the stage has no attention. The order of ``nodes`` cannot matter.

    Raises:
        InexpressibleError: what would be left is not even a U-Net: nothing, a resnet gone from under its
            attention, or half a mid.
    """
    gone = frozenset(nodes)
    if not gone:
        return graph
    down = tuple(_without(stage, gone) for stage in graph.down if stage.source not in gone)
    up = tuple(_without(stage, gone) for stage in graph.up if stage.source not in gone)
    if not down or not up:
        raise InexpressibleError(
            "the recipe removes every stage of a side",
            about=("down_blocks.0", f"up_blocks.{len(graph.up) - 1}"),
            hint="keep at least level 0: down.0 and the last up stage",
        )
    if down[-1].sampler is not None:
        down = (*down[:-1], replace(down[-1], sampler=None))
    return replace(graph, down=down, mid=_mid_without(graph.mid, gone), up=up)


def _without(stage: Stage, gone: frozenset[str]) -> Stage:
    layers = []
    for layer in stage.layers:
        attention = layer.attention
        attention_gone = attention is not None and attention.source in gone
        if layer.resnet.source in gone:
            if attention is not None and not attention_gone:
                raise _headless(layer, stage)
            continue
        if attention is None:
            layers.append(layer)
        elif attention_gone:
            layers.append(replace(layer, attention=_bypass(attention)))
        else:
            layers.append(replace(layer, attention=_shortened(attention, gone)))
    if all(layer.attention is None or layer.attention.bypass for layer in layers):
        layers = [replace(layer, attention=None) for layer in layers]
    return replace(stage, layers=tuple(layers))


def _mid_without(mid: Mid | None, gone: frozenset[str]) -> Mid | None:
    if mid is None or "mid_block" in gone:
        return None
    kept = tuple(resnet for resnet in mid.resnets if resnet.source not in gone)
    attention_gone = mid.attention is not None and mid.attention.source in gone
    if len(kept) == len(mid.resnets):
        if mid.attention is None:
            return mid
        attention = _bypass(mid.attention) if attention_gone else _shortened(mid.attention, gone)
        return replace(mid, attention=attention)
    if mid.attention is not None and not attention_gone:
        raise InexpressibleError(
            "the recipe removes a resnet of the mid and keeps its attention",
            about=("mid_block",),
            expected="a mid of two resnets and an attention, of one resnet alone, or none",
            hint='add "mid.attentions.0" for a mid of one resnet, or write "mid" to remove it whole',
        )
    return replace(mid, resnets=kept, attention=None) if kept else None


def _bypass(attention: Attention) -> Attention:
    return replace(attention, depth=0, blocks=(), bypass=True)


def _shortened(attention: Attention, gone: frozenset[str]) -> Attention:
    prefix = f"{attention.source}.transformer_blocks."
    blocks = tuple(k for k in attention.blocks if f"{prefix}{k}" not in gone)
    return attention if len(blocks) == attention.depth else replace(attention, depth=len(blocks), blocks=blocks)


def _headless(layer: Layer, stage: Stage) -> InexpressibleError:
    number = layer.resnet.source.rpartition(".")[2]
    return InexpressibleError(
        f"the recipe removes the resnet of {stage.selector}.layers.{number} and keeps its attention",
        about=(layer.resnet.source,),
        expected="a layer goes whole, or only its attention goes",
        hint=f'write "{stage.selector}.layers.{number}"',
    )
