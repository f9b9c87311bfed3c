"""How sure a share of successes is."""

from __future__ import annotations

from math import sqrt

__all__ = ["wilson"]

Z_95 = 1.959964


def wilson(successes: int, total: int, *, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's score interval of ``successes`` out of ``total``, as shares: 95 % unless ``z`` says else.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927. Of nothing, (0, 1).

    Raises:
        ValueError: the numbers are no count out of another.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} of {total} is no share")
    if total == 0:
        return 0.0, 1.0
    share, weight = successes / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z * sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
