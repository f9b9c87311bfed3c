"""A teacher on disk: a diffusers pipeline folder or a U-Net folder, described without opening its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.header import NOT_SAFETENSORS
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.layout import WeightsChoice, choose_weights, component_files, is_weights_file
from unet_surgery.checkpoint.reader import Weights, open_weights
from unet_surgery.errors import TeacherError, printable

__all__ = ["Component", "TeacherFolder", "is_hub_id", "open_teacher"]

INDEX = "model_index.json"
LOCAL = "local"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a pipeline besides the U-Net: its folder, and source name → target name of the files it needs."""

    name: str
    folder: Path
    files: Mapping[str, str]


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

    def components(self) -> tuple[Component, ...]:
        """Return what model_index.json names besides the U-Net; nothing for a U-Net folder.

        Raises:
            TeacherError: a component's folder is missing.
        """
        return _components(self.root, self.variant) if self.is_pipeline else ()

    def open_weights(self) -> Weights:
        """Open the U-Net's weights.

        Raises:
            TeacherError: there are none, or they are damaged.
        """
        if self.weights is None:
            raise TeacherError(
                "this teacher has a config.json and no weights",
                where=str(self.unet),
                hint="plan needs no more, prune does",
            )
        return open_weights(self.unet, self.weights)


def is_hub_id(text: object) -> bool:
    """True for ``org/name``; a path of somebody's machine is none, and must not travel with a student."""
    return isinstance(text, str) and _HUB_ID.fullmatch(text) is not None


def open_teacher(path: Path, *, variant: str | None = None, teacher_id: str | None = None) -> TeacherFolder:
    """Describe the teacher at ``path``: a pipeline folder, a U-Net folder, or a folder with a U-Net in ``unet/``.

    Raises:
        TeacherError: nothing of the kind is there; says what is.
    """
    if not path.is_dir():
        raise _not_a_folder(path)
    is_pipeline = (path / INDEX).is_file()
    if is_pipeline or (path / "unet" / "config.json").is_file():
        unet = path / "unet"
    else:
        unet = path
    if not (unet / "config.json").is_file():
        found = sorted(p.name for p in path.iterdir())[:6]
        raise TeacherError(
            "there is no U-Net in this folder",
            where=str(path),
            expected=f"{INDEX} with unet/config.json, or config.json",
            found=", ".join(map(printable, found)) or "an empty folder",
        )
    config = read_object(unet / "config.json")
    name = config.get("_name_or_path")
    if name is not None and not is_hub_id(name):
        del config["_name_or_path"]
        name = None
    names = [p.name for p in unet.iterdir()]
    weights = None
    if variant is not None or any(is_weights_file(n) for n in names):
        weights = choose_weights(names, variant, where=str(unet))
    return TeacherFolder(
        root=path,
        unet=unet,
        config=config,
        weights=weights,
        variant=variant,
        is_pipeline=is_pipeline,
        teacher_id=teacher_id or name or LOCAL,
    )


def _components(root: Path, variant: str | None) -> tuple[Component, ...]:
    """Return the components that model_index.json names, except the U-Net."""
    components = []
    for name, entry in sorted(read_object(root / INDEX).items()):
        if name.startswith("_") or not isinstance(entry, list) or name == "unet":
            continue
        if len(entry) != 2 or entry[0] is None or entry[1] is None:
            continue
        folder = root / name
        if Path(name).name != name or not folder.is_dir():
            raise TeacherError(
                "a component of the pipeline is missing",
                where=str(root / INDEX),
                expected=f"a folder {printable(name)}/",
                hint="--unet-only writes the U-Net without the rest",
            )
        files = component_files(sorted(p.name for p in folder.iterdir() if p.is_file()), variant)
        components.append(Component(name, folder, files))
    return tuple(components)


def _not_a_folder(path: Path) -> TeacherError:
    if not path.exists():
        return TeacherError("there is no such teacher", where=str(path))
    if not path.is_file():
        return TeacherError("the teacher is not a folder", where=str(path))
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    what = next((label for magic, label in NOT_SAFETENSORS if start.startswith(magic)), "a single file")
    return TeacherError(
        "the teacher is a file, not a folder",
        where=str(path),
        expected="a diffusers folder: a pipeline, or a U-Net with its config.json",
        found=what,
        hint="diffusers' StableDiffusionPipeline.from_single_file(…).save_pretrained(…) makes one",
    )
