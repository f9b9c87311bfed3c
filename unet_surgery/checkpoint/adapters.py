"""A LoRA's file for another model: the same bytes under another header."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.foreign import recognise_names
from unet_surgery.checkpoint.header import MAX_HEADER_BYTES, TensorInfo, encode_header
from unet_surgery.checkpoint.layout import WeightsChoice
from unet_surgery.checkpoint.reader import OpenFile, open_weights
from unet_surgery.checkpoint.target import check_target, write_target
from unet_surgery.errors import SurgeryError, TeacherError, first_few
from unet_surgery.graph import UNetGraph
from unet_surgery.lower import SurgeryPlan, Transplant, make_transplant, module_moves, renamed_metadata

__all__ = ["find_lora", "lora_name", "transplant_file"]

LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring tensors of the file that are all kept."""

    offset: int
    num_bytes: int


def find_lora(path: Path) -> Path:
    """Return the LoRA's file: ``path``, or the one that diffusers writes into a folder.

    Raises:
        TeacherError: there is none.
    """
    if not os.path.lexists(path):
        raise TeacherError("there is no such LoRA", where=str(path), expected=f"a file, or a folder with {LORA_FILE}")
    if not path.is_dir():
        return path
    if not os.path.lexists(path / LORA_FILE):
        raise TeacherError(
            "there is no LoRA in this folder",
            where=str(path),
            expected=LORA_FILE,
            found=first_few(sorted(os.listdir(path))) or "an empty folder",
            hint="name the .safetensors file itself",
        )
    return path / LORA_FILE


def lora_name(file: Path) -> str:
    """Return what a LoRA is called: its file's name, or its folder's where that is the one everybody's file has."""
    return os.path.basename(os.path.dirname(os.path.abspath(file))) if file.name == LORA_FILE else file.stem


def transplant_file(
    file: Path,
    plan: SurgeryPlan,
    graphs: tuple[UNetGraph, UNetGraph],
    out: Path,
    *,
    force: bool = False,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> Transplant:
    """Write the LoRA in ``file`` to ``out``, its modules named as in the student.

    ``graphs`` are the teacher's and the student's. Tensors keep their order and their bytes. ``out`` is there whole
    when this returns, or as it was before.

    Raises:
        TeacherError: the file is no LoRA for the plan's teacher, nothing of it is left, or it is damaged.
        OutputError: ``out`` exists (without ``force``), or cannot be written.
    """
    check_target(out, file, force=force)
    choice = WeightsChoice(file.name, sharded=False, variant=None)
    with open_weights(file.parent, choice, max_header_bytes=max_header_bytes) as weights:
        (opened,) = weights.files
        tensors = dict(sorted(opened.header.tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)))
        _check_kind(tensors, file)
        teacher, student = graphs
        try:
            moves = module_moves(teacher, student, plan.unused, plan.removed)
            decided = make_transplant(teacher, moves, {name: info.shape for name, info in tensors.items()})
            metadata = renamed_metadata(opened.header.metadata, moves, decided.modules)
        except SurgeryError as error:
            error.where = f"{file}, {error.where}" if error.where else str(file)
            raise

        def write(fd: int) -> None:
            _write(fd, opened, tensors, decided.names, metadata)

        write_target(out, write, force=force)
    return decided


def _check_kind(names: Collection[str], file: Path) -> None:
    what = recognise_names(names)
    if what is not None and not what.startswith("a LoRA"):
        raise TeacherError("this is not a LoRA", where=str(file), found=what)


def _write(
    fd: int, file: OpenFile, tensors: Mapping[str, TensorInfo], names: Mapping[str, str], metadata: Mapping[str, str]
) -> None:
    kept = [(new, tensors[old]) for old, new in names.items()]
    disk.write(fd, encode_header([(name, info.dtype, info.shape) for name, info in kept], metadata))
    try:
        for run in _runs([info for _, info in kept]):
            disk.copy_range(file.fd, run.offset, run.num_bytes, fd)
    except EOFError:
        raise TeacherError("the LoRA's file ended while it was read", where=str(file.path), hint="run again") from None
    file.check_unchanged()


def _runs(infos: list[TensorInfo]) -> list[_Run]:
    runs: list[_Run] = []
    for info in infos:
        if runs and runs[-1].offset + runs[-1].num_bytes == info.offset:
            runs[-1] = _Run(runs[-1].offset, runs[-1].num_bytes + info.num_bytes)
        else:
            runs.append(_Run(info.offset, info.num_bytes))
    return runs
