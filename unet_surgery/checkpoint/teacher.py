"""A teacher on disk: a diffusers pipeline folder or a U-Net folder, described without opening its weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.header import recognise
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.layout import WeightsChoice, choose_weights, component_files, is_weights_file
from unet_surgery.checkpoint.reader import Weights, open_weights
from unet_surgery.errors import TeacherError, printable

__all__ = ["Component", "TeacherFolder", "check_component", "component_names", "is_hub_id", "open_teacher"]

log = logging.getLogger(__name__)

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
        if self.weights is None:  # the choice says what is there instead
            names = [path.name for path in self.unet.iterdir()]
            return open_weights(self.unet, choose_weights(names, self.variant, where=str(self.unet), exact=True))
        return open_weights(self.unet, self.weights)


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
) -> TeacherFolder:
    """Describe the teacher at ``path``: a pipeline folder, a U-Net folder, or a folder with a U-Net in ``unet/``.

    ``exact`` takes no other weights than those of ``variant`` (of a Hub cache, which may hold any of them), and none
    where these are not there. ``config_only`` does not look for weights.

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
        names = sorted(p.name for p in path.iterdir())
        shown = ", ".join(map(printable, names[:6])) + (" …" if len(names) > 6 else "")
        raise TeacherError(
            "there is no U-Net in this folder",
            where=str(path),
            expected=f"{INDEX} with unet/config.json, or config.json",
            found=shown or "an empty folder",
        )
    config = read_object(unet / "config.json")
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
    )


def _components(root: Path, variant: str | None) -> tuple[Component, ...]:
    """Return the components that model_index.json names, except the U-Net."""
    components = []
    for name in component_names(root):
        folder = root / name
        if Path(name).name != name or not folder.is_dir():
            raise _incomplete(root / INDEX, f"a folder {printable(name)}/")
        paths = sorted(folder.iterdir())
        dangling = [path for path in paths if path.is_symlink() and not path.exists()]
        if dangling:
            raise _incomplete(dangling[0], "a link that leads somewhere")
        files = component_files([path.name for path in paths if path.is_file()], variant)
        check_component(folder, files.values())
        components.append(Component(name, folder, files))
    return tuple(components)


def component_names(root: Path) -> list[str]:
    """Return the components besides the U-Net that model_index.json names.

    Raises:
        TeacherError: it is not there, or names no U-Net.
    """
    index = read_object(root / INDEX)
    present = {
        name: entry
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and None not in entry
    }
    if "unet" not in present:
        raise TeacherError("the pipeline names no U-Net", where=str(root / INDEX), expected='"unet": [library, class]')
    return sorted(present.keys() - {"unet"})


def check_component(folder: Path, names: Collection[str]) -> None:
    """Check that a component is whole: not empty, and config.json and weights only together.

    Raises:
        TeacherError: something is missing.
    """
    if not names:
        raise _incomplete(folder, "files")
    has_config, has_weights = "config.json" in names, any(is_weights_file(name) for name in names)
    if has_config != has_weights:
        raise _incomplete(folder, "weights beside config.json" if has_config else "config.json beside the weights")


def _incomplete(where: Path, expected: str) -> TeacherError:
    return TeacherError(
        "a component of the pipeline is missing or incomplete",
        where=str(where),
        expected=expected,
        hint="--unet-only writes the U-Net without the rest",
    )


def _not_a_folder(path: Path) -> TeacherError:
    if not path.exists():
        return TeacherError("there is no such teacher", where=str(path))
    if not path.is_file():
        return TeacherError("the teacher is not a folder", where=str(path))
    with path.open("rb") as file:
        what = recognise(file.read(64), path.stat().st_size) or "a single file"
    return TeacherError(
        "the teacher is a file, not a folder",
        where=str(path),
        expected="a diffusers folder: a pipeline, or a U-Net with its config.json",
        found=what,
        hint="diffusers' StableDiffusionPipeline.from_single_file(…).save_pretrained(…) makes one",
    )
