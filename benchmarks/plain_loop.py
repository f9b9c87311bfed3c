"""The loop that ours is measured against: one that works as BK-SDM's published trainer does, in its simplest form.

Pictures are encoded as they come, VAE, text encoder and teacher run in the short dtype, the student has fp32 weights
under autocast and is checkpointed throughout, hooks collect features into dicts by name, every micro-batch reads its
losses, fp16 scales its loss, AdamW is torch's default, and the average is a Python loop over all parameters each step.
Pictures lie decoded in pinned memory, which a real loader would still have to bring there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from step_parts import Clock
from torch import Tensor, nn
from training_sizes import Size, make_parts, make_unets, random_ids, random_pictures

from unet_surgery.distill.weights import DTYPES
from unet_surgery.lower.features import FeaturePair

LR, DECAY, MAX_NORM = 5e-5, 0.9999, 1.0
NUM_MADE = 4  # micro-batches in memory


@dataclass(frozen=True, slots=True)
class Drawn:
    """What chance decides of a batch."""

    posterior_BCHW: Tensor
    noise_BCHW: Tensor
    timesteps_B: Tensor


@dataclass(frozen=True, slots=True)
class Losses:
    """The three terms, each of weight 1."""

    task: Tensor
    output_kd: Tensor
    feature_kd: Tensor


class PlainLoop:
    """Every method that begins with one underscore is a part of the step that :meth:`watched` can time."""

    def __init__(
        self, size: Size, device: torch.device, *, batch: int, micro_batch: int, dtype: str, checkpointing: bool = True
    ) -> None:
        from diffusers import DDPMScheduler

        self.batch, self.count = batch, batch // micro_batch
        self.device, self.dtype, self.latent_shape = device, DTYPES[dtype], size.latent_shape
        self.parts = make_parts(size, device, dtype=self.dtype, vae_dtype=self.dtype)
        self.student, self.teacher = make_unets(size, device)
        nn.Module.to(self.teacher, self.dtype)
        if checkpointing:
            self.student.enable_gradient_checkpointing()
        self.noise: Any = DDPMScheduler.from_config(dict(size.noise))
        self.pairs: Sequence[FeaturePair] = size.plan.features.bk
        self.student_features: dict[str, Tensor] = {}
        self.teacher_features: dict[str, Tensor] = {}
        for pair in self.pairs:
            _keep_output(self.student, pair.student.module, self.student_features)
            _keep_output(self.teacher, pair.teacher.module, self.teacher_features)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LR)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
        self.average = [p.detach().clone() for p in self.student.parameters()]
        self.log: list[tuple[float, ...]] = []
        self._made = _micro_batches(size, micro_batch, device)

    def step(self) -> None:
        """Take one optimizer step."""
        for _ in range(self.count):
            pixels_B3HW, ids_BT = self._batch()
            losses = self.losses(pixels_B3HW, ids_BT, self._draw(len(ids_BT)))
            self._backward((losses.task + losses.output_kd + losses.feature_kd) / self.count)
            self._read(losses)
        self._clip()
        self._update()
        self._move_average()

    def losses(self, pixels_B3HW: Tensor, ids_BT: Tensor, drawn: Drawn) -> Losses:
        """Return the terms of a micro-batch."""
        latents_BCHW = self._encode(pixels_B3HW, drawn.posterior_BCHW)
        noise_BCHW = drawn.noise_BCHW.to(latents_BCHW.dtype)
        noisy_BCHW = self.noise.add_noise(latents_BCHW, noise_BCHW, drawn.timesteps_B)
        prompt_BTD = self._embed(ids_BT)
        target_BCHW = noise_BCHW
        if self.noise.config.prediction_type == "v_prediction":
            target_BCHW = self.noise.get_velocity(latents_BCHW, noise_BCHW, drawn.timesteps_B)
        ours_BCHW = self._ask_student(noisy_BCHW, drawn.timesteps_B, prompt_BTD)
        theirs_BCHW = self._ask_teacher(noisy_BCHW, drawn.timesteps_B, prompt_BTD)
        return self._compare(ours_BCHW, theirs_BCHW, target_BCHW)

    def close(self) -> None:
        """Nothing runs beside the loop."""

    @contextlib.contextmanager
    def watched(self, clock: Clock) -> Iterator[None]:
        """While it is entered, ``clock`` sees the parts of each step."""
        labels = {
            "_batch": "data",
            "_draw": "noise and latents",
            "_encode": "VAE",
            "_embed": "text encoder",
            "_ask_student": "student forward",
            "_ask_teacher": "teacher forward",
            "_compare": "losses",
            "_backward": "backward",
            "_read": "reading losses",
            "_clip": "norm and clip",
            "_update": "AdamW",
            "_move_average": "average",
        }
        with clock.patched((self, name, label) for name, label in labels.items()):
            yield

    def _batch(self) -> tuple[Tensor, Tensor]:
        pixels_B3HW, ids_BT = next(self._made)
        return pixels_B3HW.to(self.device, non_blocking=True), ids_BT.to(self.device, non_blocking=True)

    def _draw(self, count: int) -> Drawn:
        shape = (count, *self.latent_shape)
        posterior_BCHW, noise_BCHW = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2))
        return Drawn(
            posterior_BCHW,
            noise_BCHW,
            torch.randint(0, self.noise.config.num_train_timesteps, (count,), device=self.device),
        )

    def _encode(self, pixels_B3HW: Tensor, posterior_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            posterior = self.parts.vae.encode(pixels_B3HW.to(self.dtype)).latent_dist
            latents_BCHW = posterior.mean + posterior.std * posterior_BCHW.to(self.dtype)
            scaled: Tensor = latents_BCHW * self.parts.vae.config.scaling_factor
            return scaled

    def _embed(self, ids_BT: Tensor) -> Tensor:
        with torch.no_grad():
            embeds: Tensor = self.parts.text_encoder(ids_BT)[0]
            return embeds

    def _ask_student(self, noisy_BCHW: Tensor, timesteps_B: Tensor, prompt_BTD: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            prediction: Tensor = self.student(noisy_BCHW, timesteps_B, prompt_BTD).sample
        return prediction.float()

    def _ask_teacher(self, noisy_BCHW: Tensor, timesteps_B: Tensor, prompt_BTD: Tensor) -> Tensor:
        with torch.no_grad():
            prediction: Tensor = self.teacher(noisy_BCHW, timesteps_B, prompt_BTD).sample
        return prediction

    def _compare(self, ours_BCHW: Tensor, theirs_BCHW: Tensor, target_BCHW: Tensor) -> Losses:
        task = F.mse_loss(ours_BCHW.float(), target_BCHW.float())
        output_kd = F.mse_loss(ours_BCHW.float(), theirs_BCHW.float())
        features = [
            F.mse_loss(
                self.student_features[pair.student.module].float(), self.teacher_features[pair.teacher.module].float()
            )
            for pair in self.pairs
        ]
        return Losses(task, output_kd, torch.stack(features).sum())

    def _backward(self, total: Tensor) -> None:
        self.scaler.scale(total).backward()

    def _read(self, losses: Losses) -> None:
        total = losses.task + losses.output_kd + losses.feature_kd
        self.log.append(tuple(t.item() for t in (total, losses.task, losses.output_kd, losses.feature_kd)))

    def _clip(self) -> None:
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.student.parameters(), MAX_NORM)

    def _update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _move_average(self) -> None:
        with torch.no_grad():
            for average, p in zip(self.average, self.student.parameters(), strict=True):
                average.sub_((1 - DECAY) * (average - p))


def _keep_output(unet: nn.Module, name: str, features: dict[str, Tensor]) -> None:
    unet.get_submodule(name).register_forward_hook(partial(_kept, name, features))


def _kept(name: str, features: dict[str, Tensor], _module: nn.Module, _args: object, output: Any) -> None:
    features[name] = output[0] if isinstance(output, tuple) else output


def _micro_batches(size: Size, count: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    pictures, ids = random_pictures(size, NUM_MADE * count), random_ids(size, NUM_MADE * count)
    pinned: Callable[[Tensor], Tensor] = (lambda t: t.pin_memory()) if device.type == "cuda" else (lambda t: t)
    made = [(pinned(p), pinned(i)) for p, i in zip(pictures.split(count), ids.split(count), strict=True)]
    return itertools.cycle(made)
