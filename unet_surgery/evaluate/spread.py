"""The inception score: how sure the classes of pictures are, and how many different ones there are.

Salimans et al., "Improved techniques for training GANs", arXiv 1606.03498, as torch-fidelity 0.4.0 computes it: logits
without their bias, the set shuffled once with a fixed seed, then cut into ten splits.

Shapes: N pictures, C classes.
"""

from __future__ import annotations

import numpy as np
import torch

from unet_surgery.errors import DataError

__all__ = ["NUM_SPLITS", "SEED", "inception_score"]

NUM_SPLITS = 10
SEED = 2020


def inception_score(
    logits_NC: torch.Tensor, *, splits: int = NUM_SPLITS, seed: int | None = SEED
) -> tuple[float, float]:
    """Return mean and standard deviation, over the splits, of exp E KL(p(y|x) ‖ p(y)); in fp64.

    Without a ``seed`` the splits are of the order given.

    Raises:
        DataError: there are fewer pictures than splits.
    """
    count = len(logits_NC)
    if count < splits:
        raise DataError("too few pictures for the inception score", expected=f"{splits} or more", found=str(count))
    if seed is not None:
        logits_NC = logits_NC[torch.from_numpy(np.random.RandomState(seed).permutation(count))]
    log_p_NC = logits_NC.double().log_softmax(dim=1)
    scores = []
    for i in range(splits):
        log_p = log_p_NC[i * count // splits : (i + 1) * count // splits]
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(dim=0, keepdim=True).log())).nan_to_num(nan=0.0).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
