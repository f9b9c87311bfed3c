"""Waiting for a Hub that is busy: how long, how often, and what is worth waiting for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from unet_surgery.hub.refusals import refusal

__all__ = ["AGAIN", "FIRST_PAUSE_SECONDS", "longer", "patience_seconds", "patiently", "retry_after"]

AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""The statuses that may pass."""
PATIENCE_SECONDS = 120.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0

T = TypeVar("T")


def patience_seconds() -> float:
    """Return for how long to go on without a byte: two minutes, or ``$UNET_SURGERY_PATIENCE`` seconds."""
    try:
        return float(os.environ["UNET_SURGERY_PATIENCE"])
    except (KeyError, ValueError):
        return PATIENCE_SECONDS


def longer(pause: float) -> float:
    """Return the pause after one of ``pause`` seconds."""
    return min(2 * pause, LONGEST_PAUSE_SECONDS)


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that ``Retry-After`` asks for, 0 where it asks for none; a date is taken for nothing said."""
    text = headers.get("retry-after", "")
    return float(text) if text.isdecimal() else 0.0


def patiently(call: Callable[[], T]) -> T:
    """Make a call of huggingface_hub, again while the Hub answers that it is busy or failing.

    Raises:
        Exception: whatever the last attempt raised.
    """
    start, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    while True:
        try:
            return call()
        except Exception as error:
            response = getattr(refusal(error), "response", None)
            if response is None or response.status_code not in AGAIN:
                raise
            wait = max(pause, retry_after(response.headers))
            if time.monotonic() + wait > start + patience_seconds():
                raise
        time.sleep(wait)
        pause = longer(pause)
