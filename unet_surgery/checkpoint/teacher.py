"""A teacher on disk: a diffusers pipeline folder or a U-Net folder, described without opening its weights."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from unet_surgery.checkpoint.components import INDEX, Component, read_components
from unet_surgery.checkpoint.header import MAX_HEADER_BYTES
from unet_surgery.checkpoint.jsonfile import kind_of, read_object
from unet_surgery.checkpoint.layout import WeightsChoice, choose_weights
from unet_surgery.checkpoint.reader import Weights, open_weights
from unet_surgery.checkpoint.tensorfile import OutTensor
from unet_surgery.errors import TeacherError, UsageError, first_few, printable
from unet_surgery.graph.config import DEFAULTS

__all__ = ["LocalWeights", "TeacherFolder", "WeightsSource", "is_hub_id", "open_teacher"]

log = logging.getLogger(__name__)

LOCAL = "local"
MAX_CONFIG_BYTES = 1 << 20
# what text encoder, VAE and scheduler must agree on with the U-Net
SHARED_WITH_PARTS = {
    key: DEFAULTS[key]
    for key in ("cross_attention_dim", "in_channels", "out_channels", "addition_embed_type", "num_class_embeds")
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class WeightsSource(Protocol):
    """Weights that are not open yet, wherever they lie."""

    def open(self, *, max_header_bytes: int) -> Weights:
        """Open them, each header of at most ``max_header_bytes``; TeacherError if they are missing or damaged."""


class PartsSource(Protocol):
    """A single file that may hold other parts of a pipeline besides the U-Net."""

    def parts(self, weights: Weights) -> Mapping[str, Sequence[OutTensor]]:
        """Return component → the tensors of its own that the file, open as ``weights``, has for it."""


@dataclass(frozen=True, slots=True)
class LocalWeights:
    """Weights in a folder."""

    folder: Path
    choice: WeightsChoice

    def open(self, *, max_header_bytes: int) -> Weights:
        return open_weights(self.folder, self.choice, max_header_bytes=max_header_bytes)


@dataclass(frozen=True, slots=True)
class TeacherFolder:
    """A teacher. ``weights`` is None where only config.json is there, which is enough to plan.

    ``cards`` is the folder whose card and licence are this model's, ``commit`` the Hub repository's commit that it is
    of, ``address`` what one writes to mean the same again. ``base`` is the pipeline that brings the other parts
    where this is a U-Net alone.

    Of a single file, ``root`` and ``unet`` are that file, ``assumed`` is what of the config is not in it, ``single``
    says which other parts are, ``config_from`` is what the config was taken from, if that was asked for, and
    ``config_where`` where that is on this machine.
    """

    root: Path
    unet: Path
    config: Mapping[str, Any]
    weights: WeightsSource | None
    variant: str | None
    is_pipeline: bool
    teacher_id: str
    max_header_bytes: int = MAX_HEADER_BYTES
    commit: str | None = None
    address: str | None = None
    base: TeacherFolder | None = None
    cards: Path | None = None
    assumed: tuple[str, ...] = ()
    single: PartsSource | None = None
    config_from: str | None = None
    config_where: str | None = None

    @property
    def name(self) -> str:
        """What one writes to mean this teacher again, as far as that may be published."""
        return self.address or (self.teacher_id if self.teacher_id != LOCAL else "path/to/the/base")

    @property
    def pipeline(self) -> TeacherFolder | None:
        """The teacher, or its base, that has a pipeline's other parts."""
        return self if self.is_pipeline else self.base

    def components(self) -> tuple[Component, ...]:
        """Return what model_index.json names besides the U-Net, the base's for a U-Net alone; else nothing.

        Raises:
            TeacherError: one is missing, incomplete or damaged.
        """
        pipeline = self.pipeline
        if pipeline is None:
            return ()
        return read_components(pipeline.root, pipeline.variant, max_header_bytes=self.max_header_bytes)

    def own_parts(self, weights: Weights) -> Mapping[str, Sequence[OutTensor]]:
        """Return the components that a single file, whose ``weights`` are open, brings itself: name → tensors."""
        return {} if self.single is None else self.single.parts(weights)

    def with_base(self, base: TeacherFolder) -> TeacherFolder:
        """Return this U-Net with the other parts of the pipeline ``base``.

        Raises:
            UsageError: this is a pipeline itself, ``base`` is none, or its parts were made for another kind of U-Net.
        """
        if self.is_pipeline:
            raise UsageError(
                "the teacher is a pipeline and brings its own parts", where=str(self.root), hint="leave --base out"
            )
        if not base.is_pipeline:
            raise UsageError(
                "the base is not a pipeline", where=str(base.root), expected=f"a diffusers folder with {INDEX}"
            )
        for key, default in SHARED_WITH_PARTS.items():
            ours, theirs = self.config.get(key, default), base.config.get(key, default)
            if ours != theirs:
                raise UsageError(
                    "the base's parts do not fit this U-Net: they were made for another kind",
                    where=f"{base.unet / 'config.json'}, key {key}",
                    expected=printable(ours),
                    found=printable(theirs),
                    hint="give a pipeline of the same family: SD v1, v2 or XL",
                )
        return replace(self, base=base)

    def open_weights(self) -> Weights:
        """Open the U-Net's weights.

        Raises:
            TeacherError: there are none, or they are damaged.
        """
        weights = self.weights
        if weights is None:  # choosing says what is there instead
            names = os.listdir(self.unet)
            weights = LocalWeights(self.unet, choose_weights(names, self.variant, where=str(self.unet), exact=True))
        return weights.open(max_header_bytes=self.max_header_bytes)


