"""A stand-in for the Hugging Face Hub on loopback: one model repository, read only, for the real client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repository: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve ``folder`` as ``repository``; yield the endpoint and the list of "METHOD path" requests seen so far."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            seen.append(f"{self.command} {path}")
            api = f"/api/models/{repository}"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
                info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                self.send(200, json.dumps(info).encode(), "application/json", {}, body)
                return
            if path == f"{api}/tree/{COMMIT}":
                paths = sorted(p for p in folder.rglob("*") if p.is_file())
                tree = [
                    {"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": "0" * 40}
                    for p in paths
                ]
                self.send(200, json.dumps(tree).encode(), "application/json", {}, body)
                return
            prefix = f"/{repository}/resolve/{COMMIT}/"
            if path.startswith(prefix) and (folder / path.removeprefix(prefix)).is_file():
                data = (folder / path.removeprefix(prefix)).read_bytes()
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
                self.send(200, data, "application/octet-stream", headers, body)
                return
            gated = path.startswith("/api/models/org/gated")
            code = "RepoNotFound" if path.startswith("/api/models/org/nothing") else "RevisionNotFound"
            self.send(
                403 if gated else 404, b"{}", "application/json", {"X-Error-Code": "GatedRepo" if gated else code}, body
            )

        def send(self, status: int, data: bytes, kind: str, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serve_refusals(status: int) -> Iterator[tuple[str, list[str]]]:
    """Answer everything with ``status``, and repeat in header and body whatever authorization came with the request.

    Yields the endpoint and the list of authorizations seen.
    """
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            said = self.headers.get("Authorization", "")
            seen.append(said)
            data = json.dumps({"error": f"not with {said}"}).encode()
            self.send_response(status)
            self.send_header("X-Error-Message", f"not with {said}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
