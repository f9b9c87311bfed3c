"""The files of a student's other parts, and where each comes from: the one list that prune writes and check compares.

A file is the teacher's own; what ``--normalize`` makes of one; or made of a single-file teacher's tensors, with its
base's config beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.components import INDEX, Component
from unet_surgery.checkpoint.header import DTYPE_BITS, encode_header
from unet_surgery.checkpoint.layout import UNET_BASE, component_weights, is_weights_file
from unet_surgery.checkpoint.normalize import Content, Mending, mendings
from unet_surgery.checkpoint.reader import Weights, open_weights
from unet_surgery.checkpoint.teacher import TeacherFolder
from unet_surgery.checkpoint.tensorfile import METADATA, OutTensor, write_tensors
from unet_surgery.errors import OutputError, TeacherError, first_few

__all__ = ["Made", "PartFile", "PartFiles", "part_files", "same_file", "size_of", "write_part_file"]

CHUNK_BYTES = 4 << 20
TEXT_ENCODER_BASE = "model"
POSITION_IDS = "position_ids"


@dataclass(frozen=True, slots=True)
class Made:
    """A safetensors file of tensors of other files, in the order of writing."""

    tensors: tuple[OutTensor, ...]

    @property
    def head(self) -> bytes:
        """The file's first bytes, up to the tensors."""
        return encode_header([(t.name, t.dtype, t.shape) for t in self.tensors], METADATA)


PartFile = Path | Content | Made
"""What a file of the student holds: another file's content, a mended file's, or tensors."""


@dataclass(frozen=True, slots=True)
class PartFiles:
    """A student's other parts. ``files`` maps path in the student → what is written there.

    ``faults`` are what could be mended, ``mended`` what --normalize writes for it (by path, some of them new files),
    ``own`` the components whose weights are the single file's.
    """

    components: tuple[Component, ...] = ()
    files: Mapping[str, PartFile] = field(default_factory=dict)
    faults: tuple[Mending, ...] = ()
    mended: Mapping[str, Content] = field(default_factory=dict)
    own: tuple[str, ...] = ()

    def check_unchanged(self) -> None:
        """Raise TeacherError if a file is not the one that was looked at."""
        for component in self.components:
            component.check_unchanged()


def part_files(teacher: TeacherFolder, weights: Weights) -> PartFiles:
    """Return the other parts of ``teacher``, whose U-Net's ``weights`` are open; nothing for a U-Net alone.

    Raises:
        TeacherError: a part is missing, incomplete or damaged, or a single file's does not fit its base's config.
    """
    pipeline = teacher.pipeline
    if pipeline is None:
        return PartFiles()
    components = teacher.components()
    own = teacher.own_parts(weights)
    files: dict[str, PartFile] = {INDEX: pipeline.root / INDEX}
    for component in components:
        made = own.get(component.name)
        if made is not None:
            _check_fit(component, made, pipeline, str(teacher.unet))
        files |= _files(component, made)
    copied = [component for component in components if component.name not in own]
    faults = mendings(copied, pipeline.variant, max_header_bytes=teacher.max_header_bytes)
    mended = {f"{m.component}/{name}": content for m in faults for name, content in m.files.items()}
    used = tuple(component.name for component in components if component.name in own)
    return PartFiles(components, files, faults, mended, used)


def _files(component: Component, made: Sequence[OutTensor] | None) -> Iterator[tuple[str, PartFile]]:
    for source, target in component.files.items():
        if made is None or not is_weights_file(target):
            yield f"{component.name}/{target}", component.folder / source
    if made is not None:
        base = UNET_BASE if component.kind.startswith("Autoencoder") else TEXT_ENCODER_BASE
        yield f"{component.name}/{base}.safetensors", Made(tuple(made))


