"""``unet-surgery export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.options import DEFAULT_MAX_HEADER, Dtype, MaxHeader, Quiet, Variant
from unet_surgery.cli.sink import command, progress_bar, say, show

if TYPE_CHECKING:
    from unet_surgery.checkpoint.ldm.export import ExportResult

__all__ = ["export"]

Exported = Annotated[
    Path, typer.Argument(metavar="DIR", help="A student, or any diffusers folder (pipeline or U-Net).")
]


@command
def export(
    folder: Exported,
    to: Annotated[str, typer.Option("--to", help="The layout: ldm, the original one of Stable Diffusion.")] = "ldm",
    numbering: Annotated[
        str,
        typer.Option(
            "--numbering", help="How blocks are counted: dense (ComfyUI, diffusers) or gapped (stable-diffusion.cpp)."
        ),
    ] = "dense",
    unet_only: Annotated[bool, typer.Option("--unet-only", help="Write the U-Net alone, not the pipeline.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A file .safetensors. Default: ./<folder's name>.safetensors.")
    ] = None,
    dtype: Dtype = None,
    variant: Variant = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    max_header: MaxHeader = DEFAULT_MAX_HEADER,
    quiet: Quiet = False,
) -> None:
    """Write a diffusers folder as one .safetensors file in the original layout, for ComfyUI and others.

    U-Net, VAE and text encoders, without a change of any value unless --dtype converts them. The file is there whole
    at the end, or not at all. It prints the file's path, and says who takes it and who does not.

    Example: unet-surgery export ./my-small --out my-small.safetensors
    """
    from unet_surgery.checkpoint.ldm.export import export as run  # and no recipes, which take half as long again
    from unet_surgery.checkpoint.sizes import parse_size

    with progress_bar("writing", quiet) as progress:
        result = run(
            folder,
            out,
            to=to,
            numbering=numbering,
            unet_only=unet_only,
            dtype=dtype,
            variant=variant,
            force=force,
            max_header_bytes=parse_size(max_header),
            progress=progress,
        )
    show(str(result.file))
    if not quiet:
        _summarize(result)


def _summarize(result: ExportResult) -> None:
    from unet_surgery.cli.format import gigabytes

    left_out = f"; left out: {', '.join(result.left_out)}" if result.left_out else ""
    say(f"{gigabytes(result.num_bytes)}, {result.numbering} numbering: {', '.join(result.parts)}{left_out}")
    for verdict in result.verdicts:
        reason = f": {verdict.reason}" if not verdict.ok else f", {verdict.reason}" if verdict.reason else ""
        say(f"  {'takes it' if verdict.ok else 'does not'}    {verdict.runtime}{reason}")
    if result.parts == ("unet",):
        say("It is the U-Net alone: text encoder and VAE come from elsewhere.")
