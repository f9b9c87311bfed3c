"""What a U-Net consists of, and which of it a recipe may remove: the table behind ``inspect``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from unet_surgery.errors import InexpressibleError
from unet_surgery.graph import UNetConfig, UNetGraph, remove, resolve, verify
from unet_surgery.graph.nodes import Layer, Mid, Stage
from unet_surgery.lower.config import lower_config
from unet_surgery.lower.counts import Counts, count_modules
from unet_surgery.lower.modules import Placed, modules

__all__ = ["NodeReport", "report_nodes"]

Kind = Literal["stem", "stage", "layer", "attention", "sampler", "mid", "resnet"]


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node: its selector (its name, where it has none), sizes, and how a recipe may remove it.

    ``removable`` is ``alone``, ``with`` (together with the selectors in ``together``) or ``no``; ``note`` says why, or
    what stays behind.
    """

    selector: str
    kind: Kind
    channels: int
    counts: Counts
    removable: Literal["alone", "with", "no"]
    together: tuple[str, ...] = ()
    note: str = ""


def report_nodes(config: UNetConfig, graph: UNetGraph) -> tuple[NodeReport, ...]:
    """Return stem, stages, layers, attentions, samplers and mid in the order of the forward pass."""
    return tuple(_nodes(config, graph))


def _nodes(config: UNetConfig, graph: UNetGraph) -> Iterator[NodeReport]:
    placed = list(modules(graph))
    stem = [p for p in placed if not p.path.startswith(("down_blocks", "up_blocks", "mid_block"))]
    yield NodeReport("stem", "stem", graph.stem.channels, count_modules(stem), "no", note="sets the widths of level 0")
    partner: dict[str, Stage] = {}
    for down, up in graph.pairs():
        partner |= {down.selector: up, up.selector: down}
    for stage in graph.down:
        yield from _stage(config, graph, stage, partner[stage.selector], placed)
    if graph.mid is not None:
        yield from _mid(config, graph, graph.mid, placed)
    for stage in graph.up:
        yield from _stage(config, graph, stage, partner[stage.selector], placed)


def _mid(config: UNetConfig, graph: UNetGraph, mid: Mid, placed: list[Placed]) -> Iterator[NodeReport]:
    """A mid loses its attention alone (where its depth is free) or with one resnet, and one resnet only with it."""
    yield _node(config, graph, "mid", "mid", mid.channels, _inside(placed, "mid_block"))
    for j, resnet in enumerate(mid.resnets):
        partners = (("mid.attentions.0",),) if mid.attention is not None else ()
        inside = _inside(placed, resnet.source)
        yield _node(config, graph, f"mid.resnets.{j}", "resnet", mid.channels, inside, partners)
    if mid.attention is not None:
        inside = _inside(placed, mid.attention.source)
        yield _node(config, graph, "mid.attentions.0", "attention", mid.channels, inside, (("mid.resnets.1",),))


def _stage(
    config: UNetConfig, graph: UNetGraph, stage: Stage, partner: Stage, placed: list[Placed]
) -> Iterator[NodeReport]:
    inside = _inside(placed, stage.source)
    yield _node(config, graph, stage.selector, "stage", stage.channels, inside, ((partner.selector,),))
    number = 0
    for j, layer in enumerate(stage.layers):
        selector = f"{stage.selector}.layers.{j}"
        yield _node(
            config, graph, selector, "layer", stage.channels, _layer(inside, layer), _layer_partners(stage, partner)
        )
        if layer.attention is not None:
            own = _inside(inside, layer.attention.source)
            yield _node(config, graph, f"{stage.selector}.attentions.{number}", "attention", stage.channels, own)
            number += 1
    if stage.sampler is not None:
        name = f"{stage.selector} sampler"
        own = _inside(inside, stage.sampler.source)
        yield NodeReport(name, "sampler", stage.channels, count_modules(own), "no", note="goes with its stage")


def _layer_partners(stage: Stage, partner: Stage) -> tuple[tuple[str, ...], ...]:
    """A layer goes with a layer of the other side: any middle one up, the last one down."""
    count = len(partner.layers)
    if stage.side == "down":
        return ((f"{partner.selector}.layers.1",),) if count > 2 else ()
    return ((f"{partner.selector}.layers.{count - 1}",),) if count else ()


def _node(
    config: UNetConfig,
    graph: UNetGraph,
    selector: str,
    kind: Kind,
    channels: int,
    inside: list[Placed],
    partners: Iterable[tuple[str, ...]] = (),
) -> NodeReport:
    counts = count_modules(inside)
    reason = ""
    for together in ((), *partners):
        try:
            left = _try(config, graph, (selector, *together))
        except InexpressibleError as error:
            reason = error.what  # the last one is of the attempt that came furthest
        else:
            note = ""
            if kind == "attention":
                kept = count_modules(p for p in modules(left) if p.source.startswith(inside[0].path)).params
                note = f"{kept:,} parameters stay" if kept else ""
            return NodeReport(selector, kind, channels, counts, "with" if together else "alone", together, note)
    return NodeReport(selector, kind, channels, counts, "no", note=reason)


def _try(config: UNetConfig, graph: UNetGraph, selectors: tuple[str, ...]) -> UNetGraph:
    left = remove(graph, resolve(graph, selectors).nodes)
    verify(graph, left)
    lower_config(config.raw, left)
    return left


def _inside(placed: Iterable[Placed], path: str) -> list[Placed]:
    return [p for p in placed if p.path.startswith(path + ".")]


def _layer(inside: list[Placed], layer: Layer) -> list[Placed]:
    own = _inside(inside, layer.resnet.source)
    return own + (_inside(inside, layer.attention.source) if layer.attention is not None else [])
