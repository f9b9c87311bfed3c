"""Sides of training pictures: the one a pipeline was made for, and those that its VAE can encode. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.student import CONFIG
from unet_surgery.errors import ConfigError, UsageError, printable

__all__ = ["check_side", "native_side"]


def check_side(resolution: int, factor: int) -> None:
    """Raise UsageError if pictures of this side are no whole number of latents, of ``factor`` pixels each."""
    if resolution >= factor and resolution % factor == 0:
        return
    below = resolution // factor * factor
    raise UsageError(
        "the resolution does not fit the VAE",
        expected=f"a multiple of {factor}",
        found=str(resolution),
        hint=f"{below} or {below + factor}" if below > 0 else f"{factor} is the smallest",
    )


def native_side(pipeline: Path) -> int:
    """Return the side in pixels that a pipeline's U-Net was made for: its ``sample_size`` in the pixels of its VAE.

    Raises:
        UsageError: there is no U-Net, or it is made for no square. (512 would be a guess, and hours of work for it.)
        ConfigError: the VAE's config does not say how much it shrinks.
    """
    path = pipeline / "unet" / CONFIG
    size = read_object(path).get("sample_size") if path.is_file() else None
    if isinstance(size, list) and len(set(map(str, size))) == 1:
        size = size[0]
    if type(size) is not int or size < 1:
        raise UsageError(
            "the model does not say for which resolution it was made",
            where=str(path),
            expected="sample_size, a number",
            found=printable(size) if path.is_file() else "no such file",
            hint="say it: --resolution 512 is that of SD v1",
        )
    return size * _factor(read_object(pipeline / "vae" / CONFIG), pipeline)


def _factor(vae: Mapping[str, Any], pipeline: Path) -> int:
    """Return how many pixels of a side a latent stands for, by the VAE's config."""
    levels = vae.get("block_out_channels")
    if not isinstance(levels, list) or not 1 <= len(levels) <= 10:
        where = str(pipeline / "vae" / CONFIG)
        raise ConfigError("the VAE has no levels", where=where, expected="block_out_channels", found=printable(levels))
    return int(2 ** (len(levels) - 1))
