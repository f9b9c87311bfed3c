"""The entry point: the list of commands. Each lives in its own module and imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from unet_surgery import __version__
from unet_surgery.cli.bench import bench
from unet_surgery.cli.cache import cache
from unet_surgery.cli.check import check
from unet_surgery.cli.controlnet import controlnet
from unet_surgery.cli.convert import convert
from unet_surgery.cli.data import data
from unet_surgery.cli.demo import demo
from unet_surgery.cli.distill import distill
from unet_surgery.cli.doctor import doctor
from unet_surgery.cli.draw import draw
from unet_surgery.cli.export import export
from unet_surgery.cli.generate import generate
from unet_surgery.cli.inspect import inspect
from unet_surgery.cli.plan import plan
from unet_surgery.cli.prune import prune
from unet_surgery.cli.push import push
from unet_surgery.cli.recipes import recipes
from unet_surgery.cli.report import report
from unet_surgery.cli.score import score
from unet_surgery.cli.sink import set_debug, show
from unet_surgery.cli.stats import stats
from unet_surgery.cli.transplant import transplant
from unet_surgery.cli.verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="unet-surgery",
    help="Make Stable Diffusion U-Nets smaller by taking blocks out, declaratively.",
    epilog="Start with: unet-surgery recipes, then unet-surgery plan --recipe bk_tiny --teacher tiny-random",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        show(f"unet-surgery {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[  # noqa: ARG001  # its callback acts
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")] = False,
) -> None:
    set_debug(debug)


app.command()(inspect)
app.command()(plan)
app.command()(draw)
app.command()(prune)
app.command()(check)
app.command()(verify)
app.command()(distill)
app.command()(export)
app.command()(push)
app.command()(controlnet)
app.command()(transplant)
app.command()(convert)
app.command()(cache)
app.command()(report)
app.command()(generate)
app.command()(score)
app.command()(bench)
app.command()(stats)
app.command()(demo)
app.command()(doctor)
app.add_typer(recipes, name="recipes")
app.add_typer(data, name="data")


def main() -> None:
    """Run the command line."""
    app()
