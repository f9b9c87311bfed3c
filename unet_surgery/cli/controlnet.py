"""``unet-surgery controlnet``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.check import Student
from unet_surgery.cli.options import DEFAULT_MAX_HEADER, TEACHER_HELP, MaxHeader, Quiet, Variant
from unet_surgery.cli.sink import command, progress_bar, say, show

if TYPE_CHECKING:
    from unet_surgery.derive import ControlNetResult

__all__ = ["controlnet"]

MIDS = {
    "student": "the student's",
    "teacher": "the teacher's",
    "controlnet": "the ControlNet's own",
    "fresh": "new (UNetMidBlock2D, random)",
}


@command
def controlnet(
    folder: Student,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", "-t", help=f"Take its mid where the student has none. {TEACHER_HELP}"),
    ] = None,
    trained: Annotated[
        Path | None,
        typer.Option("--controlnet", "-c", help="Carry this ControlNet over: a folder, trained for the teacher."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The ControlNet's folder. Default: ./<student>-controlnet.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="For what is new: random numbers as torch draws them.")] = 0,
    variant: Variant = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a ControlNet that is there already.")] = False,
    max_header: MaxHeader = DEFAULT_MAX_HEADER,
    quiet: Quiet = False,
) -> None:
    """Write a ControlNet for a student: a stock ControlNetModel that fits its skips, also where it has no mid.

    A new one is the student's own down side and adds exactly nothing until it is trained; --controlnet carries over
    one that was trained for the teacher. It prints the ControlNet's path.

    Example: unet-surgery controlnet ./my-small --teacher ./my-finetune
    """
    from unet_surgery.derive import controlnet as run

    with progress_bar("writing", quiet) as progress:
        result = run(
            folder,
            out,
            teacher=teacher,
            controlnet=trained,
            seed=seed,
            variant=variant,
            force=force,
            max_header=max_header,
            progress=progress,
        )
    show(str(result.folder))
    if not quiet:
        _tell(result, folder, carried=trained is not None)


def _tell(result: ControlNetResult, folder: Path, *, carried: bool) -> None:
    from math import prod

    from unet_surgery.lower import quantity

    plan = result.plan
    size = quantity(sum(prod(tensor.shape) for tensor in plan.tensors))
    note = f" ({plan.mid_note})" if plan.mid_note else ""
    say(f"a ControlNet of {size} parameters in {len(plan.tensors)} tensors; its mid is {MIDS[plan.mid]}{note}")
    begin = (
        "it was trained for the teacher: train it on with the student" if carried else "it adds nothing yet: train it"
    )
    script = "train_controlnet_sdxl.py" if plan.config["addition_embed_type"] else "train_controlnet.py"
    words = ["--pretrained_model_name_or_path", str(folder), "--controlnet_model_name_or_path", str(result.folder)]
    say(f"next:  {begin}, say with diffusers' examples/controlnet/{script} {shlex.join(words)}")
