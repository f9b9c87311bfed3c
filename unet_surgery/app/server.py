"""A page served to this machine alone: bound to its loopback, refusing other names and other pages' requests."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import fastapi
import gradio as gr
import uvicorn

from unet_surgery.app.page import CSS, make_theme
from unet_surgery.errors import SurgeryError, UsageError

__all__ = ["Server"]

HOST = "127.0.0.1"
FIRST_PORT, NUM_PORTS = 7860, 100
START_SECONDS = 60.0

NAMES = frozenset({"127.0.0.1", "localhost"})
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


class Server:
    """A page that is being served, by a thread, until :meth:`close`."""

    def __init__(self, page: gr.Blocks, port: int | None) -> None:
        """Bind ``port`` (None: the first that is free from 7860 on; 0: any), and serve.

        Raises:
            UsageError: the port is taken, or is none.
            SurgeryError: the server does not start.
        """
        self._page = page
        self._socket = _bound(port)
        self.port = int(self._socket.getsockname()[1])
        self.address = f"http://{HOST}:{self.port}/"
        config = uvicorn.Config(
            OnlyHere(_application(page, self.port)),
            log_config=None,
            log_level="warning",
            access_log=False,
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="demo", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        if not self._server.started:
            self.close()
            raise SurgeryError("the page cannot be served", where=self.address)

    def wait(self) -> None:
        """Return when the server has ended, or with whatever exception a signal raises meanwhile."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def close(self) -> None:
        """Stop serving. Requests that are open are cut off after a second."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it calls that an error
        self._server.should_exit = True
        self._thread.join(10)
        self._page.close(verbose=False)
        self._socket.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])


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
    if host is None or urlsplit(f"//{host}").hostname not in NAMES:
        return False
    return origin is None or origin == f"http://{host}"


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _application(page: gr.Blocks, port: int) -> fastapi.FastAPI:
    application = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(
        application,
        page,
        path="/",
        server_name=HOST,
        server_port=port,
        root_path="",
        footer_links=["api"],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=0,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=make_theme(),
        css=CSS,
    )


def _bound(port: int | None) -> socket.socket:
    """Return a listening socket of the loopback."""
    if port is not None and not 0 <= port <= 65535:
        raise UsageError("there is no such port", expected="0 … 65535", found=str(port))
    ports = range(FIRST_PORT, FIRST_PORT + NUM_PORTS) if port is None else [port]
    for number in ports:
        with contextlib.suppress(OSError):
            return socket.create_server((HOST, number))
    asked = f"{FIRST_PORT} … {FIRST_PORT + NUM_PORTS - 1}" if port is None else str(port)
    raise UsageError("the port cannot be had", found=asked, hint="--port 0 takes one that is free")
