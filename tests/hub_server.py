"""A stand-in for the Hugging Face Hub on loopback, for the real client: reading, writing, and what can go wrong.

    hub = HubStandIn()
    commit = hub.add("org/name", folder)
    hub.faults.append(Fault("cut", host="cdn", parameter=1000))
    with hub.serve() as endpoint:
        ...  # a process with client_env(endpoint, home)
    assert [r.status for r in hub.requests if r.host == "cdn"] == [200, 206]

It is two servers, as the real one is: the Hub, and the store of large files (*cdn*) to which it redirects.
`hub_api` holds the endpoints, `hub_content` what lies behind them, `hub_faults` the faults. Unlike the real one it
lets a token that it does not know read what is public; writing needs a token of ``hub.tokens``.
"""

from __future__ import annotations

import re
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hub_api import Answer, Refusal, Request, answer, refused
from hub_content import MAIN, Blob, Repository
from hub_faults import Fault, take

WRITER, READER = "hf_" + "OfAWriter0123456789", "hf_" + "OfAReader0123456789"
CHUNK_BYTES = 16 << 10
POLL_SECONDS = 0.02
MAX_STALL_SECONDS = 30.0


def client_env(endpoint: str, home: Path, token: str | None = None) -> dict[str, str]:
    """Return the environment in which the real client speaks to a stand-in."""
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return env if token is None else {**env, "HF_TOKEN": token}


@contextmanager
def client_in_process(endpoint: str, home: Path, token: str | None = None) -> Iterator[None]:
    """Let huggingface_hub of this process speak to a stand-in; it read its environment when it was imported."""
    from huggingface_hub import close_session, constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        disable_progress_bars()
        try:
            yield
        finally:
            enable_progress_bars()
            close_session()


@dataclass
class Record:
    """A request as it was answered. ``status`` 0: not at all.

    ``body_bytes`` is how much of the answer's body was sent, ``given_bytes`` the size of the request's own.
    """

    method: str
    host: str
    path: str
    query: str
    range: str | None
    authorization: str | None
    given_bytes: int = 0
    status: int = 0
    body_bytes: int = 0


