"""What stands before the page: it is for this machine's own browser alone, and loads nothing from elsewhere.

It is bound to the loopback, and there is no option for more: whoever reaches the page can keep the machine busy.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from unet_surgery.errors import UsageError

__all__ = ["HEADERS", "HOST", "OnlyHere", "bound", "is_ours"]

HOST = "127.0.0.1"
FIRST_PORT, NUM_PORTS = 7860, 100

OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?")
"""What a browser may call this machine. A name of the internet that was made to mean 127.0.0.1 is none of them."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""What the page may load: nothing from elsewhere, whatever gradio's next version wants."""

HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def bound(port: int | None) -> socket.socket:
    """Return a listening socket of the loopback: ``port``, any if 0, the first that is free from 7860 on if None.

    Raises:
        UsageError: the port is taken, or is none.
    """
    if port is not None and not 0 <= port <= 65535:
        raise UsageError("there is no such port", expected="0 … 65535", found=str(port))
    ports = range(FIRST_PORT, FIRST_PORT + NUM_PORTS) if port is None else [port]
    for number in ports:
        with contextlib.suppress(OSError):
            return socket.create_server((HOST, number))
    asked = f"{FIRST_PORT} … {FIRST_PORT + NUM_PORTS - 1}" if port is None else str(port)
    raise UsageError("the port cannot be had", found=asked, hint="--port 0 takes one that is free")


class OnlyHere:
    """Refuses requests to other names than this machine's, and those that other sites' pages make."""

    def __init__(self, application: Any) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        if not is_ours(_header(scope, b"host"), _header(scope, b"origin")):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this demo is for the machine that it runs on\n"})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        await self._application(scope, receive, guarded)


def is_ours(host: str | None, origin: str | None) -> bool:
    """Tell whether a request names this machine (any port: it may come through a tunnel) and comes from its page."""
    if host is None or OWN_HOST.fullmatch(host) is None:
        return False
    return origin is None or origin == f"http://{host}"


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
