"""``unet-surgery plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.options import (
    DEFAULT_MAX_HEADER,
    Config,
    Dtype,
    Json,
    MaxHeader,
    RecipeName,
    Teacher,
    TeacherId,
    Variant,
)
from unet_surgery.cli.sink import command, show, table

if TYPE_CHECKING:
    from unet_surgery.lower import SurgeryPlan

__all__ = ["plan", "show_plan"]


@command
def plan(
    recipe: RecipeName,
    teacher: Teacher = None,
    variant: Variant = None,
    dtype: Dtype = None,
    teacher_id: TeacherId = None,
    config: Config = None,
    max_header: MaxHeader = DEFAULT_MAX_HEADER,
    as_json: Json = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph's differences, node by node.")] = False,
) -> None:
    """Show what a recipe would do to a teacher. Nothing is written.

    Needs the config, and reads the weights' header where there is one. --json prints the whole plan, with the
    source of every tensor.

    Example: unet-surgery plan --recipe bk_tiny --teacher sd-v1-random
    """
    from unet_surgery.api import plan as make

    decided = make(
        recipe, teacher, variant=variant, dtype=dtype, teacher_id=teacher_id, config=config, max_header=max_header
    )
    if as_json:
        show(decided.to_json().rstrip("\n"))
    elif graph:
        from unet_surgery.graph import build, diff, parse_config, remove

        whole = build(parse_config(decided.teacher_config))
        show(diff(whole, remove(whole, decided.removed)).rstrip("\n"))
    else:
        show_plan(decided, teacher)


def show_plan(plan: SurgeryPlan, teacher: str | None = None) -> None:
    """Print a plan: sizes, stages, config, skips, what is unused and why, what will be written."""
    from unet_surgery.cli.format import change, gigabytes, value, weights_line
    from unet_surgery.errors import first_few
    from unet_surgery.lower import quantity

    before, after = plan.teacher, plan.student
    show(f"{plan.recipe['name']} on {teacher or plan.teacher_id}" + (f" ({plan.family})" if plan.family else ""))
    show(weights_line(plan.teacher_weights))
    rows = [("parameters", f"{before.params:,}", f"{after.params:,}", change(before.params, after.params))]
    rows.append(("tensors", str(before.tensors), str(after.tensors), change(before.tensors, after.tensors)))
    for label, b, a in (
        ("MACs, conv + linear", before.macs, after.macs),
        ("MACs, all", before.macs_all, after.macs_all),
    ):
        rows.append((label, quantity(b), quantity(a), change(b, a)))
    show(table(("", "teacher", "student", ""), rows, right=(1, 2, 3)))
    parts = [
        (
            part.name,
            quantity(part.teacher.params),
            quantity(part.student.params) if part.student.tensors else "removed",
            quantity(part.teacher.macs_all),
            quantity(part.student.macs_all) if part.student.tensors else "",
        )
        for part in plan.parts
    ]
    columns = ("part (teacher's name)", "params", "after", "MACs (all)", "after")
    show(table(columns, parts, right=(1, 2, 3, 4)))
    changes = [(c.key, value(c.teacher), value(c.student)) for c in plan.config_changes()]
    show(table(("config.json", "teacher", "student"), changes))
    if plan.changed_skips:
        skips = [(s.layer, s.teacher_skip, s.student_skip) for s in plan.changed_skips]
        show(table(("up layer", "its skip in the teacher", "in the student"), skips))
    unused = [(selector, str(len(names)), names[0]) for selector, names in plan.unused.items()]
    show(table(("selector", "unused tensors", "the first"), unused, right=(1,)))
    for skipped in plan.skipped:
        show(f"skipped: {skipped.parent} has no {skipped.missing} ({skipped.selector})")
    for bypassed in plan.bypassed:
        why = "its stage keeps other attentions"
        if bypassed.attention.startswith("mid_block"):
            why = "stock diffusers has no mid of two resnets without one"
        show(
            f"bypassed: {bypassed.attention}: {bypassed.params_left:,} parameters stay, because {why}; its proj_out is "
            "zeroed, so it adds nothing"
        )
    if plan.carried_keys:
        show(f"config keys that diffusers does not know, carried along: {first_few(plan.carried_keys)}")
    copied = sum(source is not None for source in plan.weights.values())
    renamed = sum(source not in (None, name) for name, source in plan.weights.items())
    how = f"converted to {plan.dtype}" if plan.dtype else "copied byte for byte"
    show(
        f"weights: {copied} tensors {how}, {renamed} of them under another name; "
        f"{len(plan.weights) - copied} zeroed; {gigabytes(plan.student_bytes)} to write"
    )
