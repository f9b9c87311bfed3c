"""Captions as the text encoder may see them: text, not empty, of a caption's length, without control characters."""

from __future__ import annotations

import unicodedata

from unet_surgery.data.reasons import BadSampleError
from unet_surgery.errors import printable

__all__ = ["MAX_CAPTION_CHARS", "check_caption"]

MAX_CAPTION_CHARS = 10_000
_WHITE = "\t\n\r"  # tokenizers read these as spaces
_REFUSED = {"Cc": "a control character", "Cs": "half a character (a lone surrogate)"}


def check_caption(caption: object) -> str:
    """Return ``caption`` as it is.

    Raises:
        BadSampleError: it is None, no text, blank, longer than 10,000 characters, or holds a control character other
            than tab and line ends, or a lone surrogate (what bytes that are not UTF-8 are read as).
    """
    if caption is None:
        raise BadSampleError("caption-missing")
    if not isinstance(caption, str):
        raise BadSampleError("caption-bad-text", f"{type(caption).__name__} in place of text")
    if len(caption) > MAX_CAPTION_CHARS:
        raise BadSampleError("caption-huge", f"{len(caption)} characters")
    if not caption.strip():
        raise BadSampleError("caption-empty")
    if not caption.isprintable():
        for place, character in enumerate(caption):
            kind = _REFUSED.get(unicodedata.category(character))
            if kind is not None and character not in _WHITE:
                raise BadSampleError("caption-bad-text", f"{kind} {printable(character)} at {place}")
    return caption
