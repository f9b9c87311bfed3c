"""Selectors: strings that name nodes of the teacher.

    down.2   up.0   mid                        a stage with its sampler, or the mid
    down.2.layers.1                            a resnet and its attention
    down.2.attentions.1   mid.attentions.0     one attention
    down.2.resnets.1   mid.resnets.1           one resnet
    up.0.attentions.*.transformer_blocks.4-9   transformer blocks inside attentions

In place of a number: ``*`` every, ``1-2`` a range, ``4-`` from 4 on, ``-1`` from the end, ``0|2`` a choice of these.

A number that exists in none of the parents matched so far is an error. One that exists in some
is taken where it exists, and the parents that lack it are reported as skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from types import MappingProxyType

from unet_surgery.errors import SelectorError, printable
from unet_surgery.graph.nodes import Attention, Mid, Stage, UNetGraph

__all__ = ["Selection", "Skipped", "parse_selector", "resolve"]

SIDES = ("down", "up", "mid")
STAGE_PARTS = ("layers", "resnets", "attentions")
MID_PARTS = ("resnets", "attentions")
FORMS = "down.N, up.N, mid, down.N.layers.N, down.N.resnets.N, down.N.attentions.N[.transformer_blocks.N]"

_ITEM = re.compile(r"(?P<from_end>-[1-9]\d{0,3})|(?P<first>\d{1,4})(?P<dash>-(?P<last>\d{1,4})?)?")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A parent that lacks what a selector asked of it, while another parent had it."""

    selector: str
    parent: str
    missing: str


@dataclass(frozen=True, slots=True)
class Selection:
    """What a list of selectors names: module path → the first selector that named it."""

    nodes: Mapping[str, str]
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, slots=True)
class _Item:
    """One alternative of an index pattern, as a half-open question to a parent with ``count`` children."""

    text: str
    first: int
    last: int | None
    """None: open, to the last child."""

    def wanted(self, count: int) -> Sequence[int]:
        """Return the indices this item asks of a parent with ``count`` children, whether it has them or not."""
        if self.first < 0:
            return (count + self.first,)
        return range(self.first, (count if self.last is None else self.last + 1))

    @property
    def must_exist(self) -> bool:
        return self.last is not None


@dataclass(frozen=True, slots=True)
class Step:
    """One ``name.index`` of a parsed selector; ``items`` is empty where the selector gives no index (``mid``)."""

    name: str
    pattern: str
    items: tuple[_Item, ...]


@dataclass(frozen=True, slots=True)
class _Node:
    path: str
    label: str
    owner: Stage | Mid | Attention | None


@lru_cache(maxsize=1024)
def parse_selector(text: str) -> tuple[Step, ...]:
    """Split a selector into steps and check its form.

    Raises:
        SelectorError: the text is not one of the forms of the module's docstring; names the nearest word.
    """
    words = text.split(".")
    side = words.pop(0)
    _expect(side, SIDES, text)
    steps = []
    if side == "mid":
        steps.append(Step("mid", "", ()))
    else:
        steps.append(Step(side, *_index(words, side, text)))
    allowed: tuple[str, ...] = MID_PARTS if side == "mid" else STAGE_PARTS
    while words:
        name = words.pop(0)
        if not allowed:
            raise SelectorError(
                f"the selector {printable(text)!r} goes on where nothing more can follow",
                expected=FORMS,
                found=f"{printable(name)!r} after {steps[-1].name}",
            )
        _expect(name, allowed, text)
        steps.append(Step(name, *_index(words, name, text)))
        allowed = ("transformer_blocks",) if name == "attentions" else ()
    return tuple(steps)


def _expect(word: str, allowed: Sequence[str], text: str) -> None:
    if word in allowed:
        return
    close = get_close_matches(word, allowed, n=1, cutoff=0.5)
    raise SelectorError(
        f"the selector {printable(text)!r} has an unknown word {printable(word)!r}",
        expected=" or ".join(allowed),
        hint=text.replace(word, close[0], 1) if close and word else FORMS,
    )


def _index(words: list[str], name: str, text: str) -> tuple[str, tuple[_Item, ...]]:
    if not words:
        raise SelectorError(
            f"the selector {printable(text)!r} ends without a number after {name!r}",
            hint=f"{text}.0 for the first, {text}.* for all",
        )
    pattern = words.pop(0)
    if pattern == "*":
        return pattern, (_Item("*", 0, None),)
    items = []
    for part in pattern.split("|"):
        match = _ITEM.fullmatch(part)
        if match is None:
            raise SelectorError(
                f"the selector {printable(text)!r} has {printable(part)!r} where an index belongs",
                expected="a number, *, a range 1-2, an open range 4-, -1 from the end, or a choice 0|2",
            )
        if match["from_end"]:
            items.append(_Item(part, int(match["from_end"]), int(match["from_end"])))
            continue
        first = int(match["first"])
        last = (int(match["last"]) if match["last"] else None) if match["dash"] else first
        if last is not None and last < first:
            raise SelectorError(f"the selector {printable(text)!r} has an empty range {part}", hint=f"{last}-{first}")
        items.append(_Item(part, first, last))
    return pattern, tuple(items)


