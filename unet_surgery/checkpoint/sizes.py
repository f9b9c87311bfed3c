"""Sizes as people write them."""

from __future__ import annotations

from unet_surgery.errors import UsageError

__all__ = ["parse_size"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int) -> int:
    """Return a size in bytes from an integer or text such as ``500MB``, ``5GB`` (decimal) or ``2GiB`` (binary).

    Raises:
        UsageError: the text is not a size, or not positive.
    """
    if isinstance(text, int):
        size = text
    else:
        number = text.strip().upper().rstrip("KMGTIB")
        unit = text.strip().upper()[len(number) :]
        try:
            size = int(float(number) * _UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            size = 0
    if size <= 0:
        raise UsageError("this is not a size", expected="a number with a unit, such as 5GB or 500MB", found=repr(text))
    return size
