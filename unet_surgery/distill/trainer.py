"""One stage of a run, in memory: a step, what was measured since somebody last looked, and the state to go on from.

K terms of the loss · P feature pairs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unet_surgery.data.batches import Batch
from unet_surgery.distill import objectives
from unet_surgery.distill.compute import Loss
from unet_surgery.distill.config import EmaConfig, Stage
from unet_surgery.distill.ema import Ema
from unet_surgery.distill.gallery import Gallery
from unet_surgery.distill.metrics import FEATURE
from unet_surgery.distill.rates import RateConfig, rate
from unet_surgery.distill.update import Update
from unet_surgery.distill.weights import TrainedWeights
from unet_surgery.distill.world import World
from unet_surgery.lower.features import FeaturePair, tap_name

__all__ = ["Measured", "StageTrainer"]

ADAM = "adam_"


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over the steps since the last look, over all processes."""

    num_steps: int
    terms: dict[str, float]
    """Unweighted: those that the stage's loss names, and each feature pair's."""
    loss: float
    grad_norm: float
    bad_steps: int
    """In all, of the stage so far: their gradients were not finite, and they were not applied."""
    most_bad_in_a_row: int


class StageTrainer:
    """Weights, optimizer, average and objectives of one stage."""

    def __init__(
        self,
        world: World,
        stage: Stage,
        weights: TrainedWeights,
        compute: Loss,
        *,
        ema: EmaConfig,
        pairs: tuple[FeaturePair, ...],
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
        self._names = (*compute.names, *(f"{FEATURE}{tap_name(pair.student)}" for pair in pairs))
        self._update = Update(weights, stage.optimizer, scales_loss=scales_loss)
        self._rate = RateConfig(stage.optimizer.schedule, stage.optimizer.warmup, stage.steps)
        self._normalises = stage.objectives.feature_kd.normalise == "teacher_power" and bool(pairs)
        self._power = objectives.no_power(len(pairs), world.device)
        zeros = torch.zeros(len(("loss", *self._names, "grad_norm")), device=world.device)
        self._sums, self._counts = zeros, zeros.clone()
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
        self._note(torch.cat([torch.stack(losses).mean(0), norm[None]]))

    def end(self) -> None:
        """Take the stage's last steps into the average."""
        self.ema.catch_up(self._stage.steps)

    def _note(self, measured: Tensor) -> None:
        """Add up what is finite; what is not is counted elsewhere, and no mean is of it."""
        is_finite = torch.isfinite(measured)
        self._sums += torch.where(is_finite, measured, 0.0)
        self._counts += is_finite
        self._num_steps += 1

    def _see(self, mean_squares_P: Tensor) -> None:
        """Take in the teacher's power; one overflow must not stay in it for ever."""
        mean_squares_P = self._world.mean(mean_squares_P)
        seen = objectives.updated_power(self._power, mean_squares_P)
        is_finite = torch.isfinite(mean_squares_P).all()
        self._power = objectives.TeacherPower(
            *(torch.where(is_finite, new, old) for new, old in zip(seen, self._power, strict=True))
        )

    def look(self) -> Measured:
        """Return what was measured since the last look; the one place that waits for the device."""
        counters = torch.stack([self._update.bad_in_all, self._update.most_in_a_row])
        num_bad, most = (int(value) for value in counters.tolist())
        means = self._world.mean(self._sums) / self._world.mean(self._counts).clamp(min=1e-9)
        loss, *terms, norm = means.tolist()
        result = Measured(self._num_steps, dict(zip(self._names, terms, strict=True)), loss, norm, num_bad, most)
        self._sums.zero_()
        self._counts.zero_()
        self._num_steps = 0
        self._update.most_in_a_row.zero_()
        return result

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return whole tensors by group and name, and facts; every process must ask, the main one gets them."""
        groups = {
            "weights": self.weights.whole(self.weights.masters),
            "ema": self.weights.whole(list(self.ema.state().values())),
            **{ADAM + kind: tensors for kind, tensors in self._update.tensors()},
        }
        return {name: self._kept(tensors) for name, tensors in groups.items()}, self.facts()

    def _kept(self, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Gathering needs all processes; keeping does not."""
        return {name: tensor for name, tensor in tensors if self._world.is_main}

    def draw(self, gallery: Gallery, step: int, stage_number: int) -> None:
        """Draw the fixed prompts with the weights as they are; every process must ask."""
        columns = {
            "student": self._kept(self.weights.whole(self.weights.masters)),
            "average": self._kept(self.weights.whole(list(self.ema.state().values()))),
        }
        teacher = self._compute.teacher
        if self._world.is_main:
            drawn = None if teacher is None else (_unet_of(teacher), self._compute.teacher_predicts)
            gallery.draw(step, self.unet_config, columns, drawn, stage_number)

    def facts(self) -> dict[str, Any]:
        """Return what else a run needs to go on exactly, as JSON data; asks the device, and every process must ask."""
        return {
            **self._update.facts(),
            "pairs": [asdict(pair) for pair in self._pairs],
            "power": [self._power.sums_P.tolist(), self._power.weight.item()],
            # means of what this process has seen are not yet those of all
            "sums": self._world.mean(self._sums.clone()).tolist(),
            "counts": self._world.mean(self._counts.clone()).tolist(),
            "num_steps": self._num_steps,
            "most_in_a_row": int(self._update.most_in_a_row),
        }

    def broken_weights(self) -> list[str]:
        """Return the names of the weights that are not finite; every process must ask."""
        return [name for name, value in self.weights.whole(self.weights.masters) if not torch.isfinite(value).all()]

    def begin_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take over an earlier stage's weights; optimizer and average begin anew."""
        self.weights.fill(self.weights.masters, weights)
        self.weights.spread()
        self.weights.fill(list(self.ema.state().values()), weights)

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave; the tensors need to be there in the main process only."""
        self.weights.fill(self.weights.masters, tensors.get("weights", {}))
        self.weights.spread()
        self.weights.fill(list(self.ema.state().values()), tensors.get("ema", {}))
        adam = {name.removeprefix(ADAM): group for name, group in tensors.items() if name.startswith(ADAM)}
        self._update.restore(adam, facts)
        device = self._world.device
        sums_P, weight = facts["power"]
        self._power = objectives.TeacherPower(torch.tensor(sums_P, device=device), torch.tensor(weight, device=device))
        self._sums = torch.tensor(facts["sums"], device=device)
        self._counts = torch.tensor(facts["counts"], device=device)
        self._num_steps = int(facts["num_steps"])
        self._update.most_in_a_row.fill_(int(facts["most_in_a_row"]))


def _unet_of(network: nn.Module) -> Any:
    """Return the U-Net inside what wraps it: taps, torch's DistributedDataParallel, torch.compile."""
    for name in ("_orig_mod", "module"):
        network = getattr(network, name, network)
    return network.unet
