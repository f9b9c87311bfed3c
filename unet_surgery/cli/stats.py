"""``unet-surgery stats``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unet_surgery.cli.options import Quiet
from unet_surgery.cli.scoreoptions import Batch, Decoders, Device, FeatureDtype, Inception, WeightsHash
from unet_surgery.cli.sink import command, progress_bar, say, show

__all__ = ["stats"]


@command
def stats(
    folder: Annotated[Path, typer.Argument(help="A folder of pictures, 2,048 or more.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, .npz; pytorch-fid reads it as well.")],
    inception: Inception = None,
    weights_sha256: WeightsHash = None,
    resize: Annotated[
        int | None, typer.Option("--resize", help="Squeeze every picture to this side first, by PIL's bicubic filter.")
    ] = None,
    jpeg: Annotated[
        int | None,
        typer.Option("--jpeg", help="Then store it as JPEG of this quality, and read that: BK-SDM's reference has 75."),
    ] = None,
    batch: Batch = 50,
    device: Device = "auto",
    dtype: FeatureDtype = "fp32",
    decoders: Decoders = 4,
    force: Annotated[bool, typer.Option("--force", help="Replace the file --out.")] = False,
    quiet: Quiet = False,
) -> None:
    """Compute the statistics of a reference set of pictures, which FID compares with. Needs torch.

    Example: unet-surgery stats ./val2014 --resize 256 --jpeg 75 --out coco256.npz
    """
    from unet_surgery.evaluate.reference import make_statistics

    with progress_bar("pictures", quiet, of_bytes=False) as progress:
        made = make_statistics(
            folder,
            out,
            inception=inception,
            weights_sha256=weights_sha256,
            resize=resize,
            jpeg=jpeg,
            batch=batch,
            device=device,
            dtype=dtype,
            decoders=decoders,
            force=force,
            progress=progress,
        )
    show(str(out))
    if not quiet:
        assert made.resolution is not None
        say(f"{made.count:,} pictures of {made.resolution[0]}×{made.resolution[1]}")
