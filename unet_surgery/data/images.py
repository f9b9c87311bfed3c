"""Pictures straight from a source as a training set, for runs that are shorter than the making of a cache.

Shapes: n samples, R resolution, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from unet_surgery.data.cacheplan import check_share
from unet_surgery.data.captions import check_caption
from unet_surgery.data.encode import as_pixels
from unet_surgery.data.pictures import decode_picture
from unet_surgery.data.reasons import BadSampleError
from unet_surgery.data.sources import Source
from unet_surgery.errors import DataError, printable
from unet_surgery.runtime.parts import tokenize

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["PictureSet"]

JUDGED_FROM = 100

log = logging.getLogger(__name__)


class PictureSet:
    """Decodes the pictures of ``source`` when they are asked for. In place of a bad sample stands the next good one.

    ``bad`` counts the bad samples that were met, by reason; each counts once. It is this process's own: of many, each
    meets its share of the samples, and one that goes on begins at none. The first one is warned of.
    """

    latents: Literal["moments", "pixels"] = "pixels"

    def __init__(self, source: Source, tokenizer: Any, resolution: int, *, max_bad: float = 0.01) -> None:
        self._source, self._tokenizer, self._resolution, self._max_bad = source, tokenizer, resolution, max_bad
        words = json.dumps(sorted(tokenizer.get_vocab().items())) + repr(tokenize(tokenizer, [""]).tolist())
        content = f"{source.fingerprint}\0{resolution}\0{words}"
        self.fingerprint = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        self._lock = threading.Lock()
        self._seen = bytearray(len(source))
        self._num_seen = 0
        self._bad: Counter[str] = Counter()
        self._first = ""

    def __len__(self) -> int:
        return len(self._source)

    @property
    def bad(self) -> dict[str, int]:
        with self._lock:
            return dict(self._bad)

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pixels, float32 [n, 3, R, R] in −1…1, and token ids, int64 [n, T].

        Raises:
            DataError: more than the share ``max_bad`` of the samples cannot be used; judged by 100 of them at least,
                and by so many that chance alone would hardly bring so many bad ones.
        """
        samples = [self._good(index) for index in indices]
        pixels = as_pixels(np.stack([picture for picture, _ in samples]))
        return pixels, tokenize(self._tokenizer, [caption for _, caption in samples])

    def empty_ids(self) -> torch.Tensor:
        return tokenize(self._tokenizer, [""])[0]

    def caption(self, index: int) -> str:
        """Return the caption that ``batch`` gives at this index."""
        return self._good(index)[1]

    def _good(self, index: int) -> tuple[NDArray[np.uint8], str]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        for step in range(len(self)):
            place = (index + step) % len(self)
            try:
                raw = self._source.read(place)
                sample = decode_picture(raw.image, self._resolution), check_caption(raw.caption)
            except BadSampleError as error:
                self._count(place, error)
            else:
                self._count(place, None)
                return sample
        raise DataError("no sample can be used", found=", ".join(self.bad))

    def _count(self, place: int, error: BadSampleError | None) -> None:
        with self._lock:
            if self._seen[place]:
                return
            self._seen[place] = 1
            self._num_seen += 1
            if error is None:
                return
            is_first = not self._bad
            self._bad[error.reason] += 1
            if is_first:
                self._first = f"{printable(self._source.id(place))} ({error.reason}{_detail(error)})"
            bad, num_seen, first = Counter(self._bad), self._num_seen, self._first
        check_share(bad, len(self), self._max_bad, f"the training pictures, first {first}")
        expected = self._max_bad * num_seen
        if num_seen >= JUDGED_FROM and sum(bad.values()) > expected + 3 * sqrt(expected):
            check_share(bad, num_seen, self._max_bad, f"the training pictures seen so far, first {first}")
        if is_first:
            log.warning("%s cannot be used: the next sample stands in for it, as for all such", first)


def _detail(error: BadSampleError) -> str:
    return f": {printable(error.found)}" if error.found else ""
