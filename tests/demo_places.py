"""A demo in a process of its own, as people start it, and requests to it by plain HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a large red square in the center on a gray background"

# What the process connects to beside itself is written down, by the interpreter's own audit hook.
WATCHED = """
import sys
def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) and not str(args[1][0]).startswith(("127.", "::1")):
        sys.stderr.write(f"WENT TO {args[1]}\\n")
    if event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", "localhost", None):
        sys.stderr.write(f"ASKED FOR {args[0]}\\n")
sys.addaudithook(watch)
from unet_surgery.cli.main import main
main()
"""


@dataclass(frozen=True)
class Running:
    """The process of a demo, and its address."""

    process: subprocess.Popen[str]
    address: str
    errors: Path
    temporary: Path

    def draw(self, session: str | None = None, **changes: Any) -> tuple[str, Any]:
        """Ask for a picture as gradio's clients do; return the last event and its data."""
        return draw_at(self.address, session, **changes)

    def post(self, path: str, body: Any, content_type: str = "application/json") -> int:
        """Return the status of a request with ``body``: bytes, or what becomes JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return _status(urllib.request.Request(self.address + path, data, {"Content-Type": content_type}))

    def status(self, path: str = "", **headers: str) -> int:
        """Return the status of a request."""
        return _status(urllib.request.Request(self.address + path, headers=headers))


NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def draw_at(address: str, session: str | None = None, **changes: Any) -> tuple[str, Any]:
    """Ask for a picture as :meth:`Running.draw` does."""
    wish = {
        "prompt": PROMPT, "negative": "", "seed": 1, "anew": False, "steps": 2, "guidance": 2,
        "width": 32, "height": 32, "scheduler": "the model's own", **changes,
    }  # fmt: skip
    told = {} if session is None else {"session_hash": session}
    body = json.dumps({**told, "data": [wish[k] for k in wish if k in ("prompt", "negative")] + [
        wish["seed"], wish["anew"], wish["steps"], wish["guidance"], wish["width"], wish["height"],
        wish["scheduler"],
    ]}).encode()  # fmt: skip
    place = f"{address}gradio_api/call/draw"
    request = urllib.request.Request(place, body, {"Content-Type": "application/json"})
    event = json.loads(open_url(request))["event_id"]
    lines = open_url(f"{place}/{event}").decode().splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    return names[-1], data[-1]


def _status(request: urllib.request.Request) -> int:
    try:
        with NO_PROXY.open(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def open_url(request: str | urllib.request.Request) -> bytes:
    with NO_PROXY.open(request, timeout=60) as answer:
        return answer.read()


@contextmanager
def running(scratch: Path, *words: str, watched: bool = False, **environment: str) -> Iterator[Running]:
    """Start a demo on a free port, and end it as Ctrl-C does; ``watched`` is slower."""
    temporary = scratch / "tmp"
    temporary.mkdir()
    errors = scratch / "errors.txt"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *(["-c", WATCHED] if watched else ["-m", "unet_surgery"]), "demo", *words, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            cwd=scratch,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "TMPDIR": str(temporary),
                **environment,
            },
        )
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), errors.read_text()
            yield Running(process, address, errors, temporary)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
            finally:
                process.stdout.close()
