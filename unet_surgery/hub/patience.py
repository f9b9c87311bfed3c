"""Waiting for a Hub that is busy: how long, how often, and what is worth waiting for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from unet_surgery.hub.refusals import refusal

__all__ = ["AGAIN", "FIRST_PAUSE_SECONDS", "bounded_waits", "longer", "patience_seconds", "patiently", "retry_after"]

AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""The statuses that may pass."""
# what the clients (httpx, requests, urllib3) call a connection that broke or fell silent
BROKEN = (
    "ReadTimeout", "ReadTimeoutError", "ReadError", "RemoteProtocolError", "WriteError", "ProtocolError",
    "ChunkedEncodingError", "IncompleteRead", "ConnectionResetError", "RemoteDisconnected",
)  # fmt: skip
PATIENCE_SECONDS = 120.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0

T = TypeVar("T")


def patience_seconds() -> float:
    """Return for how long to go on without a byte: two minutes, or ``$UNET_SURGERY_PATIENCE`` seconds."""
    try:
        seconds = float(os.environ["UNET_SURGERY_PATIENCE"])
    except (KeyError, ValueError):
        return PATIENCE_SECONDS
    return seconds if 0 <= seconds < float("inf") else PATIENCE_SECONDS


def longer(pause: float) -> float:
    """Return the pause after one of ``pause`` seconds."""
    return min(2 * pause, LONGEST_PAUSE_SECONDS)


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that ``Retry-After`` asks for, 0 where it asks for none; a date is taken for nothing said."""
    text = headers.get("retry-after", "")
    return float(text) if text.isdecimal() else 0.0


@contextmanager
def bounded_waits(seconds: float) -> Iterator[None]:
    """Let the client's session give up after ``seconds`` without a byte: by itself it waits for ever (since 1.0)."""
    from huggingface_hub import get_session

    session: Any = get_session()
    unbounded = getattr(getattr(session, "timeout", None), "read", seconds) is None
    before = session.timeout if unbounded else None
    if unbounded:
        session.timeout = seconds
    try:
        yield
    finally:
        if unbounded:
            session.timeout = before


def _is_broken(error: BaseException | None) -> bool:
    """True if a connection was there and broke or fell silent; one that cannot be made is not waited for."""
    while error is not None:
        if type(error).__name__ in BROKEN:
            return True
        error = error.__cause__ or error.__context__
    return False


def patiently(call: Callable[[], T]) -> T:
    """Make a call of huggingface_hub, again while the Hub answers that it is busy or failing, or says nothing.

    Raises:
        Exception: whatever the last attempt raised.
    """
    start, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    while True:
        try:
            return call()
        except Exception as error:
            response = getattr(refusal(error), "response", None)
            if response is None and not _is_broken(error):
                raise
            if response is not None and response.status_code not in AGAIN:
                raise
            wait = pause if response is None else max(pause, retry_after(response.headers))
            if time.monotonic() + wait > start + patience_seconds():
                raise
        time.sleep(wait)
        pause = longer(pause)
