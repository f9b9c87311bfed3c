"""Signals while a run goes: the loop finishes its step, saves and leaves."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

__all__ = ["Stop"]

log = logging.getLogger(__name__)

NUMBERS = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 2.0
"""A launcher passes a signal on that its workers got as well: the second of the same moment is no second thought."""


class Stop:
    """While it is entered, SIGTERM and SIGINT are noted. Another one later acts at once, as it would have."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._noted_at = 0.0
        self._before: Mapping[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._noted_at = number, now
            log.warning("%s: finishing this step and saving; once more to stop at once", signal.Signals(number).name)
        elif now - self._noted_at > ECHO_SECONDS:
            before = self._before.get(number)
            self.__exit__()
            if callable(before):
                before(number, frame)
            else:
                signal.raise_signal(number)
