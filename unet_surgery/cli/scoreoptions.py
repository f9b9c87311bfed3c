"""Options that score and stats share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Batch", "Decoders", "Device", "FeatureDtype", "Inception", "WeightsHash"]

Inception = Annotated[
    str | None,
    typer.Option(
        "--inception",
        help="Weights of the Inception network, pt_inception-2015-12-05-6726825d.pth. Default: from PyTorch's cache.",
    ),
]
WeightsHash = Annotated[
    str | None,
    typer.Option("--weights-sha256", help="Take --inception with this hash; scores are then not called FID, IS, KID."),
]
Batch = Annotated[int, typer.Option(help="Pictures that go through a network at once.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
FeatureDtype = Annotated[str, typer.Option("--dtype", help="What the Inception network runs in: fp32 or fp64.")]
Decoders = Annotated[int, typer.Option(help="Threads that decode pictures.")]
