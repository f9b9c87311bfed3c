"""``unet-surgery distill``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.options import Quiet
from unet_surgery.cli.sink import command, error_console, progress_bar, say, show
from unet_surgery.errors import UsageError

if TYPE_CHECKING:
    from unet_surgery.distill.run import Progress

__all__ = ["distill"]

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key of the run file: --set optimizer.lr=1e-4. May be given several times."),
]


@command
def distill(
    run: Annotated[str, typer.Argument(help="A run file (YAML); examples/runs/ has the published ones.")],
    changes: Changes = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole run file, defaults filled in, and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run costs and what it would be refused for, and stop.")
    ] = False,
    tflops: Annotated[
        float | None,
        typer.Option(
            "--tflops", min=0.001, help="For --dry-run: what a device does, in TFLOP/s. Default: 0.4 of its peak."
        ),
    ] = None,
    find_batch: Annotated[
        bool, typer.Option("--find-batch", help="Try which micro_batch fits this device, and stop. Writes nothing.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            min=1,
            help="For --dry-run and --find-batch: of the run to come. Default: the launcher's, or 1.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For --dry-run and --find-batch: print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a student to do what its teacher does, or go on where a run stopped. Needs torch.

    Everything is in the run file. The same command goes on after a crash or a signal: the run's folder holds
    checkpoints, metrics.jsonl and, at the end, the student.

    For many processes: accelerate launch -m unet_surgery.distill RUN.yaml

    Before paying: --dry-run needs configs only, --find-batch needs the device.

    Example: unet-surgery distill examples/runs/bk_tiny.yaml --dry-run --tflops 350
    """
    from unet_surgery.distill.runfile import load_run, to_yaml

    dry_run, find_batch = dry_run and not print_config, find_batch and not (print_config or dry_run)
    _refuse_unused("--tflops", tflops is not None, "--dry-run", dry_run)
    for option, is_given in (("--processes", processes is not None), ("--json", as_json)):
        _refuse_unused(option, is_given, "--dry-run or --find-batch", dry_run or find_batch)
    config = load_run(run, changes or ()).config
    if print_config:
        show(to_yaml(config).removesuffix("\n"))
        return
    if dry_run:
        from unet_surgery.cli.distillreport import report_dry_run

        num_processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
        if not report_dry_run(config, tflops=tflops, num_processes=num_processes, as_json=as_json):
            raise typer.Exit(2)
        return
    if find_batch:
        from unet_surgery.cli.distillreport import report_find_batch

        report_find_batch(config, num_processes=processes or 1, quiet=quiet, as_json=as_json)
        return
    is_main = os.environ.get("RANK", "0") == "0"
    quiet = quiet or not is_main
    logging.getLogger("unet_surgery").setLevel(logging.WARNING if quiet else logging.INFO)
    from unet_surgery.distill.run import distill as train

    with progress_bar("fetching", quiet) as on_bytes, _training_bar(quiet) as on_progress:
        result = train(config, on_progress=on_progress, on_bytes=on_bytes)
    if result.stopped_by is not None:
        if is_main:
            say(f"stopped after step {result.step}, and saved; the same command goes on from there")
        raise typer.Exit(128 + result.stopped_by)
    if is_main:
        show(str(result.student))
    if not quiet:
        say(f"next:  unet-surgery verify {result.student}    load and run it in diffusers")
        say(f"       unet-surgery push {result.student} NAME/MODEL    to the Hub")


def _refuse_unused(option: str, is_given: bool, goes_with: str, is_there: bool) -> None:
    """An option that changes nothing was meant to change something."""
    if is_given and not is_there:
        raise UsageError(f"{option} goes with {goes_with} only", hint=f"add {goes_with}, or leave {option} out")


@contextmanager
def _training_bar(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Yield what shows how far a run is: a bar on a terminal, a line each time elsewhere."""
    if quiet or sys.stderr is None:
        yield lambda _: None
    elif not sys.stderr.isatty():
        yield lambda p: say(f"step {p.step}/{p.num_steps}  {_details(p)}")
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[details]}"))
        with Bars(*columns, console=error_console(), transient=True) as bars:
            task = bars.add_task("training", total=None, details="")

            def update(progress: Progress) -> None:
                bars.update(task, completed=progress.step, total=progress.num_steps, details=_details(progress))

            yield update


def _details(progress: Progress) -> str:
    mfu = "" if progress.mfu is None else f"  {progress.mfu:.1%} of the peak"
    rate = f"{progress.images_per_second:.3g} images/s"
    return f"loss {progress.loss:.4g}  {rate}{mfu}  {_duration(progress.seconds_left)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