class HubStandIn:
    """Repositories, the tokens that may write to them, the faults still to come, and the requests so far.

    ``large_bytes``: files beyond it are LFS objects, as all ``*.safetensors`` are. ``page_size`` is that of listings.
    With ``repeats_tokens`` every refusal quotes the authorization it was given, in header and body.
    """

    def __init__(self, *, large_bytes: int = 1_000_000, page_size: int = 1000, repeats_tokens: bool = False) -> None:
        self.large_bytes, self.page_size, self.repeats_tokens = large_bytes, page_size, repeats_tokens
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, Blob] = {}
        self.tokens: dict[str | None, str] = {WRITER: "write", READER: "read"}
        self.faults: list[Fault] = []
        self.requests: list[Record] = []
        self.signature = "0a1b2c"
        self.endpoint = self.cdn = ""
        self.errors: list[BaseException] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()

    def add(
        self,
        name: str,
        folder: Path,
        private_token: str | None = None,
        gated: bool = False,
        revision: str = "main",
        message: str = "by a test",
    ) -> str:
        """Commit the files of ``folder``, and no others, to a branch; return the commit's hash."""
        files = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            inside = path.relative_to(folder).as_posix()
            blob = files[inside] = Blob(path.read_bytes(), self.is_large(inside, path.stat().st_size))
            if blob.lfs:
                self.objects[blob.sha256] = blob
        repository = self.repositories.setdefault(name, Repository(name))
        repository.private_token, repository.gated = private_token, gated
        ref = MAIN if revision == "main" else f"refs/heads/{revision}"
        return repository.commit(ref, files, message).oid

    def is_large(self, path: str, size: int) -> bool:
        return path.endswith(".safetensors") or size > self.large_bytes

    def seen(self, method: str | None = None, host: str | None = None, pattern: str = "") -> list[Record]:
        """Return the requests of a method and host whose path holds the regular expression."""
        return [
            r
            for r in self.requests
            if method in (None, r.method) and host in (None, r.host) and re.search(pattern, r.path)
        ]

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Serve on loopback; yield the endpoint. Connections that are open at the end are closed.

        An error of the stand-in itself is raised at the end.
        """
        self.closing.clear()
        servers = [Server(self, "hub"), Server(self, "cdn")]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
        threads = [threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,)) for server in servers]
        for thread in threads:
            thread.start()
        try:
            yield self.endpoint
        finally:
            self.closing.set()
            for server, thread in zip(servers, threads, strict=True):
                server.shutdown()
                thread.join()
                server.hang_up()
                server.server_close()  # waits for the handlers
        if self.errors:
            raise self.errors[0]


class Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 64

    def __init__(self, hub: HubStandIn, host: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.host = hub, host
        self.open: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):  # a client may go at any time
            self.hub.errors.append(error)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, host = self.server.hub, self.server.host
        path, _, query = self.path.partition("?")
        request = Request(self.command, host, path, query, self.headers, self.read_body())
        authorization = self.headers.get("Authorization")
        asked = self.headers.get("Range")
        record = Record(self.command, host, path, query, asked, authorization, len(request.body))
        with hub.lock:
            hub.requests.append(record)
            fault = take(hub.faults, self.command, host, path)
        if fault is not None and fault.kind == "reset":
            self.reset()
        elif fault is not None and fault.kind == "stall" and fault.parameter is None:
            self.stall()
        else:
            self.send(self.decide(request, fault), fault, record)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  # http.server calls them by these names

    def decide(self, request: Request, fault: Fault | None) -> Answer:
        hub = self.server.hub
        try:
            if fault is not None and fault.kind == "status":
                raise Refusal(fault.number(), "by a fault")
            with hub.lock:
                return answer(hub, request)
        except Refusal as refusal:
            said = request.headers.get("Authorization") if hub.repeats_tokens else None
            made = refused(refusal, said)
            extra = fault.headers if fault is not None else {}
            return Answer(made.status, made.body, {**made.headers, **extra})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, made: Answer, fault: Fault | None, record: Record) -> None:
        kind = fault.kind if fault is not None else None
        headers = dict(made.headers)
        if kind == "etag":
            headers |= {name: f'"{"e" * 40}"' for name in ("ETag", "X-Linked-Etag") if name in headers}
        status, body = made.status, made.body
        if made.is_file:
            status, body, part = self.part(body, headers, fault)
            headers |= part
        if fault is not None and kind == "short":
            body = body[: max(0, len(body) - fault.number(1))]
        if fault is not None and kind == "flip" and body:
            place = fault.number()
            body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        record.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(body, fault, record)

    def part(self, data: bytes, headers: dict[str, str], fault: Fault | None) -> tuple[int, bytes, dict[str, str]]:
        """Return status, bytes and headers of the range that was asked for, or of the whole."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        kind = fault.kind if fault is not None else None
        if not asked or asked.group() == "bytes=-" or kind == "no-range" or condition not in (None, headers["ETag"]):
            return 200, data, {}
        first, last = asked.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(len(data), int(last) + 1) if first and last else len(data)
        if start >= stop:
            return 416, b"", {"Content-Range": f"bytes */{len(data)}"}
        if fault is not None and kind == "range":
            start = min(max(0, start + fault.number(1)), stop - 1)
        return 206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}

    def send_body(self, body: bytes, fault: Fault | None, record: Record) -> None:
        kind = fault.kind if fault is not None else None
        end = len(body)
        if fault is not None and kind in ("cut", "stall"):
            end = min(end, fault.number())
        for place in range(0, end, CHUNK_BYTES):
            if fault is not None and kind == "slow" and self.server.hub.closing.wait(fault.parameter or 0):
                return
            chunk = body[place : min(end, place + CHUNK_BYTES)]
            record.body_bytes += len(chunk)
            self.wfile.write(chunk)
        if kind == "stall":
            self.stall()
        elif kind == "cut":
            self.close_connection = True

    def reset(self) -> None:
        """Close in a way that the client sees as a reset: without waiting for anything."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.server.open.discard(self.connection)
        self.close_connection = True
        self.rfile.close()
        self.connection.close()

    def stall(self) -> None:
        """Wait until the client has hung up; one that never would must fail its test, not hang it."""
        end = time.monotonic() + MAX_STALL_SECONDS
        while not self.server.hub.closing.is_set() and time.monotonic() < end:
            ready, _, _ = select.select([self.connection], [], [], POLL_SECONDS)
            if ready and not self.connection.recv(1, socket.MSG_PEEK):
                break
        self.close_connection = True
