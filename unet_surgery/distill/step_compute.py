"""The loss of a stage that distils steps: the student in one DDIM step beside the teacher in several.

In a guided step both networks see every sample twice, with its prompt and with none, in one forward of 2B rows: two
forwards of the student before one backward would be one too many for DistributedDataParallel and FSDP2.

B batch · C latent channels · H, W latent size · T tokens · D text width · K teacher steps
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from unet_surgery.data.batches import Batch, GuidedSteps
from unet_surgery.distill.compute import Preparation, Terms
from unet_surgery.distill.config import Stage, StepKd
from unet_surgery.distill.diffusion import NoiseSchedule, PredictionType
from unet_surgery.distill.step_objective import (
    draw_guidance,
    guided,
    step_ladder,
    step_loss,
    step_target,
    task_loss,
    with_task,
)

__all__ = ["StepCompute", "guided_steps"]


@dataclass(frozen=True, slots=True)
class StepCompute:
    """The terms of ``step_kd``, as a :class:`unet_surgery.distill.compute.Loss`; no activations are compared."""

    names: ClassVar[tuple[str, ...]] = ("task", "step_kd")
    wanted: StepKd
    prepare: Preparation
    student: nn.Module
    teacher: nn.Module
    teacher_schedule: NoiseSchedule
    """The noise of the run, and what the teacher predicts, which may be another thing than the student does."""
    no_prompt_1TD: Tensor
    """The embeddings of an empty prompt."""

    @property
    def teacher_predicts(self) -> PredictionType:
        """What the teacher predicts."""
        return self.teacher_schedule.prediction_type

    def __call__(self, batch: Batch, power_P: Tensor) -> Terms:
        """Return the loss of a micro-batch, guided where the batch says so."""
        wanted, schedule = self.wanted, self.prepare.schedule
        ladder_BK = step_ladder(
            batch.uniforms_B2[:, 0], schedule.num_timesteps, wanted.student_steps, wanted.teacher_steps
        )
        inputs = self.prepare.at(batch, ladder_BK[:, 0])
        guidance_B = None if batch.guidance_B is None else draw_guidance(batch.guidance_B, *wanted.guidance)
        prompts = inputs.prompt_embeds_BTD

        def teach(z_BCHW: Tensor, now_B: Tensor) -> Tensor:
            _, prediction = self._predict(self.teacher, z_BCHW, now_B, prompts, guidance_B)
            return self.teacher_schedule.to_sample(prediction, z_BCHW, now_B)

        target_BCHW = step_target(teach, inputs.noisy_BCHW, ladder_BK, schedule)
        conditional, ours = self._predict(self.student, inputs.noisy_BCHW, inputs.timesteps_B, prompts, guidance_B)
        sample_BCHW = schedule.to_sample(ours, inputs.noisy_BCHW, inputs.timesteps_B)
        step_B = step_loss(sample_BCHW, target_BCHW, schedule.snr(inputs.timesteps_B))
        task_B = task_loss(conditional, inputs.target_BCHW)
        total = wanted.weight * with_task(step_B, task_B, wanted.task_share).mean()
        return Terms(total, torch.stack([task_B.mean(), step_B.mean()]).detach(), torch.zeros_like(power_P))

    def teacher_power(self, batch: Batch) -> Tensor:
        """Return the mean squares of no activations."""
        return torch.zeros(0, device=batch.images.device)

    def _predict(
        self,
        network: nn.Module,
        noisy_BCHW: Tensor,
        timesteps_B: Tensor,
        prompts_BTD: Tensor,
        guidance_B: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return what a network predicts with the prompts, and the same guided, which without guidance it is."""
        noisy_BCHW = self.prepare.seen(noisy_BCHW)
        if guidance_B is None:
            prediction: Tensor = network(noisy_BCHW, timesteps_B, prompts_BTD)[0]
            return prediction, prediction
        no_prompts_BTD = self.no_prompt_1TD.expand_as(prompts_BTD)
        both = network(noisy_BCHW.repeat(2, 1, 1, 1), timesteps_B.repeat(2), torch.cat([prompts_BTD, no_prompts_BTD]))[
            0
        ]
        conditional, unconditional = both.chunk(2)
        return conditional, guided(conditional, unconditional, guidance_B)


def guided_steps(stage: Stage, first_sample: int) -> GuidedSteps | None:
    """Return which steps of ``stage``, whose samples begin at ``first_sample``, are guided; None if none can be."""
    wanted = stage.objectives
    return GuidedSteps(wanted.step_kd.guided, first_sample, stage.batch) if wanted.may_be_guided else None
