"""Text of a graph: one line a node, stable, and so a golden file, a diff and a bug report at once."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import unified_diff

from unet_surgery.graph.nodes import Attention, Resnet, Sampler, Stage, UNetGraph

__all__ = ["diff", "dump"]


def dump(graph: UNetGraph, *, provenance: bool = True) -> str:
    """Return ``graph`` as text, one node a line, each with its widths and (with ``provenance``) its teacher module."""
    return "".join(f"{line}\n" for line in _lines(graph, provenance))


def diff(before: UNetGraph, after: UNetGraph) -> str:
    """Return a unified diff of the two graphs, nodes matched by where their weights come from."""
    lines = unified_diff(list(_lines(before, True)), list(_lines(after, True)), "teacher", "student", lineterm="", n=0)
    return "".join(f"{line}\n" for line in lines if not line.startswith("@@"))


def _lines(graph: UNetGraph, provenance: bool) -> Iterator[str]:
    stem = graph.stem
    yield f"stem {stem.in_channels} -> {stem.channels} -> {stem.out_channels} channels, time {stem.time_embed_dim}"
    for stage in graph.down:
        yield from _stage(stage, provenance)
    if graph.mid is None:
        yield "mid none"
    else:
        yield f"mid {graph.mid.channels} channels"
        for k, resnet in enumerate(graph.mid.resnets):
            yield "  " + _resnet(resnet, provenance)
            if k == 0 and graph.mid.attention is not None:
                yield "  " + _attention(graph.mid.attention, provenance)
    for stage in graph.up:
        yield from _stage(stage, provenance)


def _stage(stage: Stage, provenance: bool) -> Iterator[str]:
    yield f"{stage.side} {stage.channels} channels, {len(stage.layers)} layers" + _source(stage.source, provenance)
    for layer in stage.layers:
        yield "  " + _resnet(layer.resnet, provenance)
        if layer.attention is not None:
            yield "  " + _attention(layer.attention, provenance)
    if stage.sampler is not None:
        yield "  " + _sampler(stage.sampler, provenance)


def _resnet(resnet: Resnet, provenance: bool) -> str:
    skip = f" | {resnet.skip_channels}" if resnet.skip_channels else ""
    return f"resnet {resnet.hidden_channels}{skip} -> {resnet.out_channels}" + _source(resnet.source, provenance)


def _attention(attention: Attention, provenance: bool) -> str:
    kind = " bypass" if attention.bypass and provenance else ""
    text = f"attention {attention.channels}, heads {attention.num_heads}, context {attention.cross_attention_dim}"
    text += f"{' only' if attention.only_cross_attention else ''}, depth {attention.depth}{kind}"
    if provenance and attention.blocks != tuple(range(attention.depth)):
        text += f" (blocks {', '.join(map(str, attention.blocks))})"
    return text + _source(attention.source, provenance)


def _sampler(sampler: Sampler, provenance: bool) -> str:
    return f"sampler {sampler.channels}" + _source(sampler.source, provenance)


def _source(path: str, provenance: bool) -> str:
    return f"  <- {path}" if provenance else ""
