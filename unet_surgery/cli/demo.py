"""``unet-surgery demo``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.options import TEACHER_HELP, Json, Quiet
from unet_surgery.cli.sink import command, hub_talk, say, show, show_json
from unet_surgery.errors import MissingExtraError, printable

if TYPE_CHECKING:
    from unet_surgery.app.demo import Demo

__all__ = ["demo"]


@command
def demo(
    model: Annotated[str, typer.Argument(help=f"Who draws. {TEACHER_HELP}")],
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            "-t",
            help="Who draws beside it; none: nobody. Default: the teacher that plan.json names, where it can be had.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="A pipeline that brings the other parts, for a U-Net alone.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Of 127.0.0.1; 0: any. Default: the first that is free from 7860 on.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. Default: fp16 on an NVIDIA GPU, else fp32.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw in the browser: a student beside its teacher, from the same noise. Needs the extra 'demo'.

    The page shows time and memory too. It is served to this machine alone, and loads nothing from elsewhere.
    From another machine, it is seen through ssh -L 7860:127.0.0.1:7860. Its address is printed when it can be opened;
    Ctrl-C ends it.

    Example: unet-surgery demo ./toy-bk_tiny
    """
    run = _serving()
    hub_talk(quiet)
    with run(model, teacher=teacher, base=base, port=port, device=device, dtype=dtype) as served:
        if as_json:
            told = {"model": served.model, "teacher": served.teacher, "no_teacher": served.no_teacher}
            show_json({"address": served.address, **told})
        else:
            show(served.address)
        if not quiet:
            beside = f" beside {served.teacher}" if served.teacher else ""
            say(f"{served.model}{beside}; Ctrl-C ends it")
            if served.no_teacher is not None:
                say(f"no teacher: {served.no_teacher}")
        try:
            served.wait()
        except KeyboardInterrupt:
            if not quiet:
                say("ended")


def _serving() -> Callable[..., Demo]:
    try:
        from unet_surgery.app.demo import demo as run
    except (ImportError, RuntimeError, OSError) as error:  # diffusers wraps what its imports raise
        raise MissingExtraError(
            "gradio, torch, diffusers and transformers are needed for this, and do not import",
            found=printable(str(error).replace("\n", " ")),
            hint="pip install 'unet-surgery[demo]'; unet-surgery doctor says what is missing",
        ) from error
    return run
