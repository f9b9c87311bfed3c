"""Our trainer as a run sets it up, on networks with random weights; and each of its choices undone, one at a time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from step_parts import Clock, Watched
from torch import Tensor, nn
from training_sizes import Size, make_parts, make_unets, random_ids, random_moments, random_pictures

from unet_surgery.data.batches import TrainingSet, prepared
from unet_surgery.data.memory import MomentsInMemory
from unet_surgery.distill import setup
from unet_surgery.distill.config import RunConfig
from unet_surgery.distill.diffusion import NoiseSchedule
from unet_surgery.distill.networks import Folders
from unet_surgery.distill.setup import Base, set_up
from unet_surgery.distill.trainer import StageTrainer
from unet_surgery.distill.weights import DTYPES
from unet_surgery.distill.world import World

NUM_SAMPLES = 256
NUM_PICTURES = 64  # of 3 MB at 512 pixels
LOG_EVERY = 50


@dataclass(frozen=True, slots=True)
class Choices:
    """What a run file decides, and what an ablation undoes. The defaults are a run's own."""

    dtype: str = "bf16"
    compile: bool = False
    channels_last: bool = True
    checkpointing: Literal["none", "high_resolution", "full"] = "none"
    latents: Literal["moments", "pixels"] = "moments"
    fused: bool = True
    """AdamW in one kernel, which takes bad steps back by itself; torch's default otherwise."""
    autocast: bool = False
    """fp32 weights under autocast in place of 16-bit weights with fp32 masters."""
    log_every: int = LOG_EVERY
    ema_every: int = 10


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Decoded pictures in memory, float32 [N, 3, H, W], and token ids, int64 [N, T]."""

    pixels: Tensor
    ids: Tensor
    latents: Literal["moments", "pixels"] = "pixels"
    fingerprint: str = "random"

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self.pixels[chosen], self.ids[chosen]

    def empty_ids(self) -> Tensor:
        return self.ids[0]


class _Autocast(nn.Module):  # type: ignore[misc]
    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self._device, self._dtype = network, device, dtype

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast(self._device.type, self._dtype):
            return self.network(*inputs)


class _NotFused(torch.optim.AdamW):  # type: ignore[misc]
    """Torch's default, which knows no flag for bad steps."""

    def step(self, closure: Any = None) -> Any:
        self.__dict__.pop("found_inf", None)
        return super().step(closure)


class OurLoop:
    """A :class:`StageTrainer` and its batches; ``trainer`` and ``base`` are what a run would have."""

    def __init__(self, size: Size, device: torch.device, *, batch: int, micro_batch: int, choices: Choices) -> None:
        self.batch, self.count, self.choices, self.device = batch, batch // micro_batch, choices, device
        self.world = World(0, 1, device, "single")
        self.base = _base(size, device, choices)
        self.trainer = _trainer(size, self.base, self.world, batch, choices)
        self.batches: Any = prepared(self.base.batches(0), itertools.count(0, micro_batch), micro_batch, device)
        self.number = 0

    def step(self) -> None:
        """Take one optimizer step, and look as often as a run does."""
        self.trainer.step(self.batches, self.count, self.number)
        self.number += 1
        if self.number % self.choices.log_every == 0:
            self.trainer.look()

    def close(self) -> None:
        """Let go of the threads that prepare batches."""
        self.batches.close()

    @contextlib.contextmanager
    def watched(self, clock: Clock) -> Iterator[None]:
        """While it is entered, ``clock`` sees the parts of each step."""
        trainer: Any = self.trainer
        compute, batches, parts = trainer._compute, self.batches, self.base.parts
        trainer._compute = replace(
            compute,
            prepare=Watched(compute.prepare, clock, "noise and latents"),
            student=Watched(compute.student, clock, "student forward"),
            teacher=Watched(compute.teacher, clock, "teacher forward"),
            compare=Watched(compute.compare, clock, "losses"),
        )
        self.batches = Watched(batches, clock, "data")
        patches = (
            (parts.text_encoder, "forward", "text encoder"),
            (parts.vae, "encode", "VAE"),
            (torch.Tensor, "backward", "backward"),
            (trainer.weights, "_add_to_masters", "gradients to fp32"),
            (trainer._update, "apply", "norm and clip"),
            (trainer._update._adamw, "step", "AdamW"),
            (trainer.weights, "spread", "rounding"),
            (trainer.ema, "update", "average"),
            (trainer, "look", "reading losses"),
        )
        try:
            with clock.patched(patches):
                yield
        finally:
            trainer._compute, self.batches = compute, batches


def _base(size: Size, device: torch.device, choices: Choices) -> Base:
    # as distill/networks.py: the VAE in fp32, whatever the rest
    parts = make_parts(size, device, dtype=DTYPES[choices.dtype], vae_dtype=torch.float32)
    samples: TrainingSet
    if choices.latents == "pixels":
        samples = _Pictures(random_pictures(size, NUM_PICTURES), random_ids(size, NUM_PICTURES))
    else:
        ids = random_ids(size, NUM_SAMPLES)
        samples = MomentsInMemory(random_moments(size, NUM_SAMPLES), ids, ids[0], "random")
    return Base(parts, NoiseSchedule.from_config(size.noise).to(device), samples, size.latent_shape)


def _trainer(size: Size, base: Base, world: World, batch: int, choices: Choices) -> StageTrainer:
    """Return what ``set_up`` makes, given networks in place of folders, with the ablations' changes."""
    student, teacher = make_unets(size, world.device)
    nn.Module.to(teacher, DTYPES[choices.dtype])
    if choices.channels_last:
        teacher = teacher.to(memory_format=torch.channels_last)
    networks: Any = {
        "load_student": lambda *_: student,
        "load_teacher": lambda *_: teacher,
        "read_student_plan": lambda *_: size.plan,
    }
    with mock.patch.multiple(setup, **networks):
        trainer = set_up(_config(batch, choices), 0, Folders(Path(), Path(), (Path(),)), base, world)
    if not choices.fused:
        options = {"lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        trainer._update._adamw = _NotFused(trainer.weights.masters, **options)
    if choices.autocast:
        compute: Any = trainer._compute
        network = _Autocast(compute.student, world.device, DTYPES[choices.dtype])
        trainer._compute = replace(compute, student=network)
    return trainer


def _config(batch: int, choices: Choices) -> RunConfig:
    return RunConfig.from_data(
        {
            "output": "none",
            "student": "none",
            "teacher": "none",
            "data": {"cache": "none"},
            "batch": batch,
            "ema": {"every": choices.ema_every},
            "speed": {
                "dtype": "fp32" if choices.autocast else choices.dtype,
                "compile": choices.compile,
                "channels_last": choices.channels_last,
                "checkpointing": choices.checkpointing,
            },
        }
    )
