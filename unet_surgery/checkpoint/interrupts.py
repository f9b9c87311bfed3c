"""Signals that wait while a folder is put in place or cleared away.

What a handler raises (KeyboardInterrupt is one) may otherwise arrive between any two steps, inside a clean-up too,
and leave half of it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Interrupts"]

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Stands before the handlers of SIGINT, SIGTERM and SIGHUP from :meth:`attach` to :meth:`release`.

    A signal passes to its handler as ever until :meth:`hold`, or until a handler raised: what unwinds then is not
    disturbed by a second one. What arrived while they were held is delivered by :meth:`release`.

    Python runs handlers in its main thread only, so elsewhere there is nothing to hold, and nothing is done. Signals
    that are ignored, or that end the process at once, stay as they are.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._waiting: list[int] = []
        self._holding = False
        self._released = False

    def attach(self) -> None:
        """Take the handlers' places."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in NUMBERS:
            handler = signal.getsignal(number)
            if callable(handler) and not isinstance(handler, signal.Handlers):
                self._handlers[number] = handler  # before it is replaced: it may be called at once
                signal.signal(number, self._arrived)

    def hold(self) -> None:
        """Let every signal wait from now on."""
        self._holding = True

    def pause(self) -> None:
        """Stop holding, and deliver what waited; raises what the handlers raise."""
        self._holding = False
        self._deliver()

    def release(self) -> None:
        """Give the handlers their places back and deliver what waited; raises what they raise."""
        self._released = True  # first: whatever of the rest is interrupted, nothing can be swallowed any more
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._arrived:
                signal.signal(number, handler)
        self._deliver()

    def _deliver(self) -> None:
        while self._waiting:
            signal.raise_signal(self._waiting.pop(0))

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._released:
            self._handlers[number](number, frame)
        elif self._holding:
            self._waiting.append(number)
        else:
            self._holding = True
            self._handlers[number](number, frame)
            self._holding = False  # it did not raise: work goes on
