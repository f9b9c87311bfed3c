"""A student's ControlNet as a folder that diffusers loads: written whole, or not at all."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.check import check_identity, unet_folder
from unet_surgery.checkpoint.controlcard import write_control_card
from unet_surgery.checkpoint.foreign import recognise_names
from unet_surgery.checkpoint.header import MAX_HEADER_BYTES
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.layout import UNET_BASE, WeightsChoice, choose_weights
from unet_surgery.checkpoint.licence import CARD, find_licence
from unet_surgery.checkpoint.match import check_dtypes, check_shapes
from unet_surgery.checkpoint.reader import Weights, open_weights
from unet_surgery.checkpoint.staging import Staging
from unet_surgery.checkpoint.student import CONFIG, SLACK_SECONDS
from unet_surgery.checkpoint.target import check_apart, check_space
from unet_surgery.checkpoint.teacher import TeacherFolder
from unet_surgery.checkpoint.tensorfile import OutTensor, in_file_order, write_tensors
from unet_surgery.errors import ContainerError, OutputError, TeacherError, first_few, printable
from unet_surgery.graph import UNetGraph, build, parse_config
from unet_surgery.lower import (
    CONTROL_CLASS,
    ControlNetPlan,
    SurgeryPlan,
    carry_controlnet,
    control_shapes,
    shapes_of,
    start_controlnet,
)

__all__ = ["ControlNetFolder", "ControlOptions", "open_controlnet", "write_controlnet"]

WEIGHTS = f"{UNET_BASE}.safetensors"
CAST = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class ControlNetFolder:
    """A trained ControlNet on disk; its weights are not open yet."""

    root: Path
    config: Mapping[str, Any]
    weights: WeightsChoice


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """How to write: the seed of what is new, replacing; ``version`` is this package's, for the card."""

    version: str
    seed: int = 0
    force: bool = False
    max_header_bytes: int = MAX_HEADER_BYTES


def open_controlnet(path: Path, variant: str | None, *, max_header_bytes: int = MAX_HEADER_BYTES) -> ControlNetFolder:
    """Describe the ControlNet in the folder ``path``.

    Raises:
        TeacherError: there is none; says what is there instead (a T2I adapter, a LoRA, a single file).
    """
    if not os.path.lexists(path):
        hint = "a ControlNet on the Hub is downloaded first: hf download ORG/NAME --local-dir DIR"
        raise TeacherError("there is no such ControlNet", where=printable(str(path)), expected="a folder", hint=hint)
    if not path.is_dir():
        found = _what_is([path], max_header_bytes)
        raise TeacherError("the ControlNet is not a folder", where=str(path), expected=_FOLDER, found=found)
    names = sorted(os.listdir(path))
    if CONFIG not in names:
        found = _what_is([path / name for name in names if name.endswith(".safetensors")], max_header_bytes)
        raise TeacherError(
            "there is no ControlNet in this folder",
            where=str(path),
            expected=_FOLDER,
            found=found or first_few(names) or "an empty folder",
        )
    config = read_object(path / CONFIG)
    if config.get("_class_name") != CONTROL_CLASS:
        raise TeacherError(
            "this is not a ControlNet",
            where=f"{path / CONFIG}, key _class_name",
            expected=CONTROL_CLASS,
            found=printable(config.get("_class_name", "no such key")),
        )
    return ControlNetFolder(path, config, choose_weights(names, variant, where=str(path)))


_FOLDER = f"a folder with {CONFIG} and {WEIGHTS}, as diffusers writes it"


def _what_is(files: list[Path], max_header_bytes: int) -> str | None:
    """Return what the first of some files holds, as far as its names tell."""
    for file in files:
        choice = WeightsChoice(file.name, sharded=False, variant=None)
        try:
            with open_weights(file.parent, choice, max_header_bytes=max_header_bytes) as weights:
                return recognise_names(list(weights)) or f"a safetensors file of {len(weights)} tensors"
        except ContainerError as error:
            return error.found or error.what
    return None


def write_controlnet(
    folder: Path,
    plan: SurgeryPlan,
    graphs: tuple[UNetGraph, UNetGraph],
    out: Path,
    options: ControlOptions,
    progress: disk.Progress,
    *,
    teacher: TeacherFolder | None = None,
    controlnet: ControlNetFolder | None = None,
) -> ControlNetPlan:
    """Write a ControlNet for the student in ``folder`` to ``out``, and return what was made of what.

    ``graphs`` are the plan's teacher and student. ``controlnet`` is carried over; without it the student's own weights
    begin a new one, with the mid of ``teacher`` where the student has none.

    Raises:
        InexpressibleError: ``ControlNetModel`` cannot hold the student's down side.
        TeacherError: ``teacher`` or ``controlnet`` is not one of the plan, or a file is damaged.
        OutputError: ``out`` exists, is or holds what it is made of, has no room, or cannot be written.
    """
    whole, student = graphs
    roots = {"student": folder}
    if controlnet is not None:
        decided = carry_controlnet(plan.student_config, student, whole, plan.weights, controlnet.config)
        roots["ControlNet"] = controlnet.root
    else:
        decided = start_controlnet(plan.student_config, student, None if teacher is None else whole)
    if teacher is not None:
        roots["teacher"] = teacher.root
    for whose, root in roots.items():
        check_apart(out, root, whose)
    with ExitStack() as opened:
        sources = _open_sources(opened, folder, plan, teacher, controlnet, options)
        tensors = in_file_order(_out_tensors(decided, sources, options.seed))
        licence = find_licence(folder, family=plan.family)
        if controlnet is not None:
            licence = find_licence(controlnet.root, family=plan.family)  # its weights are none of the student's
        texts = {name: text.encode("utf-8") for name, text in licence.files.items()}
        texts[CONFIG] = (json.dumps(decided.config, indent=2, sort_keys=True) + "\n").encode()
        # the card last: _check_replaceable
        texts[CARD] = write_control_card(plan, decided, licence, options.version, options.seed).encode("utf-8")
        with Staging(out, replace=_check_replaceable if options.force else None) as staging:
            total = sum(tensor.num_bytes for tensor in tensors)
            check_space(staging.folder.parent, total + sum(map(len, texts.values())))
            _write_weights(staging.folder / WEIGHTS, tensors, total, progress)
            for name, data in texts.items():
                disk.write_file(staging.folder / name, data)
            for weights in sources.values():
                weights.check_unchanged()
            staging.commit()
    return decided


