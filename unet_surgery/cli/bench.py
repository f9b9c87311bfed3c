"""``unet-surgery bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.options import TEACHER_HELP, Json, Quiet, size_of
from unet_surgery.cli.sink import TwoBars, command, say, show, show_json, table

if TYPE_CHECKING:
    from rich.table import Table

    from unet_surgery.evaluate.benchresult import BenchReport, BenchRow, PictureTime
    from unet_surgery.evaluate.timing import Spread

__all__ = ["bench"]

NOTHING = "–"
LATENT = "latent, w×h"


@command
def bench(
    models: Annotated[
        list[str], typer.Argument(help=f"One or more; the first is what others are compared with. {TEACHER_HELP}")
    ],
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Run them; or count parameters and MACs only, without torch.")
    ] = True,
    random: Annotated[
        bool,
        typer.Option("--random", help="Make random weights by the configs: as fast, and nothing large is fetched."),
    ] = False,
    latent: Annotated[
        str | None, typer.Option(help="Size in latents: 64, or 96x64 (width x height). Default: each model's own.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="fp32, bf16 or fp16; may be given several times. Default: fp16 on a GPU, else fp32."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Samples of a forward; may be given several times. Default: 1.")
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="Above 1, forwards of twice the batch are timed as well: what a guided step takes.")
    ] = 7.5,
    steps: Annotated[
        int | None, typer.Option(help="Draw whole pictures of so many steps as well: text encoder, U-Net, VAE.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", "-s", help="Of the pictures. Default: the model's own.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="A pipeline that brings the other parts, for a U-Net alone.")
    ] = None,
    pictures: Annotated[int, typer.Option(help="Rounds of pictures.")] = 3,
    rounds: Annotated[int, typer.Option(help="Rounds of forwards; each takes every model once.")] = 10,
    warm_up: Annotated[int, typer.Option("--warm-up", help="Rounds before these that do not count.")] = 2,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure the peak of memory; on a CPU in other processes.")
    ] = True,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the U-Nets, and compare what they then give with before.")
    ] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="The memory layout that GPUs convolve fastest in.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the JSON to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare what U-Nets cost: parameters, MACs, and on this machine time and memory. Running them needs torch.

    MACs are of batch 1: convolutions and linear layers, as the BK-SDM paper counts; and all, with attention's products.
    Models are timed in turn, round after round; times are medians with quartiles. A ratio that the noise does not allow
    has a question mark. A model that does not fit in memory has a row that says so, and the exit code is 1.

    Example: unet-surgery bench tiny-random toy --device cpu
    """
    import json

    from unet_surgery.checkpoint.target import check_new_file, write_target

    if out is not None:
        check_new_file(out, force=force)
    from unet_surgery.evaluate.bench import bench as measure

    with TwoBars("timing", quiet) as bars:
        report = measure(
            models,
            run=run,
            latent=size_of("latent", latent, "64 or 96x64"),
            device=device,
            dtypes=dtype or (),
            batches=batch or (1,),
            random=random,
            base=base,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            pictures=pictures,
            compiled=compiled,
            channels_last=channels_last,
            rounds=rounds,
            warm_up=warm_up,
            memory=memory,
            progress=bars.works,
            fetching=bars.fetches,
        )
    data = report.to_json()
    if as_json:  # first: what was measured is not lost to a full disk
        show_json(data)
    else:
        for part in _tables(report) if run else [_sizes(report)]:
            show(part)
    if out is not None:
        write_target(out, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(), force=force)
    _tell(report, quiet=quiet)
    if any(row.failed is not None for row in report.rows):
        raise typer.Exit(1)


# -- tables ------------------------------------------------------------------------------------------------------------


def _sizes(report: BenchReport) -> Table:
    from unet_surgery.cli.format import share
    from unet_surgery.evaluate.published import models_of_size

    first = report.rows[0]
    rows = [
        (
            row.model,
            f"{row.parameters:,}",
            share(row.parameters, first.parameters),
            _giga(row.macs_conv_linear),
            _giga(row.macs_all),
            share(row.macs_all, first.macs_all) if row.latent == first.latent else NOTHING,
            _wide(row),
            ", ".join(model.name for model in models_of_size(row.parameters)) or NOTHING,
        )
        for row in report.rows
    ]
    columns = ("U-Net", "parameters", "share", "MACs, conv+linear", "all", "share", LATENT, "of the size of")
    return table(columns, rows, right=range(1, 7))