def _check_fit(component: Component, made: Sequence[OutTensor], base: TeacherFolder, where: str) -> None:
    """The base's config is written beside the file's own weights, so both must have tensors of the same sizes.

    Names are not compared: old VAEs and text encoders of transformers 5 are named otherwise.
    """
    chosen = component_weights(os.listdir(component.folder), base.variant)
    if chosen is None:  # a pickle is not opened
        return
    with open_weights(component.folder, chosen, max_header_bytes=base.max_header_bytes) as weights:
        theirs = {name: info for name in weights if POSITION_IDS not in name and (info := weights.info(name))}
    ours = {tensor.name: tensor.num_bytes // _width(tensor.dtype) for tensor in made}
    expected = {name: info.num_bytes // _width(info.dtype) for name, info in theirs.items()}
    if sorted(ours.values()) == sorted(expected.values()):
        return
    missing, extra = sorted(expected.keys() - ours.keys()), sorted(ours.keys() - expected.keys())
    other = sorted(name for name in ours.keys() & expected.keys() if ours[name] != expected[name])
    groups = (("missing", missing), ("unexpected", extra), ("of another size", other))
    raise TeacherError(
        f"the file's own {component.name} does not fit the base's config",
        where=where,
        expected=f"{len(expected)} tensors, as {component.folder} has",
        found="; ".join(f"{len(names)} {kind}: {first_few(names)}" for kind, names in groups if names),
        hint="where few differ, download the file again; else give a --base of the same family, or --unet-only",
    )


def _width(dtype: str) -> int:
    return DTYPE_BITS[dtype] // 8


# --- writing ----------------------------------------------------------------------------------------------------------


def size_of(file: PartFile) -> int:
    """Return how many bytes the file will have."""
    if isinstance(file, Path):
        return file.stat().st_size
    if isinstance(file, Made):
        return len(file.head) + sum(tensor.num_bytes for tensor in file.tensors)
    return len(file.head) + (0 if file.source is None else file.source.stat().st_size - file.offset)


def write_part_file(file: PartFile, target: Path, *, link: bool, on_bytes: disk.OnBytes) -> None:
    """Write a file of another part; ``link`` hard-links what is copied as it is.

    Raises:
        TeacherError: its source ended while it was read.
        OutputError: it cannot be linked.
    """
    if isinstance(file, Path):
        (_link if link else _copy)(file, target, on_bytes)
        return
    fd = disk.create(target)
    try:
        if isinstance(file, Made):
            write_tensors(fd, file.tensors, on_bytes)
            return
        disk.write(fd, file.head)
        on_bytes(len(file.head))
        if file.source is not None:
            with file.source.open("rb") as source:
                length = os.fstat(source.fileno()).st_size - file.offset
                disk.copy_range(source.fileno(), file.offset, length, fd, on_bytes)
        disk.fsync(fd)
    except EOFError:
        raise _ended(str(getattr(file, "source", target))) from None
    finally:
        os.close(fd)


def _link(source: Path, target: Path, _on_bytes: disk.OnBytes) -> None:
    try:
        disk.hard_link(source, target)
    except OSError as error:
        raise OutputError(
            "the file cannot be hard-linked",
            where=str(source),
            found=error.strerror,
            hint="leave --link out to copy it (both must be on one file system to link)",
        ) from error


def _copy(source: Path, target: Path, on_bytes: disk.OnBytes) -> None:
    before = source.stat()
    try:
        disk.copy_file(source, target, on_bytes)
    except EOFError:
        raise _ended(str(source)) from None
    after = source.stat()
    if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
        raise TeacherError("the teacher changed while it was read", where=str(source), hint="run again")


def _ended(where: str) -> TeacherError:
    return TeacherError("a file of the teacher ended while it was read", where=where, hint="run again")


# --- comparing --------------------------------------------------------------------------------------------------------


def same_file(file: PartFile, copy: Path) -> bool:
    """True if ``copy`` holds, byte for byte, what would be written."""
    if size_of(file) != copy.stat().st_size:
        return False
    with copy.open("rb") as copied:
        if isinstance(file, Made):
            return copied.read(len(file.head)) == file.head and _same_tensors(file.tensors, copied)
        head, source, offset = (b"", file, 0) if isinstance(file, Path) else (file.head, file.source, file.offset)
        if copied.read(len(head)) != head:
            return False
        if source is None:
            return not copied.read(1)
        with source.open("rb") as original:
            original.seek(offset)
            return _same_rest(original, copied)


def _same_tensors(tensors: Sequence[OutTensor], copied: BinaryIO) -> bool:
    return all(chunk == copied.read(len(chunk)) for tensor in tensors for chunk in tensor.chunks(CHUNK_BYTES))


def _same_rest(first: BinaryIO, second: BinaryIO) -> bool:
    while chunk := first.read(CHUNK_BYTES):
        if chunk != second.read(CHUNK_BYTES):
            return False
    return not second.read(1)
