"""A file over several connections: in pieces, the first of them alone, and all given up when one fails."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Sequence

from unet_surgery.hub.partial import Range
from unet_surgery.hub.transport import CONNECTIONS, Stopped

__all__ = ["PIECE_BYTES", "fetch_pieces", "locked", "pieces"]

PIECE_BYTES = 8 << 20


def fetch_pieces(wanted: Sequence[Range], fetch: Callable[[Range], None], stop: threading.Event) -> None:
    """Fetch the pieces over several connections; the first failure stops all."""
    fetch(wanted[0])  # alone: it tells whether the server knows ranges, and where the file is
    with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
        futures = [pool.submit(fetch, piece) for piece in wanted[1:]]
        try:
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        finally:
            if not all(future.done() and future.exception() is None for future in futures):
                stop.set()
                pool.shutdown(cancel_futures=True)
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, Stopped))


def pieces(ranges: Sequence[tuple[int, int]]) -> list[Range]:
    """Return the ranges cut into pieces of 8 MiB at most."""
    return [
        Range(begin, min(begin + PIECE_BYTES, end)) for start, end in ranges for begin in range(start, end, PIECE_BYTES)
    ]


def locked(on_bytes: Callable[[int], None]) -> Callable[[int], None]:
    """Return a callback that several threads may call."""
    lock = threading.Lock()

    def count(num_bytes: int) -> None:
        with lock:
            on_bytes(num_bytes)

    return count
