"""``unet-surgery convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unet_surgery.cli.options import Quiet
from unet_surgery.cli.sink import command, say, show

__all__ = ["convert"]


@command
def convert(
    file: Annotated[Path, typer.Argument(help="A pickle of torch: .ckpt, .bin, .pt or .pth.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The new file. Default: beside it, as .safetensors.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    quiet: Quiet = False,
) -> None:
    """Make safetensors of a pickle: values and dtypes stay, and no code in it is ever run. Needs torch.

    It is opened in a process of its own, by torch's restricted unpickler. What is no tensor (an optimizer, a step) is
    left out and named. It prints the new file's path.

    Example: unet-surgery convert ./model/unet/diffusion_pytorch_model.bin
    """
    from unet_surgery import convert as run
    from unet_surgery.cli.format import gigabytes
    from unet_surgery.errors import first_few

    result = run(file, out, force=force)
    show(str(result.file))
    if quiet:
        return
    wrapper = f", found behind {result.wrapper}" if result.wrapper else ""
    say(f"{result.num_tensors} tensors, {gigabytes(result.num_bytes)}{wrapper}")
    if result.num_dropped:
        say(f"left out {result.num_dropped} that are no tensors of it: {first_few(result.dropped)}")
    if result.num_shared:
        say(f"{result.num_shared} shared memory with another and are written by themselves: {first_few(result.shared)}")
