"""What a sample of a stage costs in operations, and what devices can do: from graphs and configs, without torch.

A MAC is two FLOPs; MACs are counted as :mod:`unet_surgery.lower.modules` does, attention products included.
Forward and backward of a layer are three times its forward: the backward multiplies twice, for the gradients of inputs
and of weights (Kaplan et al., arXiv 2001.08361, section 2.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from unet_surgery.distill.config import RunConfig, Stage
from unet_surgery.distill.partcosts import text_encoder_costs, vae_costs, vae_factor
from unet_surgery.graph import UNetGraph, build, parse_config
from unet_surgery.lower import count, count_modules, modules

__all__ = ["PEAKS", "ImageFlops", "at_size", "image_flops", "is_recomputed", "peak_flops", "stage_flops"]


@dataclass(frozen=True, slots=True)
class ImageFlops:
    """FLOPs that one sample of a stage takes, by who takes them."""

    student: int
    """Forward and backward: three forwards."""
    recomputed: int
    """Of the student's forward, done again in the backward to save memory."""
    teacher: int
    vae: int
    """Encoding the picture, where latents are not cached."""
    text: int

    @property
    def model(self) -> int:
        """What the mathematics needs: the numerator of model FLOP use (Chowdhery et al., arXiv 2204.02311)."""
        return self.student + self.teacher + self.vae + self.text

    @property
    def total(self) -> int:
        """What the device does."""
        return self.model + self.recomputed


def at_size(config: Mapping[str, Any], size: tuple[int, int]) -> UNetGraph:
    """Return the graph of a U-Net's config.json at latents of (height, width), whatever its native size is.

    Raises:
        ConfigError: it is no config of a U-Net that the graph describes.
    """
    return replace(build(parse_config(config)), latent_size=size)


def image_flops(
    student: UNetGraph,
    teacher: UNetGraph | None,
    *,
    checkpointing: str = "none",
    vae_macs: int = 0,
    text_macs: int = 0,
    teacher_steps: int = 1,
    guided: float = 0.0,
) -> ImageFlops:
    """Return the FLOPs of one sample; the graphs say at which latent size.

    ``teacher_steps`` are the teacher's forwards. ``guided`` is the share of steps that take both U-Nets twice; the
    result is the mean.

    ``checkpointing`` is a run's. Diffusers runs resnets and transformer blocks again, and keeps what stands between
    them: ``full`` is nearly a whole forward more, ``high_resolution`` that of the finest level.
    """
    again = count_modules(m for m in modules(student) if is_recomputed(m.path, checkpointing, student))
    return ImageFlops(
        student=round((1 + guided) * 6 * count(student).macs_all),
        recomputed=round((1 + guided) * 2 * again.macs_all),
        teacher=0 if teacher is None else round((1 + guided) * 2 * teacher_steps * count(teacher).macs_all),
        vae=2 * vae_macs,
        text=2 * text_macs,
    )


def stage_flops(
    run: RunConfig,
    stage: Stage,
    *,
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    latent_size: tuple[int, int],
    vae: Mapping[str, Any] | None = None,
    text_encoder: Mapping[str, Any] | None = None,
    online: bool = False,
) -> ImageFlops:
    """Return the FLOPs of one sample of ``stage``; networks are given by their config.json.

    ``online`` says that pictures are encoded as they come. A part whose config is None is not counted.

    Raises:
        ConfigError: a config cannot be used.
    """
    steps = stage.objectives.step_kd
    pixels = (1, 1) if vae is None else (latent_size[0] * vae_factor(vae), latent_size[1] * vae_factor(vae))
    return image_flops(
        at_size(student, latent_size),
        at_size(teacher, latent_size) if teacher is not None and stage.objectives.needs_teacher else None,
        checkpointing=run.speed.checkpointing,
        vae_macs=vae_costs(vae, pixels).macs if online and vae is not None else 0,
        text_macs=0 if text_encoder is None else text_encoder_costs(text_encoder).macs,
        teacher_steps=steps.teacher_steps if steps.weight else 1,
        guided=steps.guided if steps.weight else 0.0,
    )


def is_recomputed(path: str, checkpointing: str, unet: UNetGraph) -> bool:
    """Return True if the module at ``path`` (ending in a dot) lies in what diffusers runs again in the backward."""
    if checkpointing == "none" or not (".resnets." in path or ".transformer_blocks." in path):
        return False
    if path.startswith("mid_block.resnets.0."):  # diffusers' mid keeps its first resnet
        return False
    return checkpointing == "full" or path.startswith(("down_blocks.0.", f"up_blocks.{unet.num_levels - 1}."))


# Dense TFLOP/s as NVIDIA's datasheets say, of bf16, fp16 (both with fp32 accumulation) and fp32; where one quotes rates
# "with sparsity", half of them. GeForce: the architectures' whitepapers, with fp32 accumulation. fp32 is TF32 where
# there is one. None: the chip has no such type. A name is a part of what torch and nvidia-smi call the device.
PEAKS: Mapping[str, tuple[float | None, float, float]] = MappingProxyType(
    {
        "GB200": (2500, 2500, 1250),
        "B200": (2250, 2250, 1125),
        "H200 NVL": (835.5, 835.5, 417.5),
        "H200": (989.5, 989.5, 494.7),
        "GH200": (989.5, 989.5, 494.7),
        "H100 NVL": (835.5, 835.5, 417.5),
        "H100 PCIe": (756.5, 756.5, 378.3),
        "H100": (989.5, 989.5, 494.7),
        "H800": (989.5, 989.5, 494.7),
        "A100": (312, 312, 156),
        "A800": (312, 312, 156),
        "A40": (149.7, 149.7, 74.8),
        "A30": (165, 165, 82),
        "A10G": (70, 70, 35),
        "A10": (125, 125, 62.5),
        "RTX A6000": (154.8, 154.8, 77.4),
        "RTX 6000 Ada": (364.2, 364.2, 182.1),
        "L40S": (362.05, 362.05, 183),
        "L40": (181.05, 181.05, 90.5),
        "L4": (121, 121, 60),
        "V100-SXM2": (None, 125, 15.7),
        "V100-SXM3": (None, 125, 15.7),
        "V100": (None, 112, 14),
        "T4": (None, 65, 8.1),
        "RTX 5090": (209.5, 209.5, 104.8),
        "RTX 4090": (165.2, 165.2, 82.6),
        "RTX 3090 Ti": (80, 80, 40),
        "RTX 3090": (71, 71, 35.6),
    }
)
DTYPES = ("bf16", "fp16", "fp32")
# Another chip, or a part of one, under nearly the same name.
_OTHERS = re.compile(r"\b(?:MIG|Laptop|Max-Q|SUPER|D)\b", re.IGNORECASE)


def peak_flops(name: str, dtype: str) -> float | None:
    """Return the dense peak of the device called ``name``, in FLOP/s, computing in ``dtype`` (bf16, fp16 or fp32).

    None: the device is not in :data:`PEAKS`, or has no such type.
    """
    if _OTHERS.search(name):
        return None
    known = [k for k in PEAKS if re.search(rf"(?<![A-Za-z0-9]){re.escape(k)}(?![A-Za-z0-9])", name, re.IGNORECASE)]
    if not known:
        return None
    rate = PEAKS[max(known, key=len)][DTYPES.index(dtype)]  # H100 PCIe, not H100
    return None if rate is None else rate * 1e12
