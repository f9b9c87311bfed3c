"""Noise that belongs to a sample, not to a process: a slice of one counter-based stream.

Every value is a function of (seed, kind of noise, position), where a position counts the samples of a run from its
beginning. So a resumed run, or the same run on another number of processes, draws what it would have drawn.
The generator is Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011); normals are made by
Box and Muller's transform, which takes a fixed number of draws, unlike the faster rejection methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

__all__ = ["KeyedNoise"]

WORDS_PER_COUNT = 4  # what Philox 4x64 gives for each value of its counter
BITS = 23  # so that half a step below 1 is still a float32


@dataclass(frozen=True, slots=True)
class KeyedNoise:
    """Random numbers of a run. ``salt`` tells the attempts of a run apart that was rolled back."""

    seed: int
    salt: int = 0

    def uniforms(self, kind: str, start: int, count: int, width: int = 1) -> NDArray[np.float32]:
        """Return [count, width] numbers in (0, 1) of the positions ``start`` … ``start + count - 1``."""
        return self._uniforms(kind, start, count, width)

    def normals(self, kind: str, start: int, count: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return [count, *shape] standard normals of those positions."""
        width = prod(shape)
        pairs = self._uniforms(kind, start, count, width + width % 2).reshape(count, -1, 2)
        radius = np.sqrt(-2 * np.log(pairs[..., 0]))
        angle = np.float32(2 * np.pi) * pairs[..., 1]
        values = np.empty_like(pairs)
        np.multiply(radius, np.cos(angle), out=values[..., 0])
        np.multiply(radius, np.sin(angle), out=values[..., 1])
        return values.reshape(count, -1)[:, :width].reshape(count, *shape)

    def _uniforms(self, kind: str, start: int, count: int, width: int) -> NDArray[np.float32]:
        """Each word of 64 bits gives two numbers; a position takes a whole number of counts."""
        counts = -(-width // (2 * WORDS_PER_COUNT))
        key = np.random.SeedSequence([self.seed, self.salt, *kind.encode()]).generate_state(2, np.uint64)
        philox = np.random.Philox(key=key, counter=start * counts)
        halves = philox.random_raw(count * counts * WORDS_PER_COUNT).view(np.uint32)
        values = (halves >> np.uint32(32 - BITS)).astype(np.float32)
        values += np.float32(0.5)
        values *= np.float32(2.0**-BITS)
        return values.reshape(count, -1)[:, :width]
