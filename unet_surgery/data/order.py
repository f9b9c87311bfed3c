"""The order in which a run sees its samples: position → index, a new permutation every epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Order"]


class Order:
    """A function of (seed, epoch): position p is element p mod N of the permutation of epoch p div N.

    Every sample comes once an epoch, whatever the batch; batches may straddle two epochs.
    """

    def __init__(self, length: int, seed: int, salt: int = 0) -> None:
        self.length = length
        self._key = (seed, salt)
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def indices(self, start: int, count: int) -> Sequence[int]:
        """Return the indices of the positions ``start`` … ``start + count - 1``."""
        result: list[int] = []
        while len(result) < count:
            epoch, offset = divmod(start + len(result), self.length)
            result.extend(self._permutation(epoch)[offset : offset + count - len(result)].tolist())
        return result

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        found = self._epochs.get(epoch)
        if found is None:
            found = np.random.Generator(np.random.Philox(np.random.SeedSequence([*self._key, epoch]))).permutation(
                self.length
            )
            # Threads that prepare batches ahead may work on two epochs at once.
            self._epochs = {known: order for known, order in self._epochs.items() if known >= epoch - 1}
            self._epochs[epoch] = found
        return found
