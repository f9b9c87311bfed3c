"""``verify``: everything ``check`` does, and then diffusers itself: strict load, finite weights, one forward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unet_surgery.api import check, no_progress
from unet_surgery.checkpoint.check import CheckReport
from unet_surgery.checkpoint.disk import Progress
from unet_surgery.checkpoint.header import MAX_HEADER_BYTES
from unet_surgery.errors import VerificationError, first_few
from unet_surgery.lower import CONTEXT_TOKENS
from unet_surgery.runtime.inputs import context_width, further_conditions
from unet_surgery.runtime.load import load_unet

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

__all__ = ["VerifyReport", "forward_once", "verify"]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` did: the check, and the shape of the forward's output [batch, channels, height, width]."""

    check: CheckReport
    output_shape: tuple[int, ...]
    diffusers_version: str


def verify(
    folder: str | Path,
    teacher: str | Path | None = None,
    *,
    base: str | Path | None = None,
    variant: str | None = None,
    max_header: str | int = MAX_HEADER_BYTES,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Check a student, load it in diffusers (nothing missing, nothing unexpected), and run it once.

    Raises:
        VerificationError: a check fails, a weight is NaN or infinite (names the tensors), or the output is.
        MissingExtraError: torch or diffusers is not installed.
    """
    report = check(folder, teacher, base=base, variant=variant, max_header=max_header, progress=progress)
    unet = load_unet(folder)
    import diffusers
    import torch

    bad = [name for name, tensor in unet.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise VerificationError(f"{len(bad)} tensors hold NaN or Inf", where=str(report.unet), found=first_few(bad))
    output = forward_once(unet)
    if not torch.isfinite(output).all():
        raise VerificationError("the forward gives NaN or Inf", where=str(report.unet))
    return VerifyReport(report, tuple(output.shape), diffusers.__version__)


def forward_once(unet: UNet2DConditionModel) -> torch.Tensor:
    """Run ``unet`` on seeded noise [1, in_channels, s, s], the smallest s that its levels allow, in fp32."""
    import torch

    config = unet.config
    side = 2 ** len(config.block_out_channels)
    noise = torch.Generator().manual_seed(0)
    unet = unet.float().eval()
    with torch.no_grad():
        output = unet(
            torch.randn(1, config.in_channels, side, side, generator=noise),
            torch.tensor(500),
            encoder_hidden_states=torch.randn(1, CONTEXT_TOKENS, context_width(config), generator=noise),
            **further_conditions(unet, 1),
        ).sample
    assert isinstance(output, torch.Tensor)
    return output
