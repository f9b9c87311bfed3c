"""Strict loading: a folder becomes a ``UNet2DConditionModel`` with every tensor accounted for, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from unet_surgery.checkpoint.check import unet_folder
from unet_surgery.checkpoint.layout import choose_weights
from unet_surgery.checkpoint.reader import open_weights
from unet_surgery.errors import MissingExtraError, VerificationError, printable

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

__all__ = ["load_unet", "stored_dtype"]

SHOWN = 4


def load_unet(folder: str | Path) -> UNet2DConditionModel:
    """Load the U-Net of a pipeline or U-Net folder with diffusers, in the dtype it is stored in.

    Raises:
        VerificationError: diffusers misses a tensor, finds one too many or of another shape, or refuses the config.
        MissingExtraError: torch or diffusers is not installed.
    """
    try:
        import torch  # noqa: F401  # diffusers imports without it, and then has no models
        from diffusers import UNet2DConditionModel
    except (ImportError, RuntimeError, OSError) as error:  # diffusers wraps what its imports raise
        raise MissingExtraError(
            "torch and diffusers are needed for this, and do not import",
            found=printable(str(error).replace("\n", " ")),
            hint="unet-surgery doctor says why; where they are missing: pip install 'unet-surgery[torch]'",
        ) from error
    path = unet_folder(Path(folder))
    try:
        unet, info = UNet2DConditionModel.from_pretrained(
            str(path),
            output_loading_info=True,
            local_files_only=True,
            torch_dtype=stored_dtype(path),
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise VerificationError("diffusers cannot load the student", where=str(path), found=str(error)) from error
    problems = [
        f"{len(names)} {kind.replace('_keys', '')}: {', '.join(str(n) for n in list(names)[:SHOWN])}"
        for kind, names in info.items()
        if names
    ]
    if problems:
        raise VerificationError("diffusers loads the student with faults", where=str(path), found="; ".join(problems))
    assert isinstance(unet, UNet2DConditionModel)
    return unet


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype that most tensors are stored in: diffusers would load everything as fp32."""
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    choice = choose_weights([p.name for p in folder.iterdir()], None, where=str(folder))
    with open_weights(folder, choice) as weights:
        counts = weights.stored().dtypes
    return dtypes.get(max(counts, key=lambda name: counts[name]), torch.float32)
