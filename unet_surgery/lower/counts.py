"""Parameters, tensors and MACs of a graph, whole and by stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from unet_surgery.graph.nodes import UNetGraph
from unet_surgery.lower.modules import Placed, modules

__all__ = ["Counts", "count", "count_modules", "part_of", "quantity"]


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes of a U-Net or a part of it; MACs of one forward at batch 1 and the native latent size."""

    params: int = 0
    tensors: int = 0
    macs: int = 0
    """Convolutions and linear layers: what the BK-SDM paper counts."""
    macs_all: int = 0
    """The same with the attention products."""


def count(graph: UNetGraph) -> Counts:
    """Return the sizes of ``graph``."""
    return count_modules(modules(graph))


def count_modules(placed: Iterable[Placed]) -> Counts:
    """Return the summed sizes of the given :class:`Placed` modules."""
    params = tensors = macs = macs_all = 0
    for item in placed:
        module, pixels = item.module, item.num_pixels
        params += module.num_params
        tensors += len(module.tensors)
        macs += module.macs(pixels)
        macs_all += module.macs_all(pixels)
    return Counts(params, tensors, macs, macs_all)


def part_of(placed: Placed) -> str:
    """Return which part of the U-Net a module belongs to: ``down.0``, ``mid``, ``up.1``, or ``stem``."""
    side, _, rest = placed.path.partition("_")
    if side in ("down", "up") and rest.startswith("blocks."):
        return f"{side}.{rest.split('.')[1]}"
    return "mid" if placed.path.startswith("mid_block") else "stem"


def quantity(number: int) -> str:
    """Return a count for people, in four digits and a unit: ``323.4 M``, ``1.331 G``."""
    for unit, size in (("E", 10**18), ("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            value = number / size
            decimals = 3 if value < 10 else 2 if value < 100 else 1 if value < 1000 else 0
            return f"{value:,.{decimals}f} {unit}"
    return str(number)
