"""The running average of a student's weights, which is what is published."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from unet_surgery.distill.config import EmaConfig

__all__ = ["Ema", "caught_up", "decay_at"]


class Ema:
    """An exponential moving average of ``params`` (name → tensor), in fp32 and on their device.

    The shadow begins as a copy. Every ``every`` optimizer steps it moves towards the parameters by 1 − decay^every,
    where averaging each step would move it ``every`` times by 1 − decay; parameters should be fp32 (others are
    converted, one at a time). With ``warm_up`` the decay of a step is at most (1 + step) / (10 + step), so that the
    random beginning is forgotten. Nothing but ``step`` decides what is done, so a resumed run does the same.

    Raises:
        ValueError: a decay outside 0…1, or ``every`` below 1.
    """

    def __init__(
        self, params: Mapping[str, torch.Tensor], decay: float, *, every: int = 1, warm_up: bool = False
    ) -> None:
        if not 0 <= decay <= 1 or every < 1:
            raise ValueError(f"no average has decay {decay} every {every} steps")
        self.decay = decay
        self.every = every
        self.warm_up = warm_up
        self._names = tuple(params)
        self._params = [tensor.detach() for tensor in params.values()]
        self._shadow = [tensor.to(torch.float32, copy=True) for tensor in self._params]

    def update(self, step: int) -> None:
        """Take in the parameters after optimizer step ``step``, the first of which is 1; the device is not waited for.

        Nothing is done at steps that ``every`` does not divide.
        """
        if step % self.every == 0:
            self._move(1 - decay_at(step, self.decay, warm_up=self.warm_up) ** self.every)

    def _move(self, weight: float) -> None:
        pairs = list(zip(self._shadow, self._params, strict=True))
        same = [pair for pair in pairs if pair[1].dtype == torch.float32]
        with torch.no_grad():
            if same:
                torch._foreach_lerp_([shadow for shadow, _ in same], [param for _, param in same], weight)
            for shadow, param in pairs:
                if param.dtype != torch.float32:
                    shadow.lerp_(param.float(), weight)

    def state(self) -> dict[str, torch.Tensor]:
        """Return name → average, fp32: the shadow itself, which the next update changes and a resume fills."""
        return dict(zip(self._names, self._shadow, strict=True))


def decay_at(step: int, decay: float, *, warm_up: bool) -> float:
    """Return what is left of an average after one step, the ``step``-th: ``decay``, or less while it warms up."""
    return min(decay, (1 + step) / (10 + step)) if warm_up else decay


def caught_up(
    average: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    step: int,
    config: EmaConfig,
) -> Mapping[str, torch.Tensor]:
    """Return an average as it is to be used after ``step``: with the steps since its last update taken in.

    The running average is left as it is, so that a run that goes on from here is one that never stopped.
    """
    rest = step % config.every
    if rest == 0:
        return average
    left = decay_at(step, config.decay, warm_up=config.warmup) ** rest
    return {name: value.lerp(weights[name].to(value.device, value.dtype), 1 - left) for name, value in average.items()}
