"""From a batch to the loss: latents, noise, the teacher's opinion, the student's, and the terms between them.

B batch · C latent channels · H, W latent size · T tokens · D text width · K terms · P feature pairs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from unet_surgery.data.batches import Batch
from unet_surgery.data.encode import encode_moments
from unet_surgery.distill import objectives
from unet_surgery.distill.config import NoiseConfig, Objectives, Stage
from unet_surgery.distill.diffusion import NoiseSchedule, PredictionType, draw_timesteps, offset_noise
from unet_surgery.runtime.parts import Parts

__all__ = ["Compute", "Inputs", "Loss", "Preparation", "Terms", "compare"]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What both networks are given, and what the student should say by the data."""

    noisy_BCHW: Tensor
    timesteps_B: Tensor
    prompt_embeds_BTD: Tensor
    target_BCHW: Tensor


@dataclass(frozen=True, slots=True)
class Terms:
    """A micro-batch's loss. ``values_K`` are its terms, unweighted, detached: the loss's ``names``, then the pairs'."""

    total: Tensor
    values_K: Tensor
    power_P: Tensor
    """The mean square of each of the teacher's activations; zeros where nothing is divided by it."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """What makes a batch into the networks' inputs; nothing of it is trained."""

    parts: Parts
    schedule: NoiseSchedule
    noise: NoiseConfig
    latents: Literal["moments", "pixels"]
    channels_last: bool

    def __call__(self, batch: Batch) -> Inputs:
        """Return noisy latents, timesteps, prompt embeddings and the target."""
        return self.at(batch, draw_timesteps(batch.uniforms_B2, self.schedule.num_timesteps, self.noise.timesteps))

    def at(self, batch: Batch, timesteps_B: Tensor) -> Inputs:
        """Return the same at timesteps that somebody else chose."""
        with torch.no_grad():
            latents_BCHW = self._latents(batch)
            noise_BCHW = offset_noise(batch.noise_BCHW, batch.offset_BC, self.noise.offset)
            noisy_BCHW = self.schedule.add_noise(latents_BCHW, noise_BCHW, timesteps_B)
            target_BCHW = self.schedule.target(latents_BCHW, noise_BCHW, timesteps_B)
            prompt_embeds_BTD = self.parts.text_encoder(batch.token_ids_BT)[0]
        return Inputs(self.seen(noisy_BCHW), timesteps_B, prompt_embeds_BTD, target_BCHW)

    def seen(self, noisy_BCHW: Tensor) -> Tensor:
        """Return noisy latents as the networks take them: in their dtype and layout."""
        noisy_BCHW = noisy_BCHW.to(self.parts.text_encoder.dtype)
        return noisy_BCHW.contiguous(memory_format=torch.channels_last) if self.channels_last else noisy_BCHW

    def _latents(self, batch: Batch) -> Tensor:
        """Return a sample of the VAE's posterior, scaled, fp32."""
        vae = self.parts.vae
        moments = encode_moments(vae, batch.images) if self.latents == "pixels" else batch.images.float()
        mean_BCHW, std_BCHW = moments.chunk(2, dim=1)
        scaled: Tensor = (mean_BCHW + std_BCHW * batch.posterior_BCHW) * vae.config.scaling_factor
        return scaled


class Loss(Protocol):
    """A stage's loss as a function of a batch."""

    names: ClassVar[tuple[str, ...]]
    """Of the terms that are no feature pair's, as metrics call them."""

    @property
    def teacher(self) -> nn.Module | None: ...

    @property
    def teacher_predicts(self) -> PredictionType: ...

    def __call__(self, batch: Batch, power_P: Tensor) -> Terms:
        """Return the loss of a micro-batch; ``power_P`` divides the feature terms."""

    def teacher_power(self, batch: Batch) -> Tensor:
        """Return the mean square of each of the teacher's activations [P]."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Task, output and features, at one noise level; the networks return their taps, and any part may be compiled."""

    names: ClassVar[tuple[str, ...]] = ("task", "output_kd")
    stage: Stage
    prepare: Preparation
    student: nn.Module
    teacher: nn.Module | None
    compare: Callable[..., Terms]
    """:func:`compare`."""

    @property
    def teacher_predicts(self) -> PredictionType:
        """What the teacher predicts: what the student does."""
        return self.prepare.schedule.prediction_type

    def __call__(self, batch: Batch, power_P: Tensor) -> Terms:
        """Return the loss of a micro-batch; ``power_P`` divides the feature terms."""
        inputs = self.prepare(batch)
        theirs = self._theirs(inputs)
        ours = self.student(inputs.noisy_BCHW, inputs.timesteps_B, inputs.prompt_embeds_BTD)
        weights_B = self._task_weights(inputs.timesteps_B)
        return self.compare(self.stage.objectives, ours, theirs, inputs.target_BCHW, weights_B, power_P)

    def teacher_power(self, batch: Batch) -> Tensor:
        """Return the mean square of each of the teacher's activations [P]."""
        theirs = self._theirs(self.prepare(batch))
        assert theirs is not None
        return objectives.mean_squares(theirs[1])

    def _theirs(self, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        if self.teacher is None:
            return None
        with torch.no_grad():  # inference_mode would make tensors that no backward may save
            result: tuple[Tensor, tuple[Tensor, ...]] = self.teacher(
                inputs.noisy_BCHW, inputs.timesteps_B, inputs.prompt_embeds_BTD
            )
        return result

    def _task_weights(self, timesteps_B: Tensor) -> Tensor | None:
        gamma, schedule = self.stage.objectives.min_snr, self.prepare.schedule
        if gamma is None:
            return None
        return objectives.min_snr_weights(schedule.snr(timesteps_B), schedule.prediction_type, gamma)


def compare(
    wanted: Objectives,
    ours: tuple[Tensor, tuple[Tensor, ...]],
    theirs: tuple[Tensor, tuple[Tensor, ...]] | None,
    target_BCHW: Tensor,
    weights_B: Tensor | None,
    power_P: Tensor,
) -> Terms:
    """Return the terms between (prediction, activations) of student and teacher; one of weight 0 is still measured."""
    none = torch.zeros((), device=target_BCHW.device)
    task = objectives.task(ours[0], target_BCHW, weights_B)
    output = objectives.output_kd(ours[0], theirs[0]) if theirs is not None else none
    total = wanted.task * task + wanted.output_kd * output
    features_P = power_now_P = torch.zeros_like(power_P)
    if theirs is not None and ours[1]:
        features_P = objectives.feature_kd(ours[1], theirs[1])
        if wanted.feature_kd.normalise == "teacher_power":
            power_now_P = objectives.mean_squares(theirs[1])
        total = total + wanted.feature_kd.weight * (features_P / power_P).sum()
    values_K = torch.cat([torch.stack([task, output]), features_P]).detach()
    return Terms(total, values_K, power_now_P)
