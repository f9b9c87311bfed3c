"""``unet-surgery report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unet_surgery.cli.options import Json, Quiet
from unet_surgery.cli.sink import command, say, show, show_json

__all__ = ["report"]


@command
def report(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help="Any number of: a folder that prune, distill or generate wrote, the JSON of score, bench or plan.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page, a file .html.")] = Path("report.html"),
    png: Annotated[
        Path | None, typer.Option("--png", help="A new folder for the plots as PNG. Needs the extra 'report'.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="The page's heading.")] = None,
    rows: Annotated[int, typer.Option("--rows", help="How many prompts a grid of pictures shows.")] = 8,
    force: Annotated[bool, typer.Option("--force", help="Replace a page, and plots, that are there already.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what came of it on one page: sizes, losses, scores, pictures, quality against size and time.

    The page is one HTML file that needs nothing else; published results stand beside yours, marked as such. What an
    input is, is found by looking at it. It prints the page's path.

    Example: unet-surgery report ./student ./distilled ./drawn/teacher ./drawn/student scores.json --out report.html
    """
    from unet_surgery.results.report import report as run

    result = run(inputs, out, png=png, title=title, rows=rows, force=force)
    if as_json:
        show_json(
            {
                "page": str(result.page),
                "bytes": result.num_bytes,
                "plots": [str(path) for path in result.plots],
                "left_out": list(result.left_out),
            }
        )
        return
    show(str(result.page))
    if not quiet:
        plots = f"; {len(result.plots)} plot{'s' if len(result.plots) != 1 else ''} in {png}" if png is not None else ""
        say(f"{result.num_bytes / 1e6:.1f} MB{plots}")
        for text in result.left_out:
            say(f"left out: {text}")
