"""A pipeline's parts besides the U-Net: which there are, which of their files are needed, and that these are whole.

They are copied, never loaded; but a page or a pointer in place of weights would be found only by who loads the student.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.checkpoint.foreign import recognise
from unet_surgery.checkpoint.header import MAX_HEADER_BYTES
from unet_surgery.checkpoint.jsonfile import kind_of, read_object, read_regular
from unet_surgery.checkpoint.layout import component_files, component_weights, is_weights_file
from unet_surgery.checkpoint.reader import open_weights
from unet_surgery.errors import TeacherError, printable

__all__ = ["INDEX", "Component", "check_inside", "component_names", "read_components"]

INDEX = "model_index.json"
PARSED_JSON_BYTES = 1 << 20  # larger ones are vocabularies
WITHOUT_WEIGHTS = ("Tokenizer", "Scheduler", "Processor", "Extractor")
TEXT_SUFFIXES = (".json", ".txt")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a pipeline besides the U-Net: its folder, and source name → target name of the files it needs.

    ``kind`` is its class as model_index.json names it: text, never a class to be built. ``stamps`` say which files were
    looked at.
    """

    name: str
    folder: Path
    files: Mapping[str, str]
    kind: str
    stamps: Mapping[str, tuple[int, int, int]]

    def check_unchanged(self) -> None:
        """Raise TeacherError if a file is not the one that was looked at."""
        for name, stamp in self.stamps.items():
            if _stamp(self.folder / name) != stamp:
                raise TeacherError(
                    "the teacher changed while it was read", where=str(self.folder / name), hint="run again"
                )


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def component_names(root: Path) -> dict[str, str]:
    """Return name → class of the components besides the U-Net that model_index.json names, sorted.

    Raises:
        TeacherError: it is not there, names no U-Net, or a component that is no folder's name.
    """
    index = read_object(root / INDEX)
    present = {
        name: entry
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and None not in entry
    }
    if "unet" not in present:
        raise TeacherError("the pipeline names no U-Net", where=str(root / INDEX), expected='"unet": [library, class]')
    for name in present:
        if not _NAME.fullmatch(name):
            raise TeacherError(
                "the pipeline names a component that cannot be a folder in it",
                where=str(root / INDEX),
                expected="letters, digits, _ and -",
                found=printable(name),
            )
    return {name: str(present[name][1]) for name in sorted(present.keys() - {"unet"})}


def read_components(
    root: Path, variant: str | None, *, max_header_bytes: int = MAX_HEADER_BYTES
) -> tuple[Component, ...]:
    """Return the components that model_index.json names, each checked to be whole.

    Raises:
        TeacherError: one is missing or incomplete, or a file of it is no regular file, damaged, a Git LFS pointer or an
            HTML page.
    """
    components = []
    for name, kind in component_names(root).items():
        folder = root / name
        if not folder.is_dir():
            raise _incomplete(root / INDEX, f"a folder {name}/")
        check_inside(root, folder)
        try:
            files = component_files([path.name for path in _regular_files(root, folder)], variant)
        except PermissionError as error:
            raise _incomplete(folder, "a folder that can be read", error.strerror) from error
        stamps = {file: _stamp(folder / file) for file in files}
        component = Component(name, folder, files, kind, stamps)
        _check_complete(folder, files.values(), kind)
        _check_contents(component, variant, max_header_bytes)
        components.append(component)
    return tuple(components)


def check_inside(root: Path, path: Path) -> None:
    """A link must not publish what lies elsewhere on this machine; the Hub's cache keeps its files in ``blobs``."""
    real, top = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if not any(real.is_relative_to(home) for home in (top, top.parent / "blobs", top.parent.parent / "blobs")):
        raise TeacherError(
            "a link leads out of the teacher's folder",
            where=str(path),
            found=str(real),
            hint="put the file itself there, if it is to be part of the student",
        )


def _regular_files(root: Path, folder: Path) -> list[Path]:
    """Return the files of a folder, which may be links to files; other folders in it are no part of a component."""
    files = []
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise _incomplete(path, "a link that leads to a file", error.strerror) from error
        if stat.S_ISREG(mode):
            check_inside(root, path)
            files.append(path)
        elif not stat.S_ISDIR(mode):
            raise TeacherError("this is not a regular file", where=str(path), found=kind_of(mode))
    return files


def _check_complete(folder: Path, names: Collection[str], kind: str) -> None:
    if not names:
        raise _incomplete(folder, "files")
    if kind.removesuffix("Fast").endswith(WITHOUT_WEIGHTS):
        return
    has_config, has_weights = "config.json" in names, any(is_weights_file(name) for name in names)
    if has_config != has_weights:
        raise _incomplete(folder, "weights beside config.json" if has_config else "config.json beside the weights")


def _check_contents(component: Component, variant: str | None, max_header_bytes: int) -> None:
    chosen = component_weights(os.listdir(component.folder), variant)
    if chosen is not None:
        # opening checks headers, the index and its shards
        with open_weights(component.folder, chosen, max_header_bytes=max_header_bytes) as weights:
            left_out = [file.path for file in weights.files if file.path.name not in component.files]
        if left_out:
            raise _incomplete(left_out[0], "shards named as diffusers and transformers name them")
    for name in component.files:
        path = component.folder / name
        size = path.stat().st_size
        if name.endswith(".json") and size <= PARSED_JSON_BYTES:
            _check_json(path)
        else:
            _check_start(path, size)


def _check_json(path: Path) -> None:
    """As lax as the libraries that read it: tokenizers write integers of 31 digits."""
    data = read_regular(path, PARSED_JSON_BYTES)
    try:
        json.loads(data)
    except (ValueError, RecursionError) as error:
        found = recognise(data[:64], len(data)) or printable(str(error))
        raise _damaged(path, found) from error


def _check_start(path: Path, size: int) -> None:
    with path.open("rb") as file:
        what = recognise(file.read(64), size)
    if size == 0 and is_weights_file(path.name):
        raise _damaged(path, "an empty file")
    own = is_weights_file(path.name) and what is not None and what.endswith("a pickle")  # copied, never opened
    meant = path.name.endswith(TEXT_SUFFIXES) or is_weights_file(path.name) or "LFS" in (what or "")
    if what is not None and meant and not own:
        raise _damaged(path, what)


def _damaged(path: Path, found: str) -> TeacherError:
    return TeacherError(
        "a component's file is damaged or something else",
        where=str(path),
        found=found,
        hint="download it again; --unet-only writes the U-Net without the rest",
    )


def _incomplete(where: Path, expected: str, found: str | None = None) -> TeacherError:
    return TeacherError(
        "a component of the pipeline is missing or incomplete",
        where=str(where),
        expected=expected,
        found=found,
        hint="--unet-only writes the U-Net without the rest",
    )
