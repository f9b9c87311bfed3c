"""The Fréchet distance of two sets of features seen as normal distributions, and the moments it needs.

Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982. With pool3 features of the
Inception network it is FID (Heusel et al., arXiv 1706.08500); with others it is not.

Shapes: N features, D of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Moments", "frechet_distance"]

Values = NDArray[np.float64]

MOST_NEGATIVE = 1e-6
"""How far below zero, as a share of the largest, an eigenvalue of a covariance may lie by rounding."""


class Moments:
    """Mean and covariance of features that come in batches, in fp64 and without keeping them: 2 · D² numbers.

    Batches are merged by Chan, Golub and LeVeque's update (1979), so that their sizes change results by rounding only.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean_D = torch.zeros(0, dtype=torch.float64)
        self._scatter_DD = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features_ND: torch.Tensor) -> None:
        """Take in a batch of features, on whatever device (fp64 is done on the CPU where the device has none)."""
        device = "cpu" if features_ND.device.type == "mps" else features_ND.device
        batch_ND = features_ND.detach().to(device).double()
        if not len(batch_ND):
            return
        mean_D = batch_ND.mean(dim=0)
        centred_ND = batch_ND - mean_D
        scatter_DD = centred_ND.T @ centred_ND
        if self.count:
            apart_D = mean_D - self._mean_D
            weight = self.count * len(batch_ND) / (self.count + len(batch_ND))
            scatter_DD += self._scatter_DD
            scatter_DD += torch.outer(apart_D, apart_D * weight)
            mean_D = self._mean_D + apart_D * (len(batch_ND) / (self.count + len(batch_ND)))
        self._mean_D, self._scatter_DD = mean_D, scatter_DD
        self.count += len(batch_ND)

    def mean_and_covariance(self) -> tuple[Values, Values]:
        """Return μ [D] and the unbiased Σ [D, D], symmetric to the last bit.

        Raises:
            ValueError: fewer than two features came.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs two features or more, not {self.count}")
        sigma_DD = self._scatter_DD.cpu().numpy() / (self.count - 1)
        return self._mean_D.cpu().numpy(), (sigma_DD + sigma_DD.T) / 2


def frechet_distance(
    mu_a_D: NDArray[np.floating[Any]],
    sigma_a_DD: NDArray[np.floating[Any]],
    mu_b_D: NDArray[np.floating[Any]],
    sigma_b_DD: NDArray[np.floating[Any]],
) -> float:
    """Return |μa − μb|² + tr Σa + tr Σb − 2 tr (Σa Σb)^½, in fp64.

    The last trace is the nuclear norm of Σa^½ Σb^½: the sum of the singular values of Fa' Fb, where Σ = F F' by its
    eigenvectors. No root is taken of a matrix that is not symmetric, nothing imaginary comes up, and nothing is added
    to the diagonal where Σ is singular: eigenvalues that are rounding, D · ε of the largest, are left out, and the
    result is good to about ε of the traces whatever the rank. (The eigenvalues of Σa Σb, and scipy's sqrtm of it,
    which pytorch-fid takes, are squares: their rounding comes out of the root as √ε.)

    Raises:
        ValueError: a covariance has an eigenvalue below zero by more than rounding.
    """
    across = _factor(sigma_a_DD.astype(np.float64)).T @ _factor(sigma_b_DD.astype(np.float64))
    nuclear = np.linalg.svd(across, compute_uv=False).sum()
    apart = mu_a_D.astype(np.float64) - mu_b_D.astype(np.float64)
    return float(apart @ apart + np.trace(sigma_a_DD) + np.trace(sigma_b_DD) - 2 * nuclear)


def _factor(sigma_DD: Values) -> Values:
    """Return F [D, rank] with Σ = F F'."""
    values_D, vectors_DD = np.linalg.eigh(sigma_DD)
    largest = abs(values_D[-1])
    if values_D[0] < -MOST_NEGATIVE * largest:
        raise ValueError(f"a covariance has the eigenvalue {values_D[0]:.3g}, the largest being {largest:.3g}")
    kept = values_D > len(values_D) * np.finfo(np.float64).eps * largest
    factor: Values = vectors_DD[:, kept] * np.sqrt(values_D[kept])
    return factor
