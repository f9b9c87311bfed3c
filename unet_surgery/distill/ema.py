"""The running average of a student's weights, which is what is published."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["Ema"]


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

    def decay_at(self, step: int) -> float:
        """Return what is left of the average after the update at ``step``: decay^every, less while it warms up."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay
        return float(decay**self.every)

    def update(self, step: int) -> None:
        """Take in the parameters after optimizer step ``step``, the first of which is 1; the device is not waited for.

        Nothing is done at steps that ``every`` does not divide.
        """
        if step % self.every == 0:
            self._move(1 - self.decay_at(step))

    def catch_up(self, step: int) -> None:
        """Take in the parameters at the end, after optimizer step ``step``: of the steps since the last update."""
        rest = step % self.every
        if rest:
            self._move(1 - self.decay_at(step) ** (rest / self.every))

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
