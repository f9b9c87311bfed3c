"""Pictures that are given to a U-Net beside prompts, one a prompt: to start from, or as masks.

Shapes: B pictures, S their side; luma as in ITU-R BT.601.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unet_surgery.checkpoint.jsonfile import read_regular
from unet_surgery.data.imagefolder import FolderSource, find_metadata
from unet_surgery.data.pictures import MAX_PICTURE_BYTES, PictureLimits, decode_picture
from unet_surgery.data.reasons import BadSampleError
from unet_surgery.data.sources import CAPTION_COLUMNS
from unet_surgery.errors import DataError, TeacherError

__all__ = ["GivenPictures", "open_given"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm")
LUMA = (0.299, 0.587, 0.114)
LIMITS = PictureLimits(min_side=1)


@dataclass(frozen=True)
class GivenPictures:
    """The pictures of a folder, in the order of its metadata, or of their names where it has none."""

    folder: Path
    names: tuple[str, ...]
    fingerprint: str
    _source: FolderSource | None

    def read(self, indices: Sequence[int], side: int) -> NDArray[np.uint8]:
        """Return pictures as squares: their middle, resampled by Lanczos where the size differs: uint8 [B, S, S, 3].

        Raises:
            DataError: one cannot be read; names it.
        """
        return np.stack([self._one(index, side) for index in indices])

    def read_masks(self, indices: Sequence[int], side: int) -> NDArray[np.bool_]:
        """Return pictures as masks, True where they are at least half white: bool [B, S, S]."""
        return np.asarray(self.read(indices, side) @ np.array(LUMA, np.float32) >= 127.5)

    def _one(self, index: int, side: int) -> NDArray[np.uint8]:
        try:
            if self._source is not None:
                return decode_picture(self._source.read(index).image, side, LIMITS)
            return decode_picture(read_regular(self.folder / self.names[index], MAX_PICTURE_BYTES), side, LIMITS)
        except BadSampleError as error:
            where = str(self.folder / self.names[index])
            raise DataError(f"a picture cannot be used: {error.reason}", where=where, found=error.found) from error
        except TeacherError as error:
            raise DataError(error.what, where=error.where, found=error.found) from error


def open_given(folder: str | Path, count: int, *, limit: bool = False) -> GivenPictures:
    """Open a folder of ``count`` pictures, or with ``limit`` of that many or more.

    Raises:
        DataError: there is no such folder, or it has another number of pictures.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError("there is no such folder of pictures", where=str(root))
    if metadata := find_metadata(root):
        source = FolderSource(root, metadata, caption=CAPTION_COLUMNS[0])
        given = GivenPictures(root, tuple(map(source.id, range(len(source)))), source.fingerprint, source)
    else:
        paths = sorted(p for p in root.iterdir() if p.suffix.lower() in SUFFIXES)
        digest = hashlib.sha256()
        for path in paths:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        given = GivenPictures(root, tuple(path.name for path in paths), digest.hexdigest(), None)
    if len(given.names) < count or (len(given.names) > count and not limit):
        raise DataError(
            "prompts and pictures are not of one number",
            where=str(root),
            expected=f"{count} pictures, one a prompt",
            found=f"{len(given.names)}",
        )
    return given
