"""Who draws in the demo: the model, and beside it the teacher that its plan.json names, where it can be had."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch

from unet_surgery.checkpoint.check import read_plan
from unet_surgery.checkpoint.student import PLAN
from unet_surgery.checkpoint.teacher import LOCAL
from unet_surgery.errors import SurgeryError, VerificationError
from unet_surgery.evaluate.drawers import Drawer, load_drawer
from unet_surgery.hub import resolve_teacher
from unet_surgery.lower import SurgeryPlan
from unet_surgery.sample.draw import check_unet

__all__ = ["NO_TEACHER", "Models", "load_models"]

log = logging.getLogger(__name__)

NO_TEACHER = "none"


@dataclass(frozen=True, slots=True)
class Models:
    """The model that is shown, and its teacher, or None with the reason in words, if there is more to say."""

    student: Drawer
    teacher: Drawer | None
    no_teacher: str | None = None

    @property
    def drawers(self) -> tuple[Drawer, ...]:
        """Who draws, in order: the teacher first."""
        return (self.student,) if self.teacher is None else (self.teacher, self.student)


def load_models(
    model: str, teacher: str | None, base: str | None, *, device: torch.device, dtype: torch.dtype
) -> Models:
    """Load ``model``, and ``teacher``: a name as for ``model``, "none", or None for the one that plan.json names.

    ``base`` brings the other parts for U-Nets alone; a teacher and a student bring them for each other.

    Raises:
        UsageError: a U-Net alone has nobody to bring the other parts, or a model does not draw from text alone.
        TeacherError, HubError, VerificationError: a model that was asked for cannot be had, or is not whole.
    """
    plan = _plan_of(model) if teacher is None else None
    named = _teacher_of(plan) if teacher is None else None if teacher == NO_TEACHER else teacher
    student = load_drawer(model, base, fallback=named, device=device, dtype=dtype, hashed=False)
    check_unet(student.unet.config, student.parts)
    if named is None:
        why = None if plan is None else "its plan.json names a folder of some machine: give it with --teacher"
        return Models(student, None, why)
    try:
        drawer = load_drawer(named, None, fallback=base or model, device=device, dtype=dtype, hashed=False)
        check_unet(drawer.unet.config, drawer.parts)
        if plan is not None and drawer.parameters != plan.teacher.params:
            raise VerificationError(
                "this is another model than the one the student was made of",
                where=named,
                expected=f"{plan.teacher.params:,} parameters",
                found=f"{drawer.parameters:,}",
            )
    except SurgeryError as error:
        if teacher is not None:
            raise
        log.warning("the teacher that plan.json names, %s, cannot be used: %s", named, error)
        return Models(student, None, f"{named} cannot be used: {error.what}")
    return Models(student, _with_parts_of(student, drawer))


def _with_parts_of(student: Drawer, teacher: Drawer) -> Drawer:
    """Return the teacher with the student's VAE and text encoder in place of equal ones: memory holds each once."""
    ours, theirs = student.parts, teacher.parts
    shared = {
        name: getattr(ours, name)
        for name in ("vae", "text_encoder")
        if _are_equal(getattr(ours, name), getattr(theirs, name))
    }
    return replace(teacher, parts=replace(theirs, **shared))


def _are_equal(ours: Any, theirs: Any) -> bool:
    """Tell whether two networks are the same: configs but for remarks (``_…``), and every value."""
    if _settings(ours) != _settings(theirs):
        return False
    mine, others = ours.state_dict(), theirs.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def _settings(network: Any) -> dict[str, Any]:
    config = network.config.to_dict() if hasattr(network.config, "to_dict") else network.config  # transformers' has it
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _plan_of(model: str) -> SurgeryPlan | None:
    """Return the plan of a pruned folder, or None: it is something else."""
    found = resolve_teacher(model)
    if found.file is not None:
        return None
    path = found.folder / PLAN if found.hub is None else found.hub.own_file(PLAN)
    return read_plan(path) if path is not None and path.is_file() else None


def _teacher_of(plan: SurgeryPlan | None) -> str | None:
    """Return what one writes to mean the teacher of a plan; None for one that was a folder of some machine."""
    if plan is None or plan.teacher_id == LOCAL:
        return None
    return plan.teacher_id if plan.teacher_commit is None else f"{plan.teacher_id}@{plan.teacher_commit}"
