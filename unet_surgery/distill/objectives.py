"""What a student is trained on: free functions of tensors, one a term; weights and sums are the loop's business.

Differences are squared in fp32 whatever the networks compute in: a bf16 square keeps 8 bits.

B batch, P feature pairs; the other axes of predictions and features are what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unet_surgery.distill.diffusion import PredictionType

__all__ = [
    "POWER_DECAY",
    "TeacherPower",
    "feature_kd",
    "mean_squares",
    "min_snr_weights",
    "no_power",
    "output_kd",
    "task",
    "updated_power",
]

POWER_DECAY = 0.99


class TeacherPower(NamedTuple):
    """A running mean square of the teacher's features, and the weight that all steps so far have in it; fp32."""

    sums_P: Tensor
    weight: Tensor

    def means(self) -> Tensor:
        """Return the mean squares [P]; after one update, that of the first step alone."""
        return self.sums_P / self.weight


def task(prediction: Tensor, target: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """Return the mean squared error to the diffusion target (arXiv 2006.11239, eq. 14), a weight for each sample."""
    return _weighted_mse(prediction, target, weights_B)


def output_kd(student: Tensor, teacher: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """Return the mean squared error to the teacher's prediction (BK-SDM, arXiv 2305.15798, eq. 2: L_OutKD)."""
    return _weighted_mse(student, teacher.detach(), weights_B)


def feature_kd(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean squared error of each pair of activations, fp32 [P].

    BK-SDM's L_FeatKD is their sum (arXiv 2305.15798, eq. 3). One or two stages rule it, unless each term is divided by
    the mean square of the teacher's feature (LAPTOP-Diff, arXiv 2404.11098, weighs by the feature's norm for the same
    reason).

    Raises:
        ValueError: the two sides are not as many, none at all, or a pair's shapes differ.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(f"{len(student)} features of the student, {len(teacher)} of the teacher")
    return torch.stack([_mse(ours, theirs.detach()) for ours, theirs in zip(student, teacher, strict=True)])


def mean_squares(features: Sequence[Tensor]) -> Tensor:
    """Return the mean square of each feature, fp32 [P]; over many processes, their mean is that of the whole batch."""
    return torch.stack([feature.detach().float().square().mean() for feature in features])


def no_power(num_pairs: int, device: torch.device | str = "cpu") -> TeacherPower:
    """Return a running mean square that has seen nothing; update it before it divides."""
    return TeacherPower(torch.zeros(num_pairs, device=device), torch.zeros((), device=device))


def updated_power(power: TeacherPower, mean_squares_P: Tensor, decay: float = POWER_DECAY) -> TeacherPower:
    """Return the running mean square after one more step.

    Two tensors are all of it: stored and read back in fp32 they go on bit for bit. The weight tends to 1, and
    dividing by it is Adam's correction (arXiv 1412.6980, section 3), so that the first steps count in full.
    """
    return TeacherPower(
        power.sums_P.lerp(mean_squares_P, 1 - decay), power.weight.lerp(torch.ones_like(power.weight), 1 - decay)
    )


def min_snr_weights(snr_B: Tensor, prediction_type: PredictionType, gamma: float = 5.0) -> Tensor:
    """Return a weight for each sample, fp32 [B] (arXiv 2303.09556, section 3.4).

    min(SNR, γ) for x; for ε and v what that is after the change of target: divided by SNR, and by SNR + 1. Finite
    where SNR is 0: there ε has its limit 1, and v has 0.
    """
    if prediction_type == "epsilon":
        return (gamma / snr_B).clamp(max=1.0)
    capped_B = snr_B.clamp(max=gamma)
    return capped_B if prediction_type == "sample" else capped_B / (snr_B + 1.0)


def _weighted_mse(a: Tensor, b: Tensor, weights_B: Tensor | None) -> Tensor:
    if weights_B is None:
        return _mse(a, b)
    _same_shape(a, b)
    return ((a.float() - b.float()).square().flatten(1).mean(1) * weights_B).mean()


def _mse(a: Tensor, b: Tensor) -> Tensor:
    _same_shape(a, b)
    return (a.float() - b.float()).square().mean()


def _same_shape(a: Tensor, b: Tensor) -> None:
    """Broadcasting would make a number of any two shapes that fit; a mistake would train on."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
