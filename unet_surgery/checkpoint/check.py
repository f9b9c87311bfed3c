"""``check``: is a student folder what its plan says, and are its bytes the teacher's? Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.components import read_components
from unet_surgery.checkpoint.header import MAX_HEADER_BYTES
from unet_surgery.checkpoint.jsonfile import MAX_JSON_BYTES, read_object, read_regular
from unet_surgery.checkpoint.layout import choose_weights
from unet_surgery.checkpoint.match import check_shapes
from unet_surgery.checkpoint.part_files import PartFiles, part_files, same_file
from unet_surgery.checkpoint.reader import Weights, open_weights
from unet_surgery.checkpoint.student import CONFIG, PLAN, RECIPE, TRAINING
from unet_surgery.checkpoint.teacher import TeacherFolder
from unet_surgery.checkpoint.writer import student_tensors
from unet_surgery.errors import (
    ConfigError,
    SurgeryError,
    TeacherError,
    UsageError,
    VerificationError,
    first_few,
    printable,
)
from unet_surgery.graph import UNetGraph, build, parse_config, remove
from unet_surgery.lower import SurgeryPlan, count, lower_config, shapes_of, weight_map
from unet_surgery.recipe.yamlfile import parse_yaml

__all__ = ["CheckReport", "check_identity", "check_student", "planned_graphs", "read_plan", "unet_folder"]

CHUNK_BYTES = 4 << 20
MAX_PLAN_BYTES = 2 * MAX_JSON_BYTES  # SDXL's has half a megabyte


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was checked. ``compared_bytes`` is 0 where no teacher was given.

    ``is_trained``: its weights are its own, and only names, shapes, dtypes and the other parts were compared.
    ``by_range``: it was compared with parts of the teacher's files, which cannot be compared with their checksums.
    """

    plan: SurgeryPlan
    unet: Path
    num_tensors: int
    num_zero_tensors: int
    compared_tensors: int
    compared_bytes: int
    compared_files: int
    by_range: bool = False
    is_trained: bool = False


def read_plan(student: Path) -> SurgeryPlan:
    """Read the plan of a student folder, or a plan.json itself.

    Raises:
        UsageError: there is nothing of that name.
        VerificationError: there is no plan in the folder, or it is none.
    """
    if not os.path.lexists(student):
        raise UsageError("there is no such student", where=str(student), expected="a folder, or a plan.json")
    path = student / PLAN if student.is_dir() else student
    try:
        text = read_regular(path, MAX_PLAN_BYTES).decode("utf-8")
    except (TeacherError, UnicodeDecodeError) as error:
        raise VerificationError(
            "there is no readable plan.json",
            where=str(path),
            found=(error.found or error.what) if isinstance(error, TeacherError) else printable(str(error)),
            hint="give a folder that unet-surgery prune wrote",
        ) from error
    try:
        return SurgeryPlan.from_json(text)
    except SurgeryError as error:
        raise error.at(str(path)) from None


def unet_folder(folder: Path) -> Path:
    """Return the U-Net's folder in a student folder."""
    return folder / "unet" if (folder / "unet").is_dir() else folder


