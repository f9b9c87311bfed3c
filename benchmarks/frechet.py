"""The Fréchet distance of two sets of features, seen as normal distributions (Dowson and Landau 1982).

With the features of an Inception network it is known as FID (Heusel et al., arXiv 1706.08500); with others it is not,
and numbers of different features cannot be compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["frechet", "frechet_normal"]

Values = NDArray[np.floating[Any]]


def frechet(first_ND: Values, second_MD: Values) -> float:
    """Return the squared distance of two sets of D features each: fp64, whatever comes in.

    Raises:
        ValueError: a set has fewer than two rows, or the sets have another number of features.
    """
    sets = [np.asarray(features, dtype=np.float64) for features in (first_ND, second_MD)]
    if any(features.ndim != 2 or len(features) < 2 for features in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"two sets of features are needed, not {sets[0].shape} and {sets[1].shape}")
    (mean_a, cov_a), (mean_b, cov_b) = ((f.mean(axis=0), np.atleast_2d(np.cov(f, rowvar=False))) for f in sets)
    return frechet_normal(mean_a, cov_a, mean_b, cov_b)


def frechet_normal(mean_a: Values, cov_a: Values, mean_b: Values, cov_b: Values) -> float:
    """Return |μa − μb|² + tr(Σa + Σb − 2(Σa Σb)^½), the last by eigenvalues: those of Σa^½ Σb Σa^½ are Σa Σb's own."""
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = root_a @ cov_b @ root_a
    roots = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None))
    apart = float(((mean_a - mean_b) ** 2).sum())
    return max(0.0, apart + float(np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum()))
