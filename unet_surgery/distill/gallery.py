"""Pictures of fixed prompts while a student is trained: teacher, student and the student's average, side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unet_surgery.checkpoint import disk
from unet_surgery.distill.config import PictureConfig
from unet_surgery.distill.diffusion import PredictionType
from unet_surgery.errors import SurgeryError, printable
from unet_surgery.runtime.parts import Parts
from unet_surgery.sample.draw import sample
from unet_surgery.sample.grid import grid

__all__ = ["Gallery"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Gallery:
    """Draws a grid when asked. The teacher's pictures are drawn once a stage, since it does not change."""

    folder: Path
    config: PictureConfig
    parts: Parts
    device: torch.device
    _teachers: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    def draw(
        self,
        step: int,
        unet_config: Mapping[str, Any],
        columns: Mapping[str, Mapping[str, Tensor]],
        teacher: tuple[nn.Module, PredictionType] | None,
        stage: int,
    ) -> None:
        """Write ``step-….png`` into the folder. Pictures that cannot be drawn are no reason to end a run.

        ``columns`` are the weights to draw with: title → name → whole tensor. ``teacher`` is its U-Net and what that
        predicts, ``stage`` tells teachers apart.
        """
        try:
            pictures: dict[str, NDArray[np.uint8]] = {}
            if teacher is not None:
                if stage not in self._teachers:
                    self._teachers = {stage: self._sample(*teacher)}
                pictures["teacher"] = self._teachers[stage]
            for title, tensors in columns.items():
                pictures[title] = self._sample(self._network(unet_config, tensors))
            disk.make_folders(self.folder)
            data = grid(pictures, self.config.prompts)
            disk.replace_file(self.folder / f"step-{step:08d}.png", data, force=True)
        except (SurgeryError, OSError, torch.OutOfMemoryError) as error:
            log.warning("no pictures at step %d, training goes on: %s", step, printable(str(error)))

    def _network(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(config))
        unet.load_state_dict(tensors, assign=True, strict=True)
        return nn.Module.to(unet, device=self.device, dtype=self.parts.text_encoder.dtype).eval()

    def _sample(self, unet: nn.Module, predicts: PredictionType | None = None) -> NDArray[np.uint8]:
        """Draw with a network that predicts what the run's does, or ``predicts``."""
        config, parts = self.config, self.parts
        if predicts is not None:
            parts = replace(parts, scheduler_config={**parts.scheduler_config, "prediction_type": predicts})
        return sample(
            unet,
            parts,
            config.prompts,
            seed=config.seed,
            steps=config.steps,
            guidance=config.guidance,
            scheduler=config.scheduler,
        )