def resolve(graph: UNetGraph, selectors: Iterable[str]) -> Selection:
    """Return what ``selectors`` name in ``graph``.

    Raises:
        SelectorError: a selector has a bad form or names nothing; says what there is instead.
    """
    nodes: dict[str, str] = {}
    skipped: list[Skipped] = []
    for text in selectors:
        for path in _resolve_one(graph, text, skipped):
            nodes.setdefault(path, text)
    return Selection(MappingProxyType(nodes), tuple(skipped))


def _resolve_one(graph: UNetGraph, text: str, skipped: list[Skipped]) -> Iterator[str]:
    steps = parse_selector(text)
    first, *rest = steps
    if first.name == "mid":
        if graph.mid is None:
            raise SelectorError(f"the selector {text!r} names nothing", found="this teacher has no mid")
        matched = [_Node("mid_block", "mid", graph.mid)]
    else:
        matched = _descend(
            [_Node("", "the U-Net", None)], first, text, skipped, lambda _: _stage_nodes(graph, first.name)
        )
    for step in rest:
        matched = _descend(matched, step, text, skipped, lambda node, step=step: _children(node, step.name))  # type: ignore[misc]
    for node in matched:
        yield from _paths(node, steps[-1].name)


def _descend(
    parents: list[_Node],
    step: Step,
    text: str,
    skipped: list[Skipped],
    children_of: Callable[[_Node], list[_Node]],
) -> list[_Node]:
    """Return the children of ``parents`` that ``step`` names, in the parents' order."""
    families = [(parent, children_of(parent)) for parent in parents]
    chosen: dict[str, _Node] = {}
    for item in step.items:
        found: set[int] = set()
        wanted: set[int] = set()
        lacking: list[Skipped] = []
        for parent, children in families:
            asked = item.wanted(len(children))
            have = [i for i in asked if 0 <= i < len(children)]
            # from the end, every parent answers with its own number, so the item as a whole is what is found
            found.update(have if item.first >= 0 else [item.first] * len(have))
            wanted.update(asked if item.first >= 0 else [item.first])
            if len(have) < len(asked) or not have:
                lacking.append(Skipped(text, parent.label, f"{step.name}.{item.text}"))
            for i in have:
                chosen[children[i].path] = children[i]
        if not found or (item.must_exist and wanted - found):
            raise SelectorError(
                f"the selector {text!r} names nothing at {step.name}.{item.text}",
                found=_inventory(families, step.name),
                hint=_valid_range(families, step.name),
            )
        skipped.extend(lacking)
    order = {child.path: k for k, child in enumerate(c for _, children in families for c in children)}
    return sorted(chosen.values(), key=lambda node: order[node.path])


def _stage_nodes(graph: UNetGraph, side: str) -> list[_Node]:
    stages = graph.down if side == "down" else graph.up
    return [_Node(stage.source, stage.selector, stage) for stage in stages]


def _children(node: _Node, name: str) -> list[_Node]:
    owner = node.owner
    if isinstance(owner, Attention):
        return [
            _Node(f"{node.path}.transformer_blocks.{k}", f"{node.label}.transformer_blocks.{k}", None)
            for k in range(owner.depth)
        ]
    if isinstance(owner, Mid):
        resnets = [r.source for r in owner.resnets]
        attentions = [owner.attention] if owner.attention else []
    else:
        assert isinstance(owner, Stage)
        resnets = [layer.resnet.source for layer in owner.layers]
        attentions = [layer.attention for layer in owner.layers if layer.attention]
    if name == "attentions":
        return [_Node(a.source, f"{node.label}.attentions.{k}", a) for k, a in enumerate(attentions)]
    return [_Node(path, f"{node.label}.{name}.{j}", owner) for j, path in enumerate(resnets)]


def _paths(node: _Node, kind: str) -> Iterator[str]:
    """Yield the module paths that removing ``node`` removes; a parent's path stands for what is inside it."""
    if kind == "layers":
        assert isinstance(node.owner, Stage)
        layer = next(layer for layer in node.owner.layers if layer.resnet.source == node.path)
        yield node.path
        if layer.attention:
            yield layer.attention.source
    else:
        yield node.path


def _inventory(families: list[tuple[_Node, list[_Node]]], name: str) -> str:
    counts = [f"{parent.label} has {_count(len(children), name)}" for parent, children in families]
    return "; ".join(counts[:4]) + (f"; and {len(counts) - 4} more" if len(counts) > 4 else "")


def _count(number: int, name: str) -> str:
    if name in SIDES:
        return f"{number} {name} stages (0 to {number - 1})"
    noun = name.replace("_", " ")
    return f"no {noun}" if number == 0 else f"{number} {noun} (0 to {number - 1})" if number > 1 else f"1 of {noun} (0)"


def _valid_range(families: list[tuple[_Node, list[_Node]]], name: str) -> str | None:
    most = max(len(children) for _, children in families)
    if most == 0:
        return None
    return f"{name}.0" if most == 1 else f"{name}.0 to {name}.{most - 1}, or {name}.-1 for the last"
