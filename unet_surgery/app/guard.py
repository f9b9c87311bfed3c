"""What stands before the page: it is for this machine's own browser alone, and loads nothing from elsewhere.

It is bound to the loopback, and there is no option for more: whoever reaches the page can keep the machine busy.
gradio can do much more than this page needs, and fetches addresses for whoever asks: as ``/file=https://…``, and where
a value is an object that says it is a file. So the paths, methods and values that pass are those the page needs.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from unet_surgery.errors import UsageError

__all__ = ["HEADERS", "HOST", "OnlyHere", "bound", "is_ours", "is_plain"]

HOST = "127.0.0.1"
FIRST_PORT, NUM_PORTS = 7860, 100

OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?")
"""What a browser may call this machine. A name of the internet that was made to mean 127.0.0.1 is none of them."""

OWN_SITES = (None, "same-origin", "none")
"""What a browser says of where a request comes from: this page, or a person. Other programs say nothing."""

READ = re.compile(
    r"/|/config/?|/favicon\.ico|/theme\.css|/(assets|static)/[\w./@~+-]+"
    r"|/gradio_api/(info/?|queue/data|call/\w+/\w+|heartbeat/[\w-]+)",
    re.ASCII,
)
PICTURE = re.compile(r"/gradio_api/file=(?P<folder>/.+)/[\w.-]+/[\w.-]+", re.ASCII)
WRITTEN = re.compile(r"/gradio_api/(queue/join|run/predict|call/(draw|stop)|cancel|reset)", re.ASCII)
"""The paths that the page, gradio's client and the two calls of its HTTP interface need, by GET and by POST."""

MAX_BODY_BYTES = 64 << 10
"""Two texts of 1,000 characters, however JSON escapes them, and numbers."""

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
    """Refuses requests to other names than this machine's, those that other sites make, and all that no page needs.

    Of the disk's files, only pictures in folders in ``pictures`` are served.
    """

    def __init__(self, application: Any, pictures: str) -> None:
        self._application, self._pictures = application, pictures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
        if scope["type"] != "http":
            return
        if not is_ours(*(_header(scope, name) for name in (b"host", b"origin", b"sec-fetch-site"))):
            await _refuse(send, 403, "this demo is for the machine that it runs on, and for no other site's pages")
            return
        if not self._is_needed(scope["method"], scope["path"]):
            await _refuse(send, 403, "this demo has no such thing")
            return
        if scope["method"] == "POST":
            body = await _body(receive)
            if not is_plain(_header(scope, b"content-type"), body):
                await _refuse(send, 400, "this demo takes JSON, of texts, numbers and truth values only")
                return
            receive = _again(body, receive)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        await self._application(scope, receive, guarded)

    def _is_needed(self, method: str, path: str) -> bool:
        if ".." in path:
            return False
        if method == "POST":
            return WRITTEN.fullmatch(path) is not None
        picture = PICTURE.fullmatch(path)
        is_known = READ.fullmatch(path) is not None if picture is None else picture["folder"] == self._pictures
        return is_known and method in ("GET", "HEAD")


def is_ours(host: str | None, origin: str | None, site: str | None = None) -> bool:
    """Tell whether a request names this machine (any port: it may come through a tunnel) and comes from its page.

    Browsers send no ``origin`` with what a page only shows, as a picture, but always ``site``, their Sec-Fetch-Site.
    """
    if host is None or OWN_HOST.fullmatch(host) is None or site not in OWN_SITES:
        return False
    return origin is None or origin == f"http://{host}"


def is_plain(content_type: str | None, body: bytes) -> bool:
    """Tell whether a body is a JSON object without objects: a list named "data" of scalars, and scalars beside it.

    Whatever gradio may take for a file is an object.
    """
    if content_type is None or content_type.partition(";")[0].strip().lower() != "application/json":
        return False
    if len(body) > MAX_BODY_BYTES:
        return False
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(said, dict):
        return False
    data = said.pop("data", [])
    return isinstance(data, list) and all(
        value is None or isinstance(value, str | int | float) for value in (*data, *said.values())
    )


async def _body(receive: Receive) -> bytes:
    """Return what a request brings; no more than a little over what is taken."""
    body, is_more = b"", True
    while is_more and len(body) <= MAX_BODY_BYTES:
        message = await receive()  # what says that nobody is there any more says no more, too
        body += message.get("body", b"")
        is_more = message.get("more_body", False)
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read once more, and then what ``receive`` does."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def _refuse(send: Send, status: int, why: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": f"{why}\n".encode()})


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