def check_student(
    folder: Path,
    teacher: TeacherFolder | None,
    progress: disk.Progress,
    *,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> CheckReport:
    """Check config, header, names, shapes and dtypes against the plan, zeros, and with ``teacher`` every other byte.

    ``max_header_bytes`` bounds the student's headers; the teacher brings its own bound.

    Raises:
        VerificationError: something is not as planned; names the tensors.
        TeacherError: ``teacher`` is not the one of the plan, or cannot be read.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder", where=str(folder))
    plan = read_plan(folder)
    unet = unet_folder(folder)
    try:
        config = read_object(unet / CONFIG)
        choice = choose_weights(os.listdir(unet), None, where=str(unet))
        weights = open_weights(unet, choice, max_header_bytes=max_header_bytes)
    except TeacherError as error:
        raise _not_as_planned(error) from error
    with weights:
        _check_by_reference(weights)
        _check_plan(plan, folder, max_header_bytes)
        _check_config(plan, config, unet)
        _check_names(plan, weights, folder)
        is_trained = (folder / TRAINING).is_file()
        zeros = [name for name, source in plan.weights.items() if source is None and not is_trained]
        bad = [name for name in zeros if any(any(chunk) for chunk in _chunks(weights, name))]
        if bad:
            raise _differing("tensors that must be zero are not", bad, unet)
        if teacher is None:
            return CheckReport(plan, unet, len(weights), len(zeros), 0, 0, 0, is_trained=is_trained)
        with teacher.open_weights() as originals:
            check_identity(plan, originals, teacher)
            num_bytes = 0 if is_trained else _compare(plan, weights, originals, unet, progress)
            files = _compare_parts(folder, part_files(teacher, originals)) if unet != folder else 0
        compared = 0 if is_trained else len(weights) - len(zeros)
        return CheckReport(plan, unet, len(weights), len(zeros), compared, num_bytes, files, is_trained=is_trained)


def _not_as_planned(error: TeacherError) -> VerificationError:
    """Return what is wrong with a student, found by what reads teachers."""
    return VerificationError(
        error.what, where=error.where, expected=error.expected, found=error.found, hint="prune again"
    )


def _check_by_reference(weights: Weights) -> None:
    """Let the reference implementation of safetensors read the files as well: two readers must agree."""
    from safetensors import SafetensorError, safe_open

    for file in weights.files:
        try:
            with safe_open(file.path, framework="numpy") as reference:
                names = set(reference.keys())
        except SafetensorError as error:
            raise VerificationError(
                "the safetensors library cannot read the file", where=str(file.path), found=printable(str(error))
            ) from error
        if names != file.header.tensors.keys():
            raise VerificationError("the safetensors library finds other tensors in the file", where=str(file.path))


def _check_plan(plan: SurgeryPlan, folder: Path, max_header_bytes: int) -> None:
    """What the plan and the files beside it say twice must agree; a pipeline must have the parts that it names."""
    for side, config, counts in (
        ("teacher", plan.teacher_config, plan.teacher),
        ("student", plan.student_config, plan.student),
    ):
        try:
            counted = count(build(parse_config(config)))
        except ConfigError as error:
            raise VerificationError(
                "the plan holds a config that is none", where=f"{folder / PLAN}, {side}", found=error.what
            ) from error
        if counted != counts:
            raise VerificationError(
                "the plan's sizes are not those of its config",
                where=f"{folder / PLAN}, {side}",
                expected=f"{counted.params} parameters in {counted.tensors} tensors, {counted.macs} MACs",
                found=f"{counts.params} parameters in {counts.tensors} tensors, {counts.macs} MACs",
            )
    planned_graphs(plan, str(folder / PLAN))
    try:
        recipe = parse_yaml(read_regular(folder / RECIPE, MAX_JSON_BYTES).decode("utf-8"), RECIPE).data
    except (SurgeryError, UnicodeDecodeError) as error:
        found = error.what if isinstance(error, SurgeryError) else printable(str(error))
        raise VerificationError("the recipe cannot be read", where=str(folder / RECIPE), found=found) from error
    if recipe != plan.recipe:
        raise VerificationError("the recipe is not the plan's", where=str(folder / RECIPE), hint="prune again")
    if unet_folder(folder) == folder:
        return
    try:
        read_components(folder, None, max_header_bytes=max_header_bytes)
    except TeacherError as error:
        raise _not_as_planned(error) from error


def planned_graphs(plan: SurgeryPlan, where: str) -> tuple[UNetGraph, UNetGraph]:
    """Return the graphs of teacher and student, the student's with the teacher's modules as sources.

    ``where`` is what errors call the plan. A plan is a claim: the student's config and the source of every tensor must
    follow from the teacher's config and what was removed.

    Raises:
        VerificationError: they do not, or what the plan removes cannot be removed.
    """
    try:
        config = parse_config(plan.teacher_config)
        whole = build(config)
        left = remove(whole, plan.removed)
        sources, student_config = weight_map(left), lower_config(config.raw, left)
    except (SurgeryError, KeyError, IndexError) as error:
        raise VerificationError(
            "what the plan removes cannot be removed", where=where, found=printable(str(error))
        ) from error
    names = sources.keys() | plan.weights.keys()
    wrong = sorted(name for name in names if sources.get(name, "") != plan.weights.get(name, ""))
    if wrong or student_config != plan.student_config:
        raise VerificationError(
            "the plan's config or weight map does not follow from what it removes",
            where=where,
            found=f"{len(wrong)} tensors of another source: {first_few(wrong)}" if wrong else "another config",
            hint="prune again",
        )
    return whole, left


def _check_config(plan: SurgeryPlan, config: dict[str, object], unet: Path) -> None:
    keys = sorted(config.keys() | plan.student_config.keys())
    # as JSON text: 4, 4.0 and true are equal to Python
    wrong = [key for key in keys if _as_json(config, key) != _as_json(plan.student_config, key)]
    if wrong:
        key = wrong[0]
        raise VerificationError(
            "the config is not the plan's",
            where=f"{unet / CONFIG}, key {printable(key)}",
            expected=printable(plan.student_config.get(key, "no such key")),
            found=printable(config.get(key, "no such key")) + (f"; {len(wrong) - 1} more keys" if wrong[1:] else ""),
        )


def _as_json(config: Mapping[str, object], key: str) -> str | None:
    return json.dumps(config[key]) if key in config else None


def _check_names(plan: SurgeryPlan, weights: Weights, folder: Path) -> None:
    unet = unet_folder(folder)
    expected = shapes_of(build(parse_config(plan.student_config)))
    check_shapes(expected, weights.shapes(), where=str(unet), source="the plan", error=VerificationError)
    if plan.dtype is not None:
        wrong = [name for name in weights if weights.info(name).dtype != plan.dtype]
        if wrong:
            raise _differing(f"tensors are not {plan.dtype}, as the plan says", wrong, unet)
    num_bytes = sum(weights.tensor_bytes().values())
    if num_bytes != plan.student_bytes:
        raise VerificationError(
            "the weights have another size than planned: their dtypes are not the plan's",
            where=str(unet),
            expected=f"{plan.student_bytes} bytes",
            found=f"{num_bytes} bytes",
        )


def check_identity(plan: SurgeryPlan, originals: Weights, teacher: TeacherFolder) -> None:
    """Check that ``teacher``, with the weights ``originals``, is the one that the plan is of.

    Raises:
        TeacherError: its config or its tensors are others.
    """
    recorded = plan.teacher_weights
    if recorded is None:
        return
    want = sorted(f.header_sha256 for f in recorded.files)
    have = sorted(f.header.sha256 for f in originals.files)
    missing = [source for source in plan.weights.values() if source is not None and source not in originals]
    if missing or (want != have and teacher.config != plan.teacher_config):
        raise TeacherError(
            "this is not the teacher that the student was made from",
            where=str(teacher.unet),
            expected=f"a header with sha256 {want[0][:16]}…",
            found=f"{have[0][:16]}…",
            hint="give the folder (and --variant) that was pruned",
        )


def _compare(plan: SurgeryPlan, weights: Weights, originals: Weights, unet: Path, progress: disk.Progress) -> int:
    """Compare every copied tensor with the teacher's, converted where the plan converts; return bytes compared."""
    tensors = [t for t in student_tensors(plan, originals) if t.content is not None]
    total = sum(t.num_bytes for t in tensors)
    done = 0
    bad = []
    for tensor in tensors:
        source = plan.weights[tensor.name]
        assert source is not None
        if weights.info(tensor.name).dtype != tensor.dtype or not _same(weights, tensor.name, originals, source):
            bad.append(tensor.name)
        done += tensor.num_bytes
        progress(done, total)
    if bad:
        raise _differing("tensors differ from the teacher's", bad, unet)
    return total


def _same(weights: Weights, name: str, originals: Weights, source: str) -> bool:
    ours, theirs = weights.info(name), originals.info(source)
    if ours.dtype == theirs.dtype:
        return all(a == b for a, b in zip(_chunks(weights, name), _chunks(originals, source), strict=True))
    from unet_surgery.checkpoint.cast import cast

    ratio = ours.num_bytes / theirs.num_bytes
    mine = _chunks(weights, name, int(CHUNK_BYTES * ratio))
    return all(a == cast(b, theirs.dtype, ours.dtype) for a, b in zip(mine, _chunks(originals, source), strict=True))


def _chunks(weights: Weights, name: str, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    file, info, _ = weights.locate(name)
    for start in range(0, info.num_bytes, size):
        yield os.pread(file.fd, min(size, info.num_bytes - start), info.offset + start)


def _compare_parts(folder: Path, parts: PartFiles) -> int:
    """Compare the other parts with the teacher's; a file may also be what --normalize makes of the teacher's."""
    for component in parts.components:
        for path in sorted((folder / component.name).iterdir()):
            if f"{component.name}/{path.name}" not in {**parts.files, **parts.mended}:
                raise VerificationError(
                    "a file that the teacher does not have", where=str(path), hint="remove it, or prune again"
                )
    for name in {**parts.files, **parts.mended}:
        copy = folder / name
        if name not in parts.files and not copy.exists():
            continue  # a file that only --normalize adds
        forms = [files[name] for files in (parts.files, parts.mended) if name in files]
        if not copy.is_file() or not any(same_file(form, copy) for form in forms):
            raise VerificationError("a copied file differs from the teacher's", where=str(copy), hint="prune again")
    return len(parts.files)


def _differing(what: str, names: list[str], unet: Path) -> VerificationError:
    return VerificationError(f"{len(names)} {what}", where=str(unet), found=first_few(names), hint="prune again")
