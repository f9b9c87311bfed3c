"""``make_plan``: decide a surgery, check it, and account for every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unet_surgery.graph.build import build
from unet_surgery.graph.config import UNetConfig
from unet_surgery.graph.family import family_of
from unet_surgery.graph.nodes import UNetGraph
from unet_surgery.graph.remove import remove
from unet_surgery.graph.select import Selection
from unet_surgery.graph.verify import verify
from unet_surgery.lower.config import lower_config
from unet_surgery.lower.counts import Counts, count_modules, part_of
from unet_surgery.lower.features import feature_map
from unet_surgery.lower.modules import Placed, modules
from unet_surgery.lower.plan import Bypassed, Part, StoredWeights, SurgeryPlan
from unet_surgery.lower.skips import changed_skips
from unet_surgery.lower.weights import unused_tensors, weight_map

__all__ = ["BYTES_PER_PARAM", "make_plan"]

BYTES_PER_PARAM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def make_plan(
    config: UNetConfig,
    selection: Selection,
    *,
    recipe: Mapping[str, Any],
    teacher_id: str,
    teacher_commit: str | None = None,
    teacher_variant: str | None = None,
    allow_skip_change: bool = False,
    weights: StoredWeights | None = None,
    tensor_bytes: Mapping[str, int] | None = None,
    dtype: str | None = None,
    teacher: UNetGraph | None = None,
) -> SurgeryPlan:
    """Decide a surgery: remove ``selection`` from the graph of ``config``, check, lower, and account for every tensor.

    ``tensor_bytes`` (teacher tensor → stored bytes) and ``weights`` come from the header; without them
    the plan assumes fp32. ``dtype`` is a safetensors name (``F16``) to convert to. ``teacher`` spares a second build.

    Raises:
        InexpressibleError: stock diffusers cannot hold the student, or the teacher's tensors do not fit it.
    """
    whole = build(config) if teacher is None else teacher
    left = remove(whole, selection.nodes)
    verify(whole, left, allow_skip_change=allow_skip_change)
    student_config = lower_config(config.raw, left)
    mapping = weight_map(left)
    before, after = list(modules(whole)), list(modules(left))
    student_counts = count_modules(after)
    return SurgeryPlan(
        recipe=recipe,
        teacher_id=teacher_id,
        teacher_commit=teacher_commit,
        teacher_variant=teacher_variant,
        family=family_of(whole),
        teacher_config=config.raw,
        teacher_weights=weights,
        teacher=count_modules(before),
        student_config=student_config,
        student=student_counts,
        student_bytes=_student_bytes(after, student_counts, tensor_bytes, dtype),
        dtype=dtype,
        parts=_parts(before, after),
        removed=dict(selection.nodes),
        skipped=selection.skipped,
        changed_skips=changed_skips(whole, left),
        bypassed=_bypassed(left, after),
        weights=mapping,
        unused=unused_tensors(whole, mapping, selection),
        features=feature_map(whole, left),
        carried_keys=config.unknown_keys,
    )


def _parts(before: list[Placed], after: list[Placed]) -> tuple[Part, ...]:
    teacher = _by_part(before)
    student = _by_part([placed._replace(path=placed.source) for placed in after])
    return tuple(
        Part(name, count_modules(items), count_modules(student.get(name, ()))) for name, items in teacher.items()
    )


def _by_part(placed: list[Placed]) -> dict[str, list[Placed]]:
    parts: dict[str, list[Placed]] = {}
    for item in placed:
        parts.setdefault(part_of(item), []).append(item)
    return parts


def _bypassed(student: UNetGraph, placed: list[Placed]) -> tuple[Bypassed, ...]:
    attentions = [layer.attention for stage in student.stages for layer in stage.layers]
    if student.mid is not None:
        attentions.append(student.mid.attention)
    paths = [a.source for a in attentions if a is not None and a.bypass]
    return tuple(Bypassed(path, sum(p.module.num_params for p in placed if p.source == path + ".")) for path in paths)


def _student_bytes(
    after: list[Placed], counts: Counts, tensor_bytes: Mapping[str, int] | None, dtype: str | None
) -> int:
    if dtype is not None or tensor_bytes is None:
        return counts.params * BYTES_PER_PARAM[dtype or "F32"]
    return sum(tensor_bytes[placed.source + t.name] for placed in after for t in placed.module.tensors)