def _wide(row: BenchRow) -> str:
    """Return width × height, as --latent has them."""
    return f"{row.latent[1]}×{row.latent[0]}"


def _giga(macs: int) -> str:
    """Return MACs as papers quote them."""
    return f"{macs / 1e9:,.1f} G" if macs >= 10**8 else f"{macs / 1e6:,.1f} M"


def _tables(report: BenchReport) -> list[Table | str]:
    """Return for each setting its caption and its table; a column that nothing was measured for is left out."""
    parts: list[Table | str] = [_machine(report)]
    settings = dict.fromkeys((row.dtype, row.batch) for row in report.rows)
    for setting in settings:
        rows = [row for row in report.rows if (row.dtype, row.batch) == setting]
        cells = [_cells(row) for row in rows]
        filled = [name for name in cells[0] if any(cell[name] != NOTHING for cell in cells)]
        caption = _caption(rows[0])
        if len({row.latent for row in rows}) == 1:
            filled.remove(LATENT)
            caption += f", latents {cells[0][LATENT]} (w×h)"
        lines = [[cell[name] for name in filled] for cell in cells]
        parts += [caption, table(filled, lines, right=range(1, len(filled)))]
    return parts


def _cells(row: BenchRow) -> dict[str, str]:
    from unet_surgery.lower import quantity

    failed = row.failed if row.unet_ms is None and row.failed else None
    return {
        "U-Net": row.model,
        "params": quantity(row.parameters),
        "MACs": _giga(row.macs_conv_linear),
        "all MACs": _giga(row.macs_all),
        LATENT: _wide(row),
        "forward, ms": failed or _spread(row.unet_ms),
        "guided, ms": _spread(row.guided_ms),
        "picture, s": _spread(row.picture_s),
        "memory": NOTHING if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f} MB",
        "of peak": NOTHING if row.flop_share is None else f"{row.flop_share:.0%}",
        "ratio": _ratio(row),
    }


def _spread(found: Spread | PictureTime | None) -> str:
    return NOTHING if found is None else f"{_short(found.median)} ({_short(found.low)}–{_short(found.high)})"


def _short(number: float) -> str:
    """Return three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _ratio(row: BenchRow) -> str:
    if row.ratio_to_first is None:
        return NOTHING
    return f"{row.ratio_to_first:.3g}" + ("?" if row.ratio_is_clear is False else "")


def _machine(report: BenchReport) -> str:
    machine = report.machine
    rates = [f"{name} {rate:.3g}" for name, rate in machine["matmul_tflops"].items() if rate is not None]
    threads = f"{machine['threads']} thread" + ("" if machine["threads"] == 1 else "s")
    parts = (machine["device"], machine["cpu"], threads, f"torch {machine['torch']}")
    return ", ".join(parts) + (f"; matrix product, TFLOP/s: {', '.join(rates)}" if rates else "")


def _caption(row: BenchRow) -> str:
    words = [f"{row.dtype}, batch {row.batch}"]
    words += ["compiled"] if row.compile else []
    words += ["channels last"] if row.channels_last else []
    words += ["random weights"] if row.weights == "random" else []
    return ", ".join(words)


def _tell(report: BenchReport, *, quiet: bool) -> None:
    for row in report.rows:
        if row.failed is not None:
            say(f"note: {row.model}, {row.dtype}, batch {row.batch}: {row.failed}")
    if quiet:
        return
    for row in report.rows:
        if row.may_equal_first and row.ratio_interval is not None:
            low, high = row.ratio_interval
            say(
                f"note: {row.model}, {row.dtype}, batch {row.batch}: as fast as the first, for all that was seen: the "
                f"ratio is {low:.3g} to {high:.3g} with 95 %"
            )
    if any(row.ratio_is_clear is False for row in report.rows):
        say("note: a ratio with a question mark is lost in the noise: more --rounds, or a machine that does less else")
    if len({row.latent for row in report.rows}) > 1:
        say("note: the models are of different latent sizes, and are not compared; --latent gives them one")
