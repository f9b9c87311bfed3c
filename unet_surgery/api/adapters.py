"""The verbs for what works beside a U-Net: controlnet, transplant."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.api.surgery import named, no_progress
from unet_surgery.checkpoint.adapters import find_lora, lora_name, transplant_file
from unet_surgery.checkpoint.check import planned_graphs, read_plan
from unet_surgery.checkpoint.controlnet import ControlOptions, open_controlnet, write_controlnet
from unet_surgery.checkpoint.disk import Progress
from unet_surgery.checkpoint.header import MAX_HEADER_BYTES
from unet_surgery.checkpoint.sizes import parse_size
from unet_surgery.checkpoint.teacher import TeacherFolder
from unet_surgery.errors import UsageError, printable
from unet_surgery.hub import ResolvedTeacher, fetch_teacher, resolve_teacher
from unet_surgery.hub.open import open_resolved, opened_header
from unet_surgery.lower import ControlNetPlan, SurgeryPlan, Transplant
from unet_surgery.version import __version__

__all__ = ["ControlNetResult", "TransplantResult", "controlnet", "transplant"]

MID = "mid_block."


@dataclass(frozen=True, slots=True)
class ControlNetResult:
    """A ControlNet that was written for a student: its folder, and what was made of what."""

    folder: Path
    plan: ControlNetPlan


@dataclass(frozen=True, slots=True)
class TransplantResult:
    """A LoRA that was written for a student: its file, the student's plan, and what became of it."""

    file: Path
    plan: SurgeryPlan
    transplant: Transplant


def controlnet(
    student: str | Path,
    out: str | Path | None = None,
    *,
    teacher: str | Path | None = None,
    controlnet: str | Path | None = None,
    seed: int = 0,
    variant: str | None = None,
    force: bool = False,
    max_header: str | int = MAX_HEADER_BYTES,
    progress: Progress = no_progress,
) -> ControlNetResult:
    """Write a ControlNet for the student in a folder to ``out`` (default: ``./<student>-controlnet``).

    It begins as the student's own down side, with the mid of ``teacher`` where the student has none, and adds exactly
    nothing until it is trained. With ``controlnet``, the folder of one that was trained for the teacher, that one is
    carried over. ``variant`` is of the weights of ``teacher`` and ``controlnet``; ``seed`` is for what is new.

    Raises:
        InexpressibleError: diffusers' ``ControlNetModel`` cannot hold the student's down side.
        TeacherError, HubError: ``teacher`` or ``controlnet`` is not one of the plan's, or cannot be read.
        VerificationError: there is no plan, or it contradicts itself.
        OutputError: ``out`` exists (without ``force``), has no room, or cannot be written.
    """
    if teacher is not None and controlnet is not None:
        raise UsageError(
            "a ControlNet that is carried over brings its own mid",
            expected="--teacher or --controlnet, not both",
            hint="leave --teacher out",
        )
    if not 0 <= seed < 1 << 63:
        raise UsageError("this is not a seed", expected="an integer from 0 to 2**63 - 1", found=printable(seed))
    folder, max_bytes = Path(student), parse_size(max_header)
    if folder.exists() and not folder.is_dir():
        raise UsageError("the student is not a folder", where=str(folder), expected="a folder that prune wrote")
    decided = read_plan(folder)
    graphs = planned_graphs(decided, str(folder))
    target = Path(f"{os.path.basename(os.path.abspath(folder))}-controlnet" if out is None else out)
    opened = None
    if teacher is not None:
        of_teacher = decided.teacher_variant if variant is None else variant
        if decided.teacher_variant is not None and of_teacher != decided.teacher_variant:
            raise UsageError(
                "the student was made of other weights of its teacher",
                expected=f"--variant {decided.teacher_variant}",
                found=f"--variant {of_teacher}",
                hint="leave --variant out: the plan knows it",
            )
        opened = _with_mid(resolve_teacher(named(teacher), variant=of_teacher), max_header, progress)
    trained = None if controlnet is None else open_controlnet(Path(controlnet), variant, max_header_bytes=max_bytes)
    options = ControlOptions(__version__, seed, force, max_bytes)
    result = write_controlnet(folder, decided, graphs, target, options, progress, teacher=opened, controlnet=trained)
    return ControlNetResult(target, result)


def transplant(
    lora: str | Path,
    student: str | Path,
    out: str | Path | None = None,
    *,
    force: bool = False,
    max_header: str | int = MAX_HEADER_BYTES,
) -> TransplantResult:
    """Write a LoRA that was trained on a student's teacher to ``out`` as one for the student.

    ``student`` is its folder or plan.json; ``out`` is ``./<lora>-<recipe>.safetensors`` by default. Modules are renamed
    as the plan renumbers them; what acts on removed ones is dropped and listed. No value is changed.

    Raises:
        TeacherError: it is no LoRA for that teacher, is damaged, or nothing of it is left.
        VerificationError: there is no plan, or it contradicts itself.
        OutputError: ``out`` exists (without ``force``), or cannot be written.
    """
    decided = read_plan(Path(student))
    graphs = planned_graphs(decided, str(student))
    file = find_lora(Path(lora))
    target = Path(f"{lora_name(file)}-{_recipe_name(decided)}.safetensors" if out is None else out)
    result = transplant_file(file, decided, graphs, target, force=force, max_header_bytes=parse_size(max_header))
    return TransplantResult(target, decided, result)


def _with_mid(found: ResolvedTeacher, max_header: str | int, progress: Progress) -> TeacherFolder:
    """Describe the teacher; of one on the Hub, its mid is fetched."""
    early = open_resolved(found, max_header=max_header)
    with opened_header(early) as weights:
        mid = [weights.locate(name) for name in weights if name.startswith(MID)] if weights is not None else []
    found = fetch_teacher(found, unet_only=True, progress=progress)
    if found.remote is not None:
        wanted: dict[str, list[tuple[int, int]]] = {}
        for file, info, _ in mid:
            wanted.setdefault(file.path.name, []).append((info.offset, info.offset + info.num_bytes))
        found.remote.fetch(wanted, lambda _count: None)
    return open_resolved(found, max_header=max_header)


def _recipe_name(decided: SurgeryPlan) -> str:
    """Return a recipe's name for a file's; a plan that was read may claim any."""
    name = decided.recipe.get("name")
    return name if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]{0,63}", name) else "student"
