"""``unet-surgery draw``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.options import DEFAULT_MAX_HEADER, MaxHeader, Quiet, Teacher, Variant
from unet_surgery.cli.sink import command, say, show

if TYPE_CHECKING:
    from unet_surgery.lower import SurgeryPlan

__all__ = ["draw"]

DEFAULT_WIDTH = 1840
"""Of a PNG: twice the width that the picture is laid out in."""

Drawn = Annotated[
    Path | None, typer.Argument(metavar="STUDENT", help="A folder that unet-surgery prune wrote, or its plan.json.")
]
OptionalRecipe = Annotated[
    str | None, typer.Option("--recipe", "-r", help="Draw what this recipe would do: a built-in name or a YAML file.")
]


@command
def draw(
    student: Drawn = None,
    recipe: OptionalRecipe = None,
    teacher: Teacher = None,
    variant: Variant = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="A file .svg or .png, or - for stdout. Default: ./<teacher>-<recipe>.svg."),
    ] = None,
    width: Annotated[
        int | None, typer.Option("--width", help=f"The width of a PNG in pixels. Default: {DEFAULT_WIDTH}.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    max_header: MaxHeader = DEFAULT_MAX_HEADER,
    quiet: Quiet = False,
) -> None:
    """Draw the teacher's U-Net, with what is removed from it as ghosts: an SVG, or a PNG.

    Of a student, of a recipe on a teacher, or of a teacher alone. The SVG is light or dark as its reader prefers, a
    PNG is light, and needs the extra "png" or the program rsvg-convert. It prints the file's path.

    Example: unet-surgery draw --recipe bk_tiny --teacher sd-v1-random
    """
    from unet_surgery.picture import draw as picture_of

    _check_arguments(student, recipe, teacher, variant)
    if out == "-":
        _check_width(width, is_png=False)
        show(picture_of(_plan(student, recipe, teacher, variant, max_header)).rstrip("\n"))
        return
    if out is not None:  # refused before anything is read
        _check_target(Path(out), width, force=force)
    plan = _plan(student, recipe, teacher, variant, max_header)
    target = Path(_default_name(student, recipe, teacher, variant) if out is None else out)
    _check_target(target, width, force=force)
    svg = picture_of(plan)
    if target.suffix == ".png":
        from unet_surgery.picture.png import to_png

        data = to_png(svg, DEFAULT_WIDTH if width is None else width)
    else:
        data = svg.encode()
    _write(target, data, force=force)
    show(str(target))
    if not quiet:
        from unet_surgery.lower import quantity

        before, after = quantity(plan.teacher.params), quantity(plan.student.params)
        say(f"{before} parameters before, {after} after" if plan.removed else f"{before} parameters")


def _check_arguments(student: Path | None, recipe: str | None, teacher: str | None, variant: str | None) -> None:
    from unet_surgery.errors import UsageError

    if student is None and recipe is None and teacher is None:
        raise UsageError("nothing to draw", expected="a student, or --recipe, or --teacher")
    if student is not None and not (recipe is None and teacher is None and variant is None):
        raise UsageError(
            "a student is drawn from its own plan",
            expected="a student alone, or --recipe and --teacher without one",
            hint="leave out --recipe, --teacher and --variant",
        )


def _check_target(target: Path, width: int | None, *, force: bool) -> None:
    """Refuse a format that there is not, and to replace what is there."""
    from unet_surgery.errors import OutputError, UsageError

    if target.suffix not in (".svg", ".png"):
        raise UsageError(
            "the picture's format is not known",
            where=str(target) or "--out",
            expected="a file .svg or .png, or - for stdout",
        )
    _check_width(width, is_png=target.suffix == ".png")
    if os.path.lexists(target) and not (force and target.is_file()):
        hint = "choose another --out" if not target.is_file() else "choose another --out, or --force to replace it"
        raise OutputError("the output exists", where=str(target), hint=hint)


def _check_width(width: int | None, *, is_png: bool) -> None:
    from unet_surgery.errors import UsageError

    if width is not None and not is_png:
        raise UsageError("an SVG has no width in pixels", hint="leave out --width, or write .png")


def _plan(
    student: Path | None, recipe: str | None, teacher: str | None, variant: str | None, max_header: str
) -> SurgeryPlan:
    from unet_surgery.api import plan, plan_whole
    from unet_surgery.checkpoint.check import read_plan

    if student is not None:
        return read_plan(student)
    if recipe is not None:
        return plan(recipe, teacher, variant=variant, max_header=max_header)
    assert teacher is not None
    return plan_whole(teacher, variant=variant)


def _default_name(student: Path | None, recipe: str | None, teacher: str | None, variant: str | None) -> str:
    """Return the file's name as prune would name the folder; a student's is its own."""
    if student is not None:
        if student.is_file() and student.name != "plan.json":
            return f"{student.stem}.svg"
        folder = student if student.is_dir() else student.parent
        return f"{os.path.basename(os.path.abspath(folder))}.svg"
    from unet_surgery.hub import resolve_teacher
    from unet_surgery.recipe import load_recipe

    chosen = None if recipe is None else load_recipe(recipe)
    text = teacher or (chosen.teacher if chosen else None) or ""
    found = resolve_teacher(text, variant=variant)
    return f"{found.name}-{chosen.name}.svg" if chosen else f"{found.name}.svg"


def _write(target: Path, data: bytes, *, force: bool) -> None:
    from unet_surgery.checkpoint import disk
    from unet_surgery.errors import OutputBusyError, OutputError

    try:
        disk.replace_file(target, data, force=force)
    except FileExistsError:
        raise OutputError("the output appeared meanwhile", where=str(target), hint="choose another --out") from None
    except BlockingIOError as error:
        raise OutputBusyError("another process is writing this file", where=str(target)) from error
    except OSError as error:
        raise OutputError("the file cannot be written", where=str(target), found=error.strerror) from error