def _open_sources(
    opened: ExitStack,
    folder: Path,
    plan: SurgeryPlan,
    teacher: TeacherFolder | None,
    controlnet: ControlNetFolder | None,
    options: ControlOptions,
) -> dict[str, Weights]:
    """Open what the ControlNet is made of, each checked to be what it should be."""
    if controlnet is not None:
        weights = open_weights(controlnet.root, controlnet.weights, max_header_bytes=options.max_header_bytes)
        opened.enter_context(weights)
        check_shapes(control_shapes(controlnet.config), weights.shapes(), where=str(controlnet.root))
        check_dtypes(weights.dtypes(), where=str(controlnet.root))
        return {"controlnet": weights}
    unet = unet_folder(folder)
    choice = choose_weights(os.listdir(unet), None, where=str(unet))
    weights = opened.enter_context(open_weights(unet, choice, max_header_bytes=options.max_header_bytes))
    check_shapes(shapes_of(build(parse_config(plan.student_config))), weights.shapes(), where=str(unet))
    check_dtypes(weights.dtypes(), where=str(unet))
    sources = {"student": weights}
    if teacher is not None:
        sources["teacher"] = opened.enter_context(teacher.open_weights())
        check_shapes(
            shapes_of(build(parse_config(plan.teacher_config))), sources["teacher"].shapes(), where=str(teacher.unet)
        )
        check_identity(plan, sources["teacher"], teacher)
    return sources


def _out_tensors(decided: ControlNetPlan, sources: Mapping[str, Weights], seed: int) -> list[OutTensor]:
    """Return what to write: copies in the dtype they are stored in, what is new in the one that most of them have."""
    main = sources["controlnet" if "controlnet" in sources else "student"]
    counts = main.stored().dtypes
    common = max(counts, key=lambda dtype: counts[dtype])
    tensors = []
    for name, shape, origin, source in decided.tensors:
        if source is None or origin == "zeros":
            dtype = common if common in CAST else "F32"
            content = None if origin == "zeros" else _fresh(name, shape, _fan_in(name, decided), seed, dtype)
            tensors.append(OutTensor(name, dtype, shape, content))
            continue
        located = sources[origin].locate(source)
        convert = origin == "teacher" and common in CAST
        tensors.append(OutTensor(name, common if convert else located.info.dtype, shape, (located,)))
    return tensors


def _fan_in(name: str, decided: ControlNetPlan) -> int:
    """Return how many inputs the layer of a tensor has; 0 for a norm."""
    weight = name.rpartition(".")[0] + ".weight"
    shape = next(tensor.shape for tensor in decided.tensors if tensor.name == weight)
    return prod(shape[1:]) if len(shape) > 1 else 0


def _fresh(name: str, shape: tuple[int, ...], fan_in: int, seed: int, dtype: str) -> bytes:
    """Return values as torch initialises convolutions and linear layers, uniform within 1/√fan_in; norms are identity.

    Each tensor is seeded by its name, so that none depends on which others there are.
    """
    import numpy as np

    from unet_surgery.checkpoint.cast import cast

    if fan_in:
        generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])))
        bound = 1 / sqrt(fan_in)
        values = generator.random(prod(shape), dtype=np.float32)
        values *= 2 * bound
        values -= bound
    else:
        values = np.full(prod(shape), 1 if name.endswith("weight") else 0, dtype=np.float32)
    return cast(values.astype("<f4", copy=False).tobytes(), "F32", dtype)


def _write_weights(path: Path, tensors: list[OutTensor], total: int, progress: disk.Progress) -> None:
    on_bytes = disk.counting(progress, total)
    fd = disk.create(path)
    try:
        write_tensors(fd, tensors, on_bytes)
    finally:
        os.close(fd)


def _check_replaceable(folder: Path) -> None:
    """``force`` replaces an empty folder or a ControlNet that this wrote, and that nobody trained or added to since."""
    names = set(os.listdir(folder))
    if not names:
        return
    card = _card(folder, names)
    own = {CONFIG, WEIGHTS, CARD} | {name for name in names if f"]({name.replace(' ', '%20')})" in card}
    if "\n- unet-surgery\n" not in card or names - own:
        raise OutputError(
            "--force replaces ControlNets that unet-surgery wrote, and this folder holds something else",
            where=str(folder),
            found=first_few(sorted(names - own)) or None,
            hint="move it away yourself, or choose another --out",
        )
    written = (folder / CARD).stat().st_mtime
    changed = sorted(name for name in names if (folder / name).stat().st_mtime > written + SLACK_SECONDS)
    if changed:
        raise OutputError(
            "--force would delete files that were changed since they were written",
            where=str(folder),
            found=first_few(changed),
            hint="move it away, or choose another --out",
        )


def _card(folder: Path, names: Collection[str]) -> str:
    try:
        return (folder / CARD).read_text("utf-8") if CARD in names else ""
    except (OSError, UnicodeDecodeError):
        return ""
