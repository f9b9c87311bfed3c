"""A teacher on disk: a diffusers pipeline folder or a U-Net folder, described without opening its weights."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.components import INDEX, Component, read_components
from unet_surgery.checkpoint.foreign import recognise_names
from unet_surgery.checkpoint.header import MAX_HEADER_BYTES
from unet_surgery.checkpoint.jsonfile import kind_of, read_object
from unet_surgery.checkpoint.layout import WeightsChoice, choose_weights
from unet_surgery.checkpoint.reader import Weights, open_weights
from unet_surgery.errors import ContainerError, TeacherError, first_few

__all__ = ["TeacherFolder", "is_hub_id", "open_teacher"]

log = logging.getLogger(__name__)

LOCAL = "local"
MAX_CONFIG_BYTES = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class TeacherFolder:
    """A teacher. ``weights`` is None where only config.json is there, which is enough to plan."""

    root: Path
    unet: Path
    config: Mapping[str, Any]
    weights: WeightsChoice | None
    variant: str | None
    is_pipeline: bool
    teacher_id: str
    max_header_bytes: int = MAX_HEADER_BYTES

    def components(self) -> tuple[Component, ...]:
        """Return what model_index.json names besides the U-Net; nothing for a U-Net folder.

        Raises:
            TeacherError: one is missing, incomplete or damaged.
        """
        if not self.is_pipeline:
            return ()
        return read_components(self.root, self.variant, max_header_bytes=self.max_header_bytes)

    def open_weights(self) -> Weights:
        """Open the U-Net's weights.

        Raises:
            TeacherError: there are none, or they are damaged.
        """
        choice = self.weights
        if choice is None:  # choosing says what is there instead
            names = os.listdir(self.unet)
            choice = choose_weights(names, self.variant, where=str(self.unet), exact=True)
        return open_weights(self.unet, choice, max_header_bytes=self.max_header_bytes)


def is_hub_id(text: object) -> bool:
    """True for ``org/name``; a path of somebody's machine is none, and must not travel with a student."""
    return isinstance(text, str) and _HUB_ID.fullmatch(text) is not None


def open_teacher(
    path: Path,
    *,
    variant: str | None = None,
    exact: bool = False,
    config_only: bool = False,
    teacher_id: str | None = None,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> TeacherFolder:
    """Describe the teacher at ``path``: a pipeline folder, a U-Net folder, or a folder with a U-Net in ``unet/``.

    ``exact`` takes no other weights than those of ``variant`` (of a Hub cache, which may hold any of them), and none
    where these are not there. ``config_only`` does not look for weights. ``max_header_bytes`` bounds each header.

    Raises:
        TeacherError: nothing of the kind is there; says what is.
    """
    if not path.is_dir():
        raise _not_a_folder(path, max_header_bytes)
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
    names = [p.name for p in unet.iterdir()]
    weights = None
    if not config_only and any(".safetensors" in n for n in names):
        try:
            weights = choose_weights(names, variant, where=str(unet), exact=exact)
        except TeacherError:
            if not exact:
                raise
        if weights is not None and weights.variant != variant:
            log.info("the only weights there are of variant %s: taking these", weights.variant)
    return TeacherFolder(
        root=path,
        unet=unet,
        config=config,
        weights=weights,
        variant=variant,
        is_pipeline=is_pipeline,
        teacher_id=teacher_id or name or LOCAL,
        max_header_bytes=max_header_bytes,
    )


def _not_a_folder(path: Path, max_header_bytes: int) -> TeacherError:
    if not os.path.lexists(path):
        return TeacherError("there is no such teacher", where=str(path))
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return TeacherError("the teacher cannot be opened", where=str(path), found=error.strerror)
    if not path.is_file():
        return TeacherError("the teacher is not a folder", where=str(path), found=kind_of(mode))
    found = _what_is(path, max_header_bytes)
    hint = "diffusers' StableDiffusionPipeline.from_single_file(…).save_pretrained(…) makes one of a checkpoint"
    if found.endswith("a pickle"):
        hint = f"first unet-surgery convert {shlex.quote(str(path))}; then {hint}"
    return TeacherError(
        "the teacher is a file, not a folder",
        where=str(path),
        expected="a diffusers folder: a pipeline, or a U-Net with its config.json",
        found=found,
        hint=hint,
    )


def _what_is(path: Path, max_header_bytes: int) -> str:
    """Return what a single file holds, as far as its first bytes or its tensors' names tell."""
    try:
        file = WeightsChoice(path.name, sharded=False, variant=None)
        with open_weights(path.parent, file, max_header_bytes=max_header_bytes) as weights:
            return recognise_names(list(weights)) or f"a safetensors file of {len(weights)} tensors"
    except ContainerError as error:
        return error.found or error.what
