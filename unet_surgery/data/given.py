"""Pictures that are given to a U-Net beside prompts, one a prompt: to start from, or as masks.

Shapes: B pictures, S their side; luma as in ITU-R BT.601.
"""

from __future__ import annotations

import functools
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
from unet_surgery.data.suffixes import SUFFIXES
from unet_surgery.errors import DataError, TeacherError

__all__ = ["GivenPictures", "open_given"]

LUMA = (0.299, 0.587, 0.114)
LIMITS = PictureLimits(min_side=1)


@dataclass(frozen=True)
class GivenPictures:
    """The pictures of a folder, in the order of its metadata, or of their names where it has none."""

    folder: Path
    names: tuple[str, ...]
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
        data = self._bytes(index)
        try:
            return decode_picture(data, side, LIMITS)
        except BadSampleError as error:
            raise self._refused(index, error) from error

    def _bytes(self, index: int) -> bytes:
        try:
            if self._source is not None:
                return self._source.read(index).image
            return read_regular(self.folder / self.names[index], MAX_PICTURE_BYTES)
        except BadSampleError as error:
            raise self._refused(index, error) from error
        except TeacherError as error:
            raise DataError(error.what, where=error.where, found=error.found) from error

    def _refused(self, index: int, error: BadSampleError) -> DataError:
        where = str(self.folder / self.names[index])
        return DataError(f"a picture cannot be used: {error.reason}", where=where, found=error.found)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of names and contents: another picture of the same size under the same name is another."""
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            data = self._bytes(index)
            digest.update(f"{name}\0{len(data)}\0".encode("utf-8", "surrogateescape") + data)
        return digest.hexdigest()


def open_given(folder: str | Path, count: int, *, limit: bool = False) -> GivenPictures:
    """Open a folder of ``count`` pictures, or with ``limit`` the first of that many or more.

    Hidden files, such as macOS leaves beside pictures, are none.

    Raises:
        DataError: there is no such folder, or it has another number of pictures.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError("there is no such folder of pictures", where=str(root))
    source: FolderSource | None = None
    if metadata := find_metadata(root):
        source = FolderSource(root, metadata, caption=CAPTION_COLUMNS[0])
        names = tuple(map(source.id, range(len(source))))
    else:
        names = tuple(sorted(path.name for path in root.iterdir() if _is_picture(path)))
    if len(names) < count or (len(names) > count and not limit):
        raise DataError(
            "prompts and pictures are not of one number",
            where=str(root),
            expected=f"{count} pictures, one a prompt",
            found=f"{len(names)}",
        )
    return GivenPictures(root, names[:count], source)


def _is_picture(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and path.is_file()
