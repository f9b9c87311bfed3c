"""Pictures written by threads while the next are drawn; zlib runs without Python's lock."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unet_surgery.sample.generated import GeneratedFolder
from unet_surgery.sample.keep import Keeping

__all__ = ["Writers"]

WRITERS = 2
AHEAD = 32
"""Pictures that may wait to be written."""


class Writers:
    """Threads that write pictures while others are drawn; a context manager, which waits for all of them.

    Where an error leaves the block, what is not begun is dropped, and what is begun becomes whole.
    """

    def __init__(self, folders: Sequence[GeneratedFolder], keeping: Keeping) -> None:
        self._folders, self._keeping = folders, keeping
        self._pool = ThreadPoolExecutor(WRITERS)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Writers:
        return self

    def write(self, index: int, picture: NDArray[np.uint8]) -> None:
        """Write a picture soon; raises what went wrong with earlier ones."""
        self._waiting.append(self._pool.submit(self._write, index, picture))
        while len(self._waiting) > AHEAD:
            self._waiting.popleft().result()

    def _write(self, index: int, picture: NDArray[np.uint8]) -> None:
        kept, *full = self._folders
        for folder in full:
            folder.write(index, _png(self._keeping.stored(picture)))
        kept.write(index, _png(self._keeping.kept(picture)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while error is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
