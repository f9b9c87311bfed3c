"""One stage of a run, in memory: a step, what was measured since somebody last looked, and the state to go on from.

K terms of the loss · P feature pairs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unet_surgery.data.batches import Batch
from unet_surgery.distill import objectives
from unet_surgery.distill.compute import Compute
from unet_surgery.distill.config import EmaConfig, Stage
from unet_surgery.distill.ema import Ema
from unet_surgery.distill.gallery import Gallery
from unet_surgery.distill.rates import RateConfig, rate
from unet_surgery.distill.update import Update
from unet_surgery.distill.weights import TrainedWeights
from unet_surgery.distill.world import World

__all__ = ["Measured", "StageTrainer"]

ADAM = "adam_"


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over the steps since the last look, over all processes."""

    num_steps: int
    terms: dict[str, float]
    """Unweighted: task, output_kd, and each feature pair's."""
    loss: float
    grad_norm: float
    bad_steps: int
    """In all, of the stage so far: their gradients were not finite, and they were not applied."""
    most_bad_in_a_row: int


class StageTrainer:
    """Weights, optimizer, average and objectives of one stage. ``pairs`` names its feature pairs."""

    def __init__(
        self,
        world: World,
        stage: Stage,
        weights: TrainedWeights,
        compute: Compute,
        *,
        ema: EmaConfig,
        pairs: tuple[str, ...],
        scales_loss: bool,
    ) -> None:
        self.weights = weights
        self.unet_config = dict(_unet_of(weights.run).config)
        self.ema = Ema(
            dict(zip(weights.names, weights.masters, strict=True)), ema.decay, every=ema.every, warm_up=ema.warmup
        )
        self._world = world
        self._stage = stage
        self._compute = compute
        self._pairs = pairs
        self._update = Update(weights, stage.optimizer, scales_loss=scales_loss)
        self._rate = RateConfig(stage.optimizer.schedule, stage.optimizer.warmup, stage.steps)
        self._normalises = stage.objectives.feature_kd.normalise == "teacher_power" and bool(pairs)
        self._power = objectives.no_power(len(pairs), world.device)
        self._sums: Tensor | None = None
        self._num_steps = 0

    def lr(self, step: int) -> float:
        """Return the learning rate of the step that follows ``step`` finished ones."""
        return self._stage.optimizer.lr * rate(step, self._rate)

    def calibrate(self, batches: Iterator[Batch], count: int) -> None:
        """Measure the teacher's activations on the next step's ``count`` micro-batches, before anything is divided."""
        if self._normalises and float(self._power.weight) == 0:
            self._see(sum(self._compute.teacher_power(next(batches)) for _ in range(count)) / count)

    def step(self, batches: Iterator[Batch], count: int, number: int) -> None:
        """Take the optimizer step that follows ``number`` finished ones, on ``count`` micro-batches; nothing waits."""
        power_P = self._power.means() if self._normalises else torch.ones_like(self._power.sums_P)
        losses, powers = [], []
        for i in range(count):
            batch = next(batches)
            with self.weights.micro_batch(i, count):
                terms = self._compute(batch, power_P)
                (terms.total * (self._update.scale / count)).backward()
            losses.append(torch.cat([terms.total.detach()[None], terms.values_K]))
            powers.append(terms.power_P)
        norm = self._update.apply(self.lr(number))
        self.ema.update(number + 1)
        if self._normalises:
            self._see(torch.stack(powers).mean(0))
        measured = torch.cat([torch.stack(losses).mean(0), norm[None]])
        measured = torch.where(torch.isfinite(measured), measured, 0.0)
        self._sums = measured if self._sums is None else self._sums + measured
        self._num_steps += 1

    def _see(self, mean_squares_P: Tensor) -> None:
        self._power = objectives.updated_power(self._power, self._world.mean(mean_squares_P))

    def look(self) -> Measured:
        """Return what was measured since the last look; the one place that waits for the device."""
        assert self._sums is not None
        counters = torch.stack([self._update.bad_in_all, self._update.most_in_a_row])
        num_bad, most = (int(value) for value in counters.tolist())
        loss, *terms, norm = (self._world.mean(self._sums) / self._num_steps).tolist()
        names = ("task", "output_kd", *self._pairs)
        result = Measured(self._num_steps, dict(zip(names, terms, strict=True)), loss, norm, num_bad, most)
        self._sums, self._num_steps = None, 0
        self._update.most_in_a_row.zero_()
        return result

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return whole tensors by group and name, and facts; every process must ask, the main one gets them."""
        groups = {
            "weights": self.weights.whole(self.weights.masters),
            "ema": self.weights.whole(list(self.ema.state().values())),
            **{ADAM + kind: tensors for kind, tensors in self._update.tensors()},
        }
        held = {name: self._kept(tensors) for name, tensors in groups.items()}
        held["power"] = {"sums": self._power.sums_P.cpu(), "weight": self._power.weight.cpu()}
        return held, self._update.facts()

    def _kept(self, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Gathering needs all processes; keeping does not."""
        return {name: tensor for name, tensor in tensors if self._world.is_main}

    def draw(self, gallery: Gallery, step: int) -> None:
        """Draw the fixed prompts with the weights as they are; every process must ask."""
        columns = {
            "student": self.weights.whole(self.weights.masters),
            "average": self.weights.whole(list(self.ema.state().values())),
        }
        teacher = self._compute.teacher
        gallery.draw(step, self.unet_config, columns, None if teacher is None else _unet_of(teacher))

    def facts(self) -> dict[str, Any]:
        """Return the optimizer's counts; asks the device."""
        return self._update.facts()

    def broken_weights(self) -> list[str]:
        """Return the names of the weights that are not finite; every process must ask."""
        return [name for name, value in self.weights.whole(self.weights.masters) if not torch.isfinite(value).all()]

    def begin_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take over an earlier stage's weights; optimizer and average begin anew."""
        self.weights.fill(self.weights.masters, weights)
        self.weights.spread()
        self.weights.fill(list(self.ema.state().values()), weights)

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.weights.fill(self.weights.masters, tensors["weights"])
        self.weights.spread()
        self.weights.fill(list(self.ema.state().values()), tensors["ema"])
        adam = {name.removeprefix(ADAM): group for name, group in tensors.items() if name.startswith(ADAM)}
        self._update.restore(adam, facts)
        device = self._world.device
        self._power = objectives.TeacherPower(
            tensors["power"]["sums"].to(device), tensors["power"]["weight"].to(device)
        )
        self._sums, self._num_steps = None, 0


def _unet_of(network: nn.Module) -> Any:
    """Return the U-Net inside what wraps it: taps, torch's DistributedDataParallel, torch.compile."""
    for name in ("_orig_mod", "module"):
        network = getattr(network, name, network)
    return network.unet
