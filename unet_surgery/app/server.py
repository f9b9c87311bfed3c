"""A page served to this machine alone: bound to its loopback, refusing other names and other pages' requests."""

from __future__ import annotations

import logging
import socket
import threading
import time

import fastapi
import gradio as gr
import uvicorn

from unet_surgery.app.guard import HOST, OnlyHere
from unet_surgery.app.page import CSS, make_theme
from unet_surgery.errors import SurgeryError

__all__ = ["Server"]

START_SECONDS = 60.0


class Server:
    """A page that is being served, by a thread, until :meth:`close`."""

    def __init__(self, page: gr.Blocks, listening: socket.socket, pictures: str) -> None:
        """Serve ``page`` to who connects to ``listening``, which is closed in the end.

        ``pictures`` is the folder, without links in its path, where gradio keeps what it shows.

        Raises:
            SurgeryError: the server does not start.
        """
        self._page = page
        self._socket = listening
        self.port = int(self._socket.getsockname()[1])
        self.address = f"http://{HOST}:{self.port}/"
        config = uvicorn.Config(
            OnlyHere(_application(page, self.port), pictures),
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
        log = logging.getLogger("uvicorn.error")
        before = log.level
        log.setLevel(logging.CRITICAL)  # it calls that an error
        self._server.should_exit = True
        self._thread.join(10)
        log.setLevel(before)
        self._page.close(verbose=False)
        self._socket.close()

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except ValueError:  # asyncio, now and then, of a connection that came in while its socket was closed
            if not self._server.should_exit:
                raise


def _application(page: gr.Blocks, port: int) -> fastapi.FastAPI:
    application = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(
        application,
        page,
        path="/",
        server_name=HOST,
        server_port=port,
        root_path="",
        footer_links=[],
        run_history=False,
        app_kwargs={"openapi_url": None},
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
