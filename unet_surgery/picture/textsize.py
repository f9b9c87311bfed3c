"""How wide a text may get, without a font at hand.

The estimate is of DejaVu Sans, about the widest of the fonts that a system puts behind ``sans-serif``, rounded up: a
text that fits by it fits in what a reader's machine has.
"""

from __future__ import annotations

import unicodedata

__all__ = ["fit", "text_width"]

NARROW, MEDIUM, CAPITAL, WIDE, IDEOGRAPH = 0.42, 0.66, 0.80, 1.0, 1.35
BOLD_FACTOR = 1.12

_NARROW = frozenset(" !'()*,-./:;I[]`fijlrt{|}")
_WIDE = frozenset("%+<=>@MW^mw~")


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Return an upper estimate of the width of ``text`` at a font size, in the unit of ``size``."""
    return sum(map(_em, text)) * size * (BOLD_FACTOR if bold else 1)


def fit(text: str, size: float, room: float, *, bold: bool = False) -> str:
    """Return ``text``, cut with an ellipsis where it would be wider than ``room``."""
    if text_width(text, size, bold=bold) <= room:
        return text
    while text and text_width(text + "…", size, bold=bold) > room:
        text = text[:-1]
    return text.rstrip() + "…"


def _em(character: str) -> float:
    """Return the width of a character in ems."""
    if character in _NARROW:
        return NARROW
    if character in _WIDE:
        return WIDE
    if character.isascii():
        return CAPITAL if character.isupper() or character in "#$&?" else MEDIUM
    return IDEOGRAPH if unicodedata.east_asian_width(character) in "WF" else WIDE
