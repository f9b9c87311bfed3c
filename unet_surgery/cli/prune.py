"""``unet-surgery prune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.options import (
    DEFAULT_MAX_HEADER,
    Base,
    Config,
    Dtype,
    MaxHeader,
    Quiet,
    RecipeName,
    Teacher,
    TeacherId,
    Variant,
)
from unet_surgery.cli.sink import command, progress_bar, say, show

if TYPE_CHECKING:
    from unet_surgery.hub import Transfer

__all__ = ["prune"]


@command
def prune(
    recipe: RecipeName,
    teacher: Teacher = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The student's folder. Default: ./<teacher>-<recipe>.")
    ] = None,
    base: Base = None,
    config: Config = None,
    variant: Variant = None,
    dtype: Dtype = None,
    unet_only: Annotated[bool, typer.Option("--unet-only", help="Write the U-Net alone, not the pipeline.")] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Split larger weights into files of this size.")
    ] = "10GB",
    link: Annotated[
        bool, typer.Option("--link", help="Hard-link the pipeline's other files instead of copying.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a student that is there already.")] = False,
    normalize: Annotated[
        bool,
        typer.Option("--normalize", help="Mend copied parts that older libraries cannot read (names, extra files)."),
    ] = False,
    license_id: Annotated[
        str | None,
        typer.Option("--license", help="The teacher's licence, where its card names none: creativeml-openrail-m, …"),
    ] = None,
    teacher_id: TeacherId = None,
    full: Annotated[
        bool, typer.Option("--full", help="Of a Hub teacher, fetch whole files, and compare them with their checksums.")
    ] = False,
    max_header: MaxHeader = DEFAULT_MAX_HEADER,
    quiet: Quiet = False,
) -> None:
    """Write the student of a recipe and a teacher: a folder that plain diffusers loads.

    Every kept weight is the teacher's, bit for bit, unless --dtype converts it. The folder is there whole at the
    end, or not at all. It prints the student's path.

    Example: unet-surgery prune --recipe bk_tiny --teacher ./my-finetune --out ./my-tiny
    """
    import shlex
    import time

    from unet_surgery.api import prune as run
    from unet_surgery.cli.format import change, gigabytes
    from unet_surgery.errors import OutputError
    from unet_surgery.lower import quantity

    if out is not None and out.exists() and Path.cwd().is_relative_to(out.resolve()):
        raise OutputError(
            "the output is the working directory, or around it",
            where=str(out),
            hint="go to its parent folder first: replacing it would take the ground from under the shell",
        )
    start = time.perf_counter()
    with progress_bar("pruning", quiet) as progress:
        result = run(
            recipe,
            teacher,
            out,
            variant=variant,
            dtype=dtype,
            unet_only=unet_only,
            max_shard_size=max_shard_size,
            link=link,
            force=force,
            normalize=normalize,
            license=license_id,
            teacher_id=teacher_id,
            max_header=max_header,
            full=full,
            base=base,
            config=config,
            progress=progress,
        )
    show(str(result.folder))
    if quiet:
        return
    plan, seconds = result.plan, time.perf_counter() - start
    before, after = plan.teacher, plan.student
    if result.transfer is not None:
        _say_transfer(result.transfer)
    kind = "pipeline" if result.is_pipeline else "U-Net"
    say(
        f"{plan.recipe['name']} of {teacher or plan.teacher_id}: a {kind} with {quantity(after.params)} parameters "
        f"({change(before.params, after.params)}) and {quantity(after.macs)} MACs ({change(before.macs, after.macs)}); "
        f"{gigabytes(plan.student_bytes)} of U-Net weights; {seconds:.1f} s in all"
    )
    student = shlex.quote(str(result.folder))
    named = teacher or str(plan.recipe.get("teacher"))
    if plan.teacher_commit is not None and "@" not in named:
        named += f"@{plan.teacher_commit}"
    again = f" --teacher {shlex.quote(named)}"
    again += f" --base {shlex.quote(base)}" if base and result.is_pipeline else ""
    again += f" --variant {shlex.quote(variant)}" if variant else ""
    say(f"next:  unet-surgery check {student}{again}    every byte against the teacher's")
    say(f"       unet-surgery verify {student}    load and run it in diffusers (needs torch)")
    say("An untrained student draws broken pictures: distil it from its teacher before use.")


def _say_transfer(transfer: Transfer) -> None:
    from unet_surgery.cli.format import gigabytes

    text = f"from the Hub: {gigabytes(transfer.num_bytes)} transferred"
    if transfer.by_range:
        text += f", {gigabytes(transfer.saved_bytes)} saved by fetching only what the student keeps"
        text += "; parts of a file cannot be compared with its checksum: --full fetches and compares the whole"
    say(text)
