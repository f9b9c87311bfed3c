"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from unet_surgery.errors import UsageError, printable

__all__ = [
    "DEFAULT_MAX_HEADER",
    "TEACHER_HELP",
    "Base",
    "Compared",
    "Config",
    "Dtype",
    "Json",
    "MaxHeader",
    "Quiet",
    "RecipeName",
    "Teacher",
    "TeacherArgument",
    "TeacherId",
    "Variant",
    "size_of",
]

DEFAULT_MAX_HEADER = "8MiB"

TEACHER_HELP = (
    "A diffusers folder (pipeline or U-Net), a single .safetensors file, a Hub id org/name\\[/folder or "
    "/file]\\[@revision], or a built-in name: "
    "toy, tiny-random, sd-v1-random, …"
)

RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="A built-in recipe (see: unet-surgery recipes) or a YAML file.")
]
Teacher = Annotated[str | None, typer.Option("--teacher", "-t", help=f"{TEACHER_HELP} Default: the recipe's own.")]
Compared = Annotated[
    str | None,
    typer.Option("--teacher", "-t", help=f"Compare with this teacher. {TEACHER_HELP} Default: compare nothing."),
]
TeacherArgument = Annotated[str, typer.Argument(help=TEACHER_HELP)]
TeacherId = Annotated[str | None, typer.Option("--teacher-id", help="What the card calls a local teacher: its Hub id.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="A pipeline that brings the other parts, where the teacher is a U-Net alone or a single file."
    ),
]
Config = Annotated[
    str | None,
    typer.Option("--config", help="For a single file: the U-Net's config.json, or a model that has the same."),
]
Variant = Annotated[
    str | None, typer.Option("--variant", help="Take the weights of this variant: fp16, …; of a single file: ema.")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="Convert weights to fp32, fp16 or bf16. Default: copy them as they are.")
]
MaxHeader = Annotated[
    str, typer.Option("--max-header", help="Refuse safetensors headers larger than this (SD v1's has 84 KB).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary; results and errors only.")]


def size_of(name: str, text: str | None, expected: str) -> int | tuple[int, int] | None:
    """Return the side, or (height, width), of what people write as width x height after ``--name``.

    Raises:
        UsageError: it is neither; says what was ``expected``.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})(?:[x×](\d{1,6}))?", text.strip().lower())
    if match is None:
        raise UsageError(f"--{name} is not a size", expected=expected, found=printable(text))
    return int(match[1]) if match[2] is None else (int(match[2]), int(match[1]))
