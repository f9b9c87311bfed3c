"""The structure of a U-Net in the original layout, read off its tensors' names and shapes.

The blocks are walked in the order of their numbers, whatever gaps these have: a downsampler ends a stage of
``input_blocks``, an upsampler one of ``output_blocks``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from unet_surgery.errors import WeightsMismatchError

__all__ = ["Part", "WalkedLayer", "WalkedStage", "WalkedUNet", "walk"]

Shapes = Mapping[str, tuple[int, ...]]
Kind = Literal["resnet", "attention", "downsampler", "upsampler", "unknown"]

_KINDS: Mapping[str, Kind] = {
    "in_layers": "resnet",
    "emb_layers": "resnet",
    "out_layers": "resnet",
    "skip_connection": "resnet",
    "norm": "attention",
    "proj_in": "attention",
    "proj_out": "attention",
    "transformer_blocks": "attention",
    "op": "downsampler",
    "conv": "upsampler",
}
MAX_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Part:
    """A module of the file: its path there, and the tensors below it."""

    path: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        first = next(iter(self.shapes), "")
        return _KINDS.get(first.partition(".")[0], "unknown")

    @property
    def depth(self) -> int:
        """How many transformer blocks an attention has."""
        return len({name.split(".")[1] for name in self.shapes if name.startswith("transformer_blocks.")})

    def size(self, name: str, axis: int) -> int:
        """Return one size of a tensor that the structure depends on.

        Raises:
            WeightsMismatchError: it is not there, or has fewer axes.
        """
        shape = self.shapes.get(name)
        if shape is None or len(shape) <= axis:
            raise WeightsMismatchError(
                "a tensor of the U-Net is missing"
                if shape is None
                else "a tensor of the U-Net has an impossible shape",
                where=f"{self.path}.{name}" if self.path else name,
                found=None if shape is None else str(list(shape)),
                hint="download the checkpoint again",
            )
        return shape[axis]


@dataclass(frozen=True, slots=True)
class WalkedLayer:
    """A resnet and the attention behind it."""

    resnet: Part
    attention: Part | None


@dataclass(frozen=True, slots=True)
class WalkedStage:
    """One side of one level."""

    layers: tuple[WalkedLayer, ...]
    sampler: Part | None

    @property
    def attentions(self) -> tuple[Part, ...]:
        return tuple(layer.attention for layer in self.layers if layer.attention is not None)


@dataclass(frozen=True, slots=True)
class WalkedUNet:
    """What is there: stages in the order of the forward pass, the mid's parts, and what belongs to neither."""

    down: tuple[WalkedStage, ...]
    mid: tuple[Part, ...]
    up: tuple[WalkedStage, ...]
    stem: Part

    @property
    def attentions(self) -> tuple[Part, ...]:
        inside = [attention for stage in self.down + self.up for attention in stage.attentions]
        return (*inside, *(part for part in self.mid if part.kind == "attention"))


def walk(shapes: Shapes) -> WalkedUNet:
    """Return the structure of a U-Net from its original names (without a prefix) and shapes.

    What fits nowhere is passed over: it stands in no :class:`Part`.
    """
    lists: dict[str, dict[int, dict[int, Part]]] = {"input_blocks": {}, "output_blocks": {}, "middle_block": {}}
    stem = Part("")
    for name, shape in shapes.items():
        head, path, inner = _split(name)
        if head in lists and path:
            part = lists[head].setdefault(path[0], {}).setdefault(path[-1], Part(".".join(map(str, (head, *path)))))
            part.shapes[inner] = shape
        else:
            stem.shapes[name] = shape
    return WalkedUNet(
        down=_stages(lists["input_blocks"], "downsampler"),
        mid=tuple(part for _, parts in sorted(lists["middle_block"].items()) for part in parts.values()),
        up=_stages(lists["output_blocks"], "upsampler"),
        stem=stem,
    )


def _split(name: str) -> tuple[str, tuple[int, ...], str]:
    """Split ``input_blocks.4.1.norm.weight`` into list, numbers and the rest; other names have no numbers.

    ``conv_in``, which is number 0 of its list, is no layer and has none either.
    """
    head, *rest = name.split(".")
    count = 1 if head == "middle_block" else 2
    numbers = rest[:count]
    if len(rest) <= count or not all(map(_is_number, numbers)) or (head, numbers) == ("input_blocks", ["0", "0"]):
        return head, (), name
    return head, tuple(map(int, numbers)), ".".join(rest[count:])


def _is_number(text: str) -> bool:
    """True for a number as it is written in names; one of a thousand digits is none."""
    return text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS


def _stages(blocks: Mapping[int, Mapping[int, Part]], sampler_kind: Kind) -> tuple[WalkedStage, ...]:
    """Cut a list of blocks into stages, each ended by a sampler but the last."""
    stages: list[WalkedStage] = []
    layers: list[WalkedLayer] = []
    for _, parts in sorted(blocks.items()):
        kinds = {part.kind: part for _, part in sorted(parts.items(), reverse=True)}
        if "resnet" in kinds:
            layers.append(WalkedLayer(kinds["resnet"], kinds.get("attention")))
        if sampler_kind in kinds:
            stages.append(WalkedStage(tuple(layers), kinds[sampler_kind]))
            layers = []
    return (*stages, WalkedStage(tuple(layers), None))
