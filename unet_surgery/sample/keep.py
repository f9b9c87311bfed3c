"""From a drawn picture to the file that is kept: made smaller, passed through JPEG, written as PNG.

JPEG is part of a protocol where published numbers were computed from such files: what it takes away moves an FID.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unet_surgery.errors import UsageError, printable

__all__ = ["FILTERS", "Keeping", "is_whole_png", "picture_name"]

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""PIL's, which widen with the factor when a picture is made smaller. Its own default is bicubic."""

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"


@dataclass(frozen=True, slots=True)
class Keeping:
    """What becomes of drawn pictures: (width, height) they are resized to, by which filter, through which JPEG quality.

    With both, they pass through JPEG before and after, as when either size is stored as such a file.

    Raises:
        UsageError: there is no such filter or quality, or no such size.
    """

    size: tuple[int, int] | None = None
    filter: str = "bicubic"
    jpeg: int | None = None

    def __post_init__(self) -> None:
        if self.filter not in FILTERS:
            raise UsageError("there is no such filter", expected=", ".join(FILTERS), found=printable(self.filter))
        if self.jpeg is not None and not 1 <= self.jpeg <= 100:
            raise UsageError("JPEG has no such quality", expected="1 … 100", found=str(self.jpeg))
        if self.size is not None and min(self.size) < 1:
            raise UsageError("pictures cannot be resized to this", found=f"{self.size[0]}×{self.size[1]}")

    def kept(self, drawn: NDArray[np.uint8]) -> Image.Image:
        """Return the picture that is kept of a drawn one, uint8 [height, width, 3]."""
        picture = self.stored(drawn)
        if self.size is None:
            return picture
        return self._through_jpeg(picture.resize(self.size, FILTERS[self.filter]))

    def stored(self, drawn: NDArray[np.uint8]) -> Image.Image:
        """Return the picture at the size it was drawn at, through JPEG if that is wanted."""
        return self._through_jpeg(Image.fromarray(np.ascontiguousarray(drawn)))

    def _through_jpeg(self, picture: Image.Image) -> Image.Image:
        if self.jpeg is None:
            return picture
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=self.jpeg)
        with Image.open(file, formats=["JPEG"]) as opened:
            return opened.convert("RGB")


def picture_name(index: int, count: int) -> str:
    """Return the file's name of a prompt's picture: as many digits as all of them need, five at least."""
    return f"{index:0{max(5, len(str(count - 1)))}d}.png"


def is_whole_png(start: bytes, end: bytes, size: tuple[int, int]) -> bool:
    """Tell whether a file that begins (24 bytes) and ends (12) like this may be a whole PNG of (width, height)."""
    width, height = int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big")
    return start[:8] == PNG_START and (width, height) == size and end[-12:] == PNG_END
