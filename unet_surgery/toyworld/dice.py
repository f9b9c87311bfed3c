"""Random numbers as a pure function of a key, the same on every platform and in every version of numpy.

The mixing function is splitmix64's (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

__all__ = ["integers", "mixed", "uniform"]

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def mixed(keys: ArrayLike, stream: int) -> NDArray[np.uint64]:
    """Return 64 well-mixed bits for each key (0 … 2⁶⁴ − 1); every ``stream`` (≥ 0) gives others."""
    import numpy as np

    step = np.uint64((GOLDEN * (2 * stream + 1)) & MASK)  # odd, so that no two keys of a stream meet
    bits = np.atleast_1d(np.asarray(keys, dtype=np.uint64)) * np.uint64(GOLDEN) + step
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    mixed_bits: NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return mixed_bits


def uniform(keys: ArrayLike, stream: int) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each key."""
    import numpy as np

    return (mixed(keys, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(keys: ArrayLike, stream: int, below: int) -> NDArray[np.int64]:
    """Return an integer in [0, below) for each key; ``below`` is small, so the bias is far below what can be seen."""
    import numpy as np

    return (uniform(keys, stream) * below).astype(np.int64)
