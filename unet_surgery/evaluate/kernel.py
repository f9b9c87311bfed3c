"""The kernel Inception distance: an unbiased estimate of how far two sets of features are apart.

Bińkowski et al., "Demystifying MMD GANs", arXiv 1801.01401, as torch-fidelity 0.4.0 computes it: the squared maximum
mean discrepancy under (x·y / D + 1)³, of a hundred pairs of random subsets.

Shapes: N and M features of two sets, D of each, S of a subset.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_surgery.errors import DataError

__all__ = ["NUM_SUBSETS", "SEED", "SUBSET_SIZE", "kernel_distance"]

NUM_SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020

Values = NDArray[np.floating[Any]]


def kernel_distance(
    first_ND: Values,
    second_MD: Values,
    *,
    subsets: int = NUM_SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> tuple[float, float]:
    """Return mean and standard deviation over the subsets; the mean may lie a little below zero.

    Kernels are of the features' dtype (fp32, as torch-fidelity's are), sums in fp64.

    Raises:
        DataError: a set has fewer features than a subset.
    """
    for features in (first_ND, second_MD):
        if len(features) < size:
            raise DataError(
                "too few pictures for KID", expected=f"{size} or more in each set", found=str(len(features))
            )
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        first_SD = first_ND[random.choice(len(first_ND), size, replace=False)]
        second_SD = second_MD[random.choice(len(second_MD), size, replace=False)]
        found.append(_discrepancy(first_SD, second_SD))
    return float(np.mean(found)), float(np.std(found))


def _discrepancy(first_SD: Values, second_SD: Values) -> float:
    """Return the unbiased estimate: means of the kernel without the pairs of a feature with itself."""
    size = len(first_SD)
    within = sum(_off_diagonal(_kernel(features, features)) for features in (first_SD, second_SD))
    across = float(_kernel(first_SD, second_SD).sum(dtype=np.float64))
    return within / (size * (size - 1)) - 2 * across / size**2


def _kernel(left_SD: Values, right_SD: Values) -> Values:
    kernel: Values = (left_SD @ right_SD.T / left_SD.shape[1] + 1) ** 3
    return kernel


def _off_diagonal(kernel_SS: Values) -> float:
    return float(kernel_SS.sum(dtype=np.float64) - np.trace(kernel_SS, dtype=np.float64))
