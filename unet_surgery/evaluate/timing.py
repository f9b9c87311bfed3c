"""Timing several things side by side, so that what disturbs the machine disturbs all of them alike. Without torch.

Every round takes each of them once; the next round begins with the next one. A ratio is that of two times of the same
round, so slow drift (heat, other programs) divides out; the median over the rounds is given with an interval that
holds for any distribution of noise, as long as the rounds do not depend on each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

__all__ = ["Ratio", "Spread", "Timed", "interleaved", "ratio", "spread"]

CONFIDENCE = 0.95
WIDE = 0.2
"""An interval wider than this share of its ratio does not carry the ratio."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the quartiles around it; ``runs`` is how many values there were."""

    median: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of ratios, and a 95 % interval of that median; None where the rounds are too few for one."""

    value: float
    interval: tuple[float, float] | None

    @property
    def is_clear(self) -> bool:
        """True if the ratio is known well: the interval is narrow, whether 1 lies in it or not."""
        return self.interval is not None and self.interval[1] - self.interval[0] <= WIDE * self.value


@dataclass(frozen=True, slots=True)
class Timed:
    """The seconds of each round, in order; ``failed`` says in words why there are no more."""

    seconds: tuple[float, ...]
    failed: str | None = None


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles of one value or more; quartiles between two values are interpolated."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def ratio(seconds: Sequence[float], base: Sequence[float]) -> Ratio:
    """Return the ratio of ``seconds`` to ``base``, round by round; both have one value a round.

    The interval goes from the k-th smallest to the k-th largest ratio, the largest k for which the median lies between
    them with a probability of 95 % (the sign test turned round: David and Nagaraja, Order Statistics, 7.1).
    """
    ratios = sorted(mine / first for mine, first in zip(seconds, base, strict=True))
    num = len(ratios)
    outside, interval = 0.0, None
    for k in range(num // 2):
        outside += 2 * comb(num, k) / 2**num
        if outside > 1 - CONFIDENCE:
            break
        interval = ratios[k], ratios[num - 1 - k]
    return Ratio(statistics.median(ratios), interval)


def interleaved(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int,
    warm_up: int,
    clock: Clock = time.perf_counter,
    settle: Callable[[], None] = lambda: None,
    why: Callable[[Exception], str | None] = lambda _: None,
    on_run: Callable[[], None] = lambda: None,
) -> list[Timed]:
    """Time each of ``calls`` once in each of ``rounds``, after ``warm_up`` calls of each that are not timed.

    ``settle`` returns when the device has nothing left to do. ``why`` says in words what an error means; the call is
    left out from then on, and the others go on. An error that it returns None for is raised. ``on_run`` is called after
    each call, or as often as it would have been.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    failed: list[str | None] = [None] * len(calls)
    for number in range(warm_up + rounds):
        for k in _in_turn(len(calls), number):
            if failed[k] is None:
                try:
                    settle()
                    begun = clock()
                    calls[k]()
                    settle()
                    if number >= warm_up:
                        seconds[k].append(clock() - begun)
                except Exception as error:
                    failed[k] = why(error)
                    if failed[k] is None:
                        raise
            on_run()
    return [Timed(tuple(times), why_not) for times, why_not in zip(seconds, failed, strict=True)]


def _in_turn(count: int, number: int) -> list[int]:
    """Return the order of a round: each begins with another one."""
    return [(number + k) % count for k in range(count)]
