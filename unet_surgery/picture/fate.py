"""What becomes of every node and skip of the teacher: kept, removed or bypassed; the teacher's graph, annotated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from unet_surgery.errors import VerificationError
from unet_surgery.graph import Attention, Layer, Mid, Stage, Stem, UNetGraph, build, parse_config, remove, verify
from unet_surgery.lower import Counts, Placed, SurgeryPlan, count, modules, skip_sources

__all__ = ["Fate", "Node", "PairOfNodes", "Skip", "StageFate", "Surgery", "read_surgery"]

Fate = Literal["kept", "removed", "bypassed"]


@dataclass(frozen=True, slots=True)
class Node:
    """A module of the teacher, its parameters before and after; ``blocks``: which transformer blocks stay."""

    path: str
    fate: Fate
    before: int
    after: int
    blocks: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class PairOfNodes:
    """A layer: a resnet and the attention behind it."""

    resnet: Node
    attention: Node | None

    @property
    def output(self) -> str:
        """The path of the module that the layer's output comes from in the teacher."""
        return (self.attention or self.resnet).path


@dataclass(frozen=True, slots=True)
class StageFate:
    """A stage, or the mid (whose layers are one with and perhaps one without attention)."""

    selector: str
    channels: int
    fate: Fate
    before: Counts
    after: Counts
    layers: tuple[PairOfNodes, ...]
    sampler: Node | None


@dataclass(frozen=True, slots=True)
class Skip:
    """A skip connection, from the path of its producer to the up resnet that takes it.

    ``removed`` is of the teacher alone, ``moved`` of the student alone: its source is another layer than the teacher's.
    """

    source: str
    target: str
    fate: Literal["kept", "removed", "moved"]


@dataclass(frozen=True, slots=True)
class Surgery:
    """The teacher's graph with the fate of everything in it."""

    stem: Stem
    latent_size: tuple[int, int]
    conv_in: Node
    conv_out: Node
    stem_counts: Counts
    down: tuple[StageFate, ...]
    mid: StageFate | None
    up: tuple[StageFate, ...]
    skips: tuple[Skip, ...]


def read_surgery(plan: SurgeryPlan) -> Surgery:
    """Return the fate of every node of the plan's teacher.

    Raises:
        ConfigError, InexpressibleError, VerificationError: the plan is not one that ``make_plan`` makes.
    """
    teacher = build(parse_config(plan.teacher_config))
    student = remove(teacher, plan.removed)
    verify(teacher, student, allow_skip_change=True)
    _check_sizes(plan, teacher, student)
    fates = _Fates(plan, teacher, student)
    return Surgery(
        stem=teacher.stem,
        latent_size=teacher.latent_size,
        conv_in=fates.node("conv_in"),
        conv_out=fates.node("conv_out"),
        stem_counts=fates.part("stem")[0],
        down=tuple(map(fates.stage, teacher.down)),
        mid=None if teacher.mid is None else fates.mid(teacher.mid),
        up=tuple(map(fates.stage, teacher.up)),
        skips=_skips(teacher, student),
    )


def _check_sizes(plan: SurgeryPlan, teacher: UNetGraph, student: UNetGraph) -> None:
    """A stored plan may have been edited: what it says of sizes must be so before it is drawn."""
    before, after = [part.teacher.params for part in plan.parts], [part.student.params for part in plan.parts]
    said = (plan.teacher, plan.student, sum(before), sum(after))
    if said != (count(teacher), count(student), plan.teacher.params, plan.student.params):
        raise VerificationError("the plan's sizes are not those of what it removes", hint="plan again")


class _Fates:
    """Parameters before and after by module path, and what follows from them."""

    def __init__(self, plan: SurgeryPlan, teacher: UNetGraph, student: UNetGraph) -> None:
        self._before = _params((p.path, p) for p in modules(teacher))
        self._after = _params((p.source, p) for p in modules(student))
        self._parts = {part.name: (part.teacher, part.student) for part in plan.parts}
        self._bypassed = {bypassed.attention for bypassed in plan.bypassed}
        self._blocks = _blocks(student)
        self._stages = {stage.selector for stage in student.stages} | ({"mid"} if student.mid else set())

    def part(self, name: str) -> tuple[Counts, Counts]:
        return self._parts.get(name, (Counts(), Counts()))

    def node(self, path: str) -> Node:
        fate: Fate = "bypassed" if path in self._bypassed else "kept" if path in self._after else "removed"
        return Node(path, fate, self._before[path], self._after.get(path, 0))

    def attention(self, attention: Attention | None) -> Node | None:
        if attention is None:
            return None
        plain, left = self.node(attention.source), self._blocks.get(attention.source, frozenset())
        return Node(plain.path, plain.fate, plain.before, plain.after, tuple(k in left for k in range(attention.depth)))

    def layer(self, layer: Layer) -> PairOfNodes:
        return PairOfNodes(self.node(layer.resnet.source), self.attention(layer.attention))

    def stage(self, stage: Stage) -> StageFate:
        before, after = self.part(stage.selector)
        sampler = None if stage.sampler is None else self.node(stage.sampler.source)
        layers = tuple(map(self.layer, stage.layers))
        return StageFate(stage.selector, stage.channels, self._whole(stage.selector), before, after, layers, sampler)

    def mid(self, mid: Mid) -> StageFate:
        before, after = self.part("mid")
        layers = [PairOfNodes(self.node(resnet.source), None) for resnet in mid.resnets]
        layers[0] = PairOfNodes(layers[0].resnet, self.attention(mid.attention))
        return StageFate("mid", mid.channels, self._whole("mid"), before, after, tuple(layers), None)

    def _whole(self, selector: str) -> Fate:
        return "kept" if selector in self._stages else "removed"


def _params(placed: Iterable[tuple[str, Placed]]) -> Mapping[str, int]:
    """Return node → parameters; an attention's transformer blocks are its own."""
    params: dict[str, int] = {}
    for path, item in placed:
        # the convolutions at both ends have no path of their own
        owner = path.partition("transformer_blocks")[0].rstrip(".") or item.module.tensors[-1].name.partition(".")[0]
        params[owner] = params.get(owner, 0) + item.module.num_params
    return params


def _blocks(student: UNetGraph) -> Mapping[str, frozenset[int]]:
    """Return attention → the teacher's transformer blocks that it keeps."""
    attentions = [layer.attention for stage in student.stages for layer in stage.layers]
    attentions.append(None if student.mid is None else student.mid.attention)
    return {a.source: frozenset(a.blocks) for a in attentions if a is not None}


def _skips(teacher: UNetGraph, student: UNetGraph) -> tuple[Skip, ...]:
    """Return the teacher's skips in the order of its up layers, each followed by the one that takes its place."""
    after = skip_sources(student)
    skips: list[Skip] = []
    for target, (source, producer) in skip_sources(teacher).items():
        if target in after and after[target][1] == producer:
            skips.append(Skip(source, target, "kept"))
            continue
        skips.append(Skip(source, target, "removed"))
        if target in after:
            skips.append(Skip(after[target][0], target, "moved"))
    return tuple(skips)
