"""The nodes of a U-Net graph: a handful of frozen dataclasses.

Equality compares structure only. ``source`` (which teacher module a node's weights come from),
``blocks`` (which of the teacher's transformer blocks are kept) and ``bypass`` are provenance:
they say where a node comes from, not what it is, and do not take part in ``==``.

A *level* is a resolution, 0 the finest. Down stage ``i`` is level ``i``; up stage ``i`` of ``n`` is level
``n - 1 - i``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Attention", "Layer", "Mid", "Resnet", "Sampler", "Side", "Stage", "Stem", "UNetGraph"]

Side = Literal["down", "up"]


def _provenance(default: Any = "") -> Any:
    return field(default=default, compare=False)


@dataclass(frozen=True, slots=True)
class Resnet:
    """A ``ResnetBlock2D``: its input is ``[hidden | skip]`` on the up side, hidden alone elsewhere."""

    hidden_channels: int
    skip_channels: int
    out_channels: int
    source: str = _provenance()


@dataclass(frozen=True, slots=True)
class Attention:
    """A ``Transformer2DModel`` of ``depth`` transformer blocks.

    ``bypass`` marks one that was removed while its stage kept others: diffusers can hold it only as an
    attention of depth 0, whose ``proj_out`` is written as zeros so that it adds nothing.
    """

    channels: int
    num_heads: int
    depth: int
    cross_attention_dim: int
    only_cross_attention: bool
    source: str = _provenance()
    blocks: tuple[int, ...] = _provenance(())
    bypass: bool = _provenance(False)


@dataclass(frozen=True, slots=True)
class Layer:
    """A resnet and the attention behind it: what ``layers_per_block`` counts."""

    resnet: Resnet
    attention: Attention | None


@dataclass(frozen=True, slots=True)
class Sampler:
    """The convolution that halves (down) or doubles (up) the resolution at the end of a stage."""

    channels: int
    source: str = _provenance()


@dataclass(frozen=True, slots=True)
class Stage:
    """One side of one level: its layers, then its sampler."""

    side: Side
    channels: int
    layers: tuple[Layer, ...]
    sampler: Sampler | None
    index: int = _provenance(0)
    """The stage's number in the teacher."""

    @property
    def source(self) -> str:
        """The teacher's module path of this stage."""
        return f"{self.side}_blocks.{self.index}"

    @property
    def selector(self) -> str:
        """The selector that names this stage in the teacher."""
        return f"{self.side}.{self.index}"

    @property
    def has_attention(self) -> bool:
        return any(layer.attention is not None for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Mid:
    """The bottom of the U: two resnets around an attention, or one resnet alone."""

    channels: int
    resnets: tuple[Resnet, ...]
    attention: Attention | None


@dataclass(frozen=True, slots=True)
class Stem:
    """Everything of the U-Net that does not belong to a stage, and what all stages share."""

    in_channels: int
    out_channels: int
    channels: int
    norm_num_groups: int
    conv_in_kernel: int
    conv_out_kernel: int
    linear_projection: bool
    time_embed_dim: int
    resnet_time_channels: int
    time_scale_shift: bool
    time_cond_proj_dim: int | None
    class_embedding: tuple[str, int] | None
    addition_embedding_dim: int | None


@dataclass(frozen=True, slots=True)
class UNetGraph:
    """A whole U-Net: stem, down stages, mid, up stages, at a native latent size of (height, width)."""

    stem: Stem
    down: tuple[Stage, ...]
    mid: Mid | None
    up: tuple[Stage, ...]
    latent_size: tuple[int, int]

    @property
    def num_levels(self) -> int:
        return len(self.down)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.down + self.up

    def pairs(self) -> Iterator[tuple[Stage, Stage]]:
        """Yield (down stage, up stage) of each level, finest first."""
        return zip(self.down, reversed(self.up), strict=True)
