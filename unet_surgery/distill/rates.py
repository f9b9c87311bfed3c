"""Learning-rate schedules: pure functions of the optimizer step, whatever the number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Literal, get_args

__all__ = ["RateConfig", "Schedule", "rate"]

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class RateConfig:
    """How the learning rate goes: up from 0 over ``warmup_steps``, then as ``schedule`` says until ``num_steps``.

    ``linear`` and ``cosine`` end at 0, and stay there.

    Raises:
        ValueError: a schedule that is not known, or numbers that make none.
    """

    schedule: Schedule = "constant"
    warmup_steps: int = 0
    num_steps: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"no schedule is called {self.schedule!r}; there are {', '.join(get_args(Schedule))}")
        if self.warmup_steps < 0:
            raise ValueError("warmup_steps must not be negative")
        if self.schedule != "constant" and self.num_steps <= self.warmup_steps:
            raise ValueError(f"the warm-up ({self.warmup_steps}) takes all of the {self.num_steps} steps")


def rate(step: int, config: RateConfig) -> float:
    """Return what the learning rate is multiplied by in the step that follows ``step`` finished ones.

    So the first step of a warm-up has rate 0, as in transformers' and diffusers' ``get_scheduler``.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = min((step - config.warmup_steps) / (config.num_steps - config.warmup_steps), 1.0)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + cos(pi * done))
