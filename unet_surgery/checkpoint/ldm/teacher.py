"""A single-file checkpoint as a teacher: by diffusers' names, with a config that was inferred or is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.header import MAX_HEADER_BYTES
from unet_surgery.checkpoint.layout import WeightsChoice
from unet_surgery.checkpoint.ldm.parts import read_part
from unet_surgery.checkpoint.ldm.single_file import SingleFile, read_single_file
from unet_surgery.checkpoint.match import check_shapes
from unet_surgery.checkpoint.reader import Weights
from unet_surgery.checkpoint.teacher import LOCAL, LocalWeights, TeacherFolder, WeightsSource
from unet_surgery.checkpoint.tensorfile import OutTensor
from unet_surgery.errors import UsageError
from unet_surgery.graph import build, parse_config
from unet_surgery.lower import shapes_of

__all__ = ["EMA", "GivenConfig", "open_single_file"]

EMA = "ema"
"""The variant that means the averaged weights of a file that holds both."""


@dataclass(frozen=True, slots=True)
class GivenConfig:
    """A U-Net's config from elsewhere: what that is called in a card, and ``where`` it is for errors.

    A config that is ``offered``, and not demanded, is taken only if the file's tensors are those that it describes.
    """

    config: Mapping[str, Any]
    name: str
    where: str
    offered: bool = False


@dataclass(frozen=True, slots=True)
class _File:
    """The U-Net's weights of a single file: translated when they are opened."""

    source: WeightsSource
    ema: bool
    where: str

    def open(self, *, max_header_bytes: int) -> Weights:
        weights = self.source.open(max_header_bytes=max_header_bytes)
        try:
            return weights.renamed(self.read(weights).unet)
        except BaseException:
            weights.close()
            raise

    def read(self, weights: Weights) -> SingleFile:
        return read_single_file(weights, ema=self.ema, where=self.where)

    def parts(self, weights: Weights) -> Mapping[str, Sequence[OutTensor]]:
        """Return component → its tensors, of the file that is open as ``weights``."""
        return {name: read_part(part) for name, part in self.read(Weights(weights.files)).parts.items()}


def open_single_file(
    path: Path,
    *,
    variant: str | None = None,
    config: GivenConfig | None = None,
    weights: WeightsSource | None = None,
    cards: Path | None = None,
    teacher_id: str | None = None,
    commit: str | None = None,
    address: str | None = None,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> TeacherFolder:
    """Describe the teacher in the single file ``path``, or in ``weights`` that are elsewhere and called so.

    ``variant`` may be ``ema``. ``cards`` is the folder whose card is the file's.

    Raises:
        TeacherError: there is no U-Net in it, or not one alone, or it is not whole.
        WeightsMismatchError: its tensors are not those of ``config``.
        UsageError: there is no such variant of a single file.
    """
    if variant not in (None, EMA):
        raise UsageError(
            "a single file has no variants but its averaged weights",
            where=str(path),
            expected=f"--variant {EMA}, or none",
            found=variant,
        )
    local = LocalWeights(path.parent, WeightsChoice(path.name, sharded=False, variant=None))
    file = _File(weights or local, variant == EMA, str(path))
    with file.source.open(max_header_bytes=max_header_bytes) as opened:
        found = file.read(opened)
    shapes = {name: located.info.shape for name, located in found.unet.items()}
    taken = None if config is None or (config.offered and not _fits(config, shapes)) else config
    if taken is not None and not taken.offered:
        check_shapes(shapes_of(build(parse_config(taken.config))), shapes, where=str(path), source=taken.where)
    return TeacherFolder(
        root=path,
        unet=path,
        config=found.inferred.config if taken is None else taken.config,
        weights=file,
        variant=EMA if file.ema else None,
        is_pipeline=False,
        teacher_id=teacher_id or LOCAL,
        max_header_bytes=max_header_bytes,
        commit=commit,
        address=address,
        cards=cards,
        assumed=_assumed(found, taken, config),
        config_where=None if taken is None or found.has_ema else taken.where,
        single=file,
        config_from=None if taken is None or taken.offered else taken.name,
    )


def _fits(given: GivenConfig, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return shapes_of(build(parse_config(given.config))) == shapes


def _assumed(found: SingleFile, taken: GivenConfig | None, given: GivenConfig | None) -> tuple[str, ...]:
    lines: tuple[str, ...] = ()
    if found.has_ema:
        lines = (
            "the U-Net is the averaged one (EMA)"
            if found.is_ema
            else f"the U-Net is the plain one, not --variant {EMA}",
        )
    if taken is not None:
        return (*lines, f"the config is that of {taken.name}, which describes the same tensors")
    if given is not None:
        lines += (f"the config of {given.name} is of other tensors, and was not taken",)
    return lines + found.inferred.assumed
