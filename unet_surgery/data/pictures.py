"""A picture's file as the square of RGB values that training sees, or the reason why there is none.

Shapes: R resolution; pictures are [height, width, 3].
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unet_surgery.checkpoint.foreign import recognise
from unet_surgery.data.reasons import BadSampleError, Reason
from unet_surgery.errors import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MAX_PICTURE_BYTES", "PictureLimits", "decode_picture", "decode_whole", "size_of_picture"]

MAX_PICTURE_BYTES = 256 << 20
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is tried. PIL's other formats are for documents and science; one of them starts Ghostscript."""

Found = TypeVar("Found")

_CUT_SHORT = ("truncated", "not processed", "end of file", "unexpected end", "no more data", "incomplete")
_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")
_filters = threading.Lock()


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """What is no training picture: sides in pixels, long side by short side, and width · height."""

    min_side: int = 16
    max_aspect: float = 8.0
    max_pixels: int = 64 << 20


def decode_picture(data: bytes, resolution: int, limits: PictureLimits | None = None) -> NDArray[np.uint8]:
    """Return the picture in ``data`` as uint8 RGB [R, R, 3]: the centre square, resampled by Lanczos.

    Turned as its EXIF says, over white where it is transparent, the first frame of an animation, the high byte of
    16-bit grey. Safe in threads. Nothing is decoded before the header's size has been found sane.

    Raises:
        BadSampleError: it is no picture, damaged, or beyond ``limits``.
    """
    square = _decoded(data, limits, lambda picture: _centre_square(_as_rgb(_upright(picture)), resolution))
    return np.array(square, dtype=np.uint8)


def decode_whole(data: bytes, limits: PictureLimits | None = None) -> NDArray[np.uint8]:
    """Return the picture in ``data`` as it is stored, uint8 RGB [height, width, 3]: not turned, cut or resampled.

    It is what scores are computed of: PIL's ``convert("RGB")``, which lets transparency go; 16-bit and
    floating-point values, which it would clip, are refused. Safe in threads.

    Raises:
        BadSampleError: it is no picture, damaged, or beyond ``limits``.
    """
    return np.array(_decoded(data, limits, _as_stored), dtype=np.uint8)


def size_of_picture(data: bytes, limits: PictureLimits | None = None) -> tuple[int, int]:
    """Return the width and height that the header of ``data``, which may be cut short after it, tells.

    Raises:
        BadSampleError: it is no picture, or one beyond ``limits``.
    """
    return _guarded(data, limits, lambda picture: picture.size)


def _as_stored(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        raise BadSampleError("unreadable", f"values of more than 8 bits ({picture.mode})")
    return picture.convert("RGB")


def _decoded(data: bytes, limits: PictureLimits | None, then: Callable[[Image.Image], Image.Image]) -> Image.Image:
    def decode(picture: Image.Image) -> Image.Image:
        picture.load()
        return then(picture)

    return _guarded(data, limits, decode)


def _guarded(data: bytes, limits: PictureLimits | None, use: Callable[[Image.Image], Found]) -> Found:
    """Open the picture, check its size, and return what ``use`` makes of it before it is closed."""
    _check_start(data)
    try:
        with _open(data) as picture:
            _check_size(picture.size, limits or PictureLimits())
            return use(picture)
    except BadSampleError:
        raise
    except Image.DecompressionBombError as error:
        raise BadSampleError("bomb", printable(str(error))) from error
    except MemoryError as error:
        raise BadSampleError("bomb", "more than memory holds") from error
    except Exception as error:  # a decoder of hostile bytes may raise anything, and none of it is a fault of ours
        raise BadSampleError(_reason(error), _words(error)) from error


def _check_start(data: bytes) -> None:
    if not data:
        raise BadSampleError("empty")
    if len(data) > MAX_PICTURE_BYTES:
        raise BadSampleError("bomb", f"{len(data)} bytes")
    if not any(data[:4096]):
        raise BadSampleError("unreadable", "zero bytes")
    known = recognise(data[:64], len(data)) or ""
    if "LFS" in known:
        raise BadSampleError("lfs-pointer", known)
    if "HTML" in known:
        raise BadSampleError("html", known)


def _check_size(size: tuple[int, int], limits: PictureLimits) -> None:
    width, height = size
    shown = f"{width}×{height}"
    if width * height > limits.max_pixels:
        raise BadSampleError("bomb", f"{shown}, more than {limits.max_pixels:,} pixels")
    if min(size) < limits.min_side:
        raise BadSampleError("too-small", shown)
    if max(size) > limits.max_aspect * min(size):
        raise BadSampleError("extreme-aspect", shown)


def _open(data: bytes) -> Image.Image:
    """Read the header. PIL warns of odd ones on the way; the lock is because filters belong to the whole process."""
    Image.init()
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def _upright(picture: Image.Image) -> Image.Image:
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF blocks
        try:
            orientation = picture.getexif().get(0x0112, 1)
        except Exception:  # noqa: BLE001  # a damaged block says nothing, and the picture is whole
            return picture
        return ImageOps.exif_transpose(picture) if orientation in range(2, 9) else picture


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        return _from_16_bit(picture)
    if picture.mode == "F":
        raise BadSampleError("unreadable", "floating-point values, whose white is not known")
    if picture.mode in ("RGBa", "La"):
        picture = picture.convert(picture.mode.upper())  # alpha was multiplied in
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_16_bit(picture: Image.Image) -> Image.Image:
    """PIL clips at 255 where it converts these itself."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise BadSampleError("unreadable", "32-bit values, whose white is not known")
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")


def _centre_square(picture: Image.Image, resolution: int) -> Image.Image:
    """Resize the shorter side and crop the middle, in one step."""
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    if (side, left % 1, top % 1) == (resolution, 0, 0):
        return picture.crop((int(left), int(top), int(left) + side, int(top) + side))
    box = (left, top, left + side, top + side)
    return picture.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)


def _reason(error: Exception) -> Reason:
    text: Any = str(error).lower()
    return "truncated" if any(words in text for words in _CUT_SHORT) else "unreadable"


def _words(error: Exception) -> str:
    """Return what a decoder says, without addresses: they differ from run to run, and quarantine.jsonl does not."""
    if isinstance(error, UnidentifiedImageError):
        return f"in none of the formats that are read: {', '.join(FORMATS)}"
    return printable(_OBJECT.sub("the data", str(error)) or type(error).__name__)
