"""``unet-surgery check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unet_surgery.cli.options import DEFAULT_MAX_HEADER, Base, Compared, Json, MaxHeader, Quiet, Variant
from unet_surgery.cli.sink import command, progress_bar, show, show_json

__all__ = ["Student", "check"]

Student = Annotated[Path, typer.Argument(help="A folder that unet-surgery prune wrote.")]


@command
def check(
    folder: Student,
    teacher: Compared = None,
    base: Base = None,
    variant: Variant = None,
    max_header: MaxHeader = DEFAULT_MAX_HEADER,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a student against its plan and, with --teacher, every copied byte against the teacher's. Needs no torch.

    Example: unet-surgery check ./sd-v1-random-bk_tiny --teacher sd-v1-random
    """
    from unet_surgery.api import check as run
    from unet_surgery.cli.format import gigabytes

    with progress_bar("comparing", quiet) as progress:
        report = run(folder, teacher, base=base, variant=variant, max_header=max_header, progress=progress)
    if as_json:
        from dataclasses import asdict

        data = asdict(report)
        del data["plan"]
        show_json({**data, "unet": str(report.unet)})
        return
    if quiet:
        return
    show(f"{folder}: config, {report.num_tensors} tensor names, shapes and dtypes are the plan's")
    if report.num_zero_tensors:
        show(f"{report.num_zero_tensors} tensors are zeros, as planned")
    if report.is_trained:
        files = f"; {report.compared_files} other files equal the teacher's" if teacher is not None else ""
        show(f"it was trained, so its weights are its own and were not compared{files}")
    elif teacher is None:
        show("bytes were not compared: give --teacher")
    else:
        show(
            f"{report.compared_tensors} tensors, {gigabytes(report.compared_bytes)}, equal the teacher's"
            + (f" after conversion to {report.plan.dtype}" if report.plan.dtype else ", bit for bit")
            + (f"; so do {report.compared_files} other files" if report.compared_files else "")
        )
        if report.by_range:
            show("the teacher's came from the Hub in parts, which cannot be compared with the file's checksum")
