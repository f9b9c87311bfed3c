"""Text as HTML."""

from __future__ import annotations

import html
import unicodedata

__all__ = ["markup"]


def markup(text: str) -> str:
    """Escape ``text``; characters that could turn or hide the text around them are shown as their code points."""
    return html.escape("".join(c if _is_plain(c) else f"U+{ord(c):04X}" for c in text))


def _is_plain(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
