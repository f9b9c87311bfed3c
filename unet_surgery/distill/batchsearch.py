"""The search for the largest micro-batch that fits: pure, so that it can be tried without a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["largest_fitting"]


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest of ``sizes`` (ascending) that fits; None if not even the first does.

    What fits is taken to be all up to a bound. Sizes are tried as they double, from the smallest, so that nothing is
    asked for that is much larger than what is known to fit; between the last that fitted and the first that did not, by
    bisection. No size is tried twice.
    """
    low, high = -1, len(sizes)  # sizes[low] fits, sizes[high] does not
    while low + 1 < high:
        tried = _doubled(sizes, low) if high == len(sizes) else (low + high) // 2
        if fits(sizes[tried]):
            low = tried
        else:
            high = tried
    return None if low < 0 else sizes[low]


def _doubled(sizes: Sequence[int], low: int) -> int:
    """Return the place of the largest size that is at most twice ``sizes[low]``, or of the next one."""
    if low < 0:
        return 0
    doubled = [i for i in range(low + 1, len(sizes)) if sizes[i] <= 2 * sizes[low]]
    return doubled[-1] if doubled else low + 1