def is_hub_id(text: object) -> bool:
    """True for ``org/name``; a path of somebody's machine is none, and must not travel with a student."""
    return isinstance(text, str) and _HUB_ID.fullmatch(text) is not None


def open_teacher(
    path: Path,
    *,
    variant: str | None = None,
    config_only: bool = False,
    teacher_id: str | None = None,
    max_header_bytes: int = MAX_HEADER_BYTES,
    weights: WeightsSource | None = None,
    commit: str | None = None,
    address: str | None = None,
) -> TeacherFolder:
    """Describe the teacher at ``path``: a pipeline folder, a U-Net folder, or a folder with a U-Net in ``unet/``.

    ``config_only`` does not look for weights. ``max_header_bytes`` bounds each header.
    ``weights`` are taken instead of those in the folder.

    Raises:
        TeacherError: nothing of the kind is there; says what is.
    """
    if not path.is_dir():
        raise _not_a_folder(path)
    # lexists: a link that leads nowhere, as in half a Hub cache, is found when it is read, not passed over
    is_pipeline = os.path.lexists(path / INDEX)
    unet = path / "unet" if is_pipeline or os.path.lexists(path / "unet" / "config.json") else path
    if not os.path.lexists(unet / "config.json"):
        raise TeacherError(
            "there is no U-Net in this folder",
            where=str(path),
            expected=f"{INDEX} with unet/config.json, or config.json",
            found=first_few(sorted(os.listdir(path))) or "an empty folder",
        )
    config = read_object(unet / "config.json", MAX_CONFIG_BYTES)
    name = config.get("_name_or_path")
    if name is not None and not is_hub_id(name):
        del config["_name_or_path"]
        name = None
    if weights is None and not config_only:
        weights = _local_weights(unet, variant)
    return TeacherFolder(
        root=path,
        unet=unet,
        config=config,
        weights=weights,
        variant=variant,
        is_pipeline=is_pipeline,
        teacher_id=teacher_id or name or LOCAL,
        max_header_bytes=max_header_bytes,
        commit=commit,
        address=address,
        cards=path,
    )


def _local_weights(unet: Path, variant: str | None) -> LocalWeights | None:
    names = [path.name for path in unet.iterdir()]
    if not any(".safetensors" in name for name in names):
        return None
    choice = choose_weights(names, variant, where=str(unet))
    if choice.variant != variant:
        log.info("the only weights there are of variant %s: taking these", choice.variant)
    return LocalWeights(unet, choice)


def _not_a_folder(path: Path) -> TeacherError:
    if not os.path.lexists(path):
        return TeacherError("there is no such folder", where=str(path))
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return TeacherError("the teacher cannot be opened", where=str(path), found=error.strerror)
    if not path.is_file():
        return TeacherError("the teacher is not a folder", where=str(path), found=kind_of(mode))
    return TeacherError(
        "this is a file, not a folder",
        where=str(path),
        expected="a diffusers folder: a pipeline, or a U-Net with its config.json",
    )
