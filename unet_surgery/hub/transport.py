"""Reading byte ranges of one file of the Hub over HTTP: whole, of the same file, and again where it breaks off.

The file's address is asked of the Hub once (it is often another host's, and signed for a while). The token goes to the
Hub's own host and nowhere else.
"""

from __future__ import annotations

import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from unet_surgery.errors import HubError, printable
from unet_surgery.hub.patience import AGAIN, FIRST_PAUSE_SECONDS, longer, patience_seconds, retry_after

__all__ = ["CONNECTIONS", "ChangedError", "NoRangesError", "RangeReader", "Stopped"]

CHUNK_BYTES = 16 << 10
MAX_REDIRECTS = 5
CONNECTIONS = 8
MAX_WRONG_ANSWERS = 3
EXPIRED = (401, 403, 410)  # at a signed address that another host serves
HINTS = {
    401: "log in with a token that may read it: hf auth login",
    403: "accept the model's conditions on its page, then: hf auth login",
    404: "check the file's name and the revision",
}
REDIRECTS = (301, 302, 303, 307, 308)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")

OnData = Callable[[int, bytes], None]
"""Called with the offset and the bytes that stand there."""


class NoRangesError(Exception):
    """The server answers with the whole file whatever range is asked for."""


class ChangedError(HubError):
    """The server no longer serves the file that it served before."""


class Stopped(Exception):  # noqa: N818  # nothing went wrong here: another thread asked to stop
    """The transfer was given up."""


class _Again(Exception):  # noqa: N818
    """An attempt failed in a way that may pass; ``pause`` is what the server asks for, in seconds."""

    def __init__(self, why: str, *, pause: float = 0.0, wrong: bool = False) -> None:
        super().__init__(why)
        self.pause = pause
        self.wrong = wrong


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


@dataclass(frozen=True, slots=True)
class _Address:
    """Where the file is served, and whether that is the Hub's own host."""

    url: str
    own: bool


class RangeReader:
    """Reads ranges of ``repository``'s file ``name`` at ``commit``, of ``size`` bytes; several threads at once.

    ``stop`` ends every read that is under way. ``etag`` is what the server called the file before; later, what it calls
    it.
    """

    def __init__(
        self, repository: str, name: str, commit: str, size: int, stop: threading.Event, etag: str | None = None
    ) -> None:
        self.shown = f"{repository}/{name}"
        self._repository, self._name, self._commit = repository, name, commit
        self._size = size
        self._stop = stop
        self._lock = threading.Lock()
        self._address: _Address | None = None
        self._hops = 0
        self.etag = etag
        self._had_range = etag is not None

    def read(self, begin: int, end: int, on_data: OnData) -> int:
        """Read the bytes [begin, end), hand them on in order, and return their CRC-32.

        What breaks off is taken up where it broke; a server that is busy or silent is waited for, for two minutes
        without a byte at most.

        Raises:
            NoRangesError: the server knows no ranges.
            HubError: the server refuses, stays away, or serves another file than before.
            Stopped: ``stop`` was set.
        """
        crc, position, wrong = 0, begin, 0
        last, pause = time.monotonic(), FIRST_PAUSE_SECONDS
        while position < end:
            try:
                for chunk in self._chunks(position, end):
                    on_data(position, chunk)
                    crc, position = zlib.crc32(chunk, crc), position + len(chunk)
                    last, pause = time.monotonic(), FIRST_PAUSE_SECONDS
            except _Again as failure:
                wrong += failure.wrong
                wait = max(pause, failure.pause)
                if wrong >= MAX_WRONG_ANSWERS or time.monotonic() + wait > last + patience_seconds():
                    raise self._gave_up(str(failure)) from failure
                if self._stop.wait(wait):
                    raise Stopped from None
                pause = longer(pause)
        return crc

    def _chunks(self, begin: int, end: int) -> Iterator[bytes]:
        """Make one request for [begin, end) and yield what comes, never more than that."""
        address = self._locate()
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        if self.etag is not None and not self.etag.startswith("W/"):
            headers["If-Range"] = self.etag
        try:
            with _request("GET", address, headers) as answer:
                self._check(answer, address, begin, end)
                left = end - begin
                for chunk in answer.chunks:
                    if self._stop.is_set():
                        raise Stopped
                    if len(chunk) > left:
                        raise _Again("more bytes than were asked for", wrong=True)
                    left -= len(chunk)
                    yield chunk
                if left:
                    raise _Again("the connection ended early")
        except _connection_errors() as error:
            raise _Again(type(error).__name__) from error

    def _check(self, answer: _Answer, address: _Address, begin: int, end: int) -> None:
        """Let only the asked bytes of the same file pass."""
        status, etag = answer.status, _plain(answer.headers.get("etag"))
        if status in AGAIN:
            raise _Again(f"HTTP {status}", pause=retry_after(answer.headers))
        if status in EXPIRED and not address.own:
            self._let_go(address)
            raise _Again(f"HTTP {status}", wrong=True)
        if status in REDIRECTS and "location" in answer.headers:
            self._follow(address, answer.headers["location"])
            raise _Again(f"HTTP {status}")
        if status == 200 and not self._had_range:
            raise NoRangesError
        if status in (200, 412, 416) or (status == 206 and self.etag not in (None, etag)):
            raise self._changed()
        if status != 206:
            raise self._refused(status)
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise _Again("compressed, though that was not asked for", wrong=True)
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        length = answer.headers.get("content-length", str(end - begin))
        if found is None or found.groups() != (str(begin), str(end - 1), str(self._size)):
            raise _Again("another range than was asked for", wrong=True)
        if length != str(end - begin):
            raise _Again("another length than was asked for", wrong=True)
        with self._lock:
            self._had_range = True
            self.etag = etag

    def _locate(self) -> _Address:
        """Ask the Hub where the file is, once; its own answer may be the file itself."""
        with self._lock:
            if self._address is None:
                self._address = self._look_up()
            return self._address

    def _let_go(self, address: _Address) -> None:
        """Forget an address, unless another thread has asked for a new one already."""
        with self._lock:
            if self._address is address:
                self._address = None

    def _follow(self, address: _Address, location: str) -> None:
        """Go where the host of ``address`` sends us; a mirror may send us to the Hub, and that to its store."""
        target = self._redirected(address, location, _origin(self._hub_url()))
        with self._lock:
            self._hops += 1
            if self._hops > MAX_REDIRECTS * CONNECTIONS:
                raise self._refused(302)
            if self._address is address:
                self._address = target

    def _hub_url(self) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self._repository, self._name, revision=self._commit)

    def _look_up(self) -> _Address:
        address = _Address(self._hub_url(), own=True)
        host = _origin(address.url)
        for _ in range(MAX_REDIRECTS):
            try:
                with _request("HEAD", address, {"Accept-Encoding": "identity"}) as answer:
                    status, headers = answer.status, answer.headers
            except _connection_errors() as error:
                raise _Again(type(error).__name__) from error
            if status in REDIRECTS and "location" in headers:
                address = self._redirected(address, headers["location"], host)
                if not address.own:
                    return address
            elif status < 300:
                return address
            elif status in AGAIN:
                raise _Again(f"HTTP {status}", pause=retry_after(headers))
            else:
                raise self._refused(status)
        raise self._refused(status)

    def _redirected(self, address: _Address, location: str, host: tuple[str, str]) -> _Address:
        """Return where a redirect leads: never from https to anything less."""
        try:
            url = urljoin(address.url, location)
            scheme = urlsplit(url).scheme
        except ValueError:
            url, scheme = "", "no address"
        if scheme != "https" and (scheme != "http" or host[0] == "https"):
            raise HubError(
                "the Hub redirects to an address that cannot be trusted",
                where=self.shown,
                expected="https",
                found=printable(scheme),
            )
        return _Address(url, _origin(url) == host)

    def _refused(self, status: int) -> HubError:
        return HubError(
            "the Hub refuses the file", where=self.shown, found=f"HTTP {status}", hint=HINTS.get(status, "run again")
        )

    def _changed(self) -> ChangedError:
        return ChangedError(
            "the file changed on the Hub while it was read",
            where=self.shown,
            hint="run again; or with --full, which compares the whole file with its checksum",
        )

    def _gave_up(self, why: str) -> HubError:
        return HubError(
            "the transfer from the Hugging Face Hub broke off",
            where=self.shown,
            found=why + (": too many requests" if why.endswith("429") else ""),
            hint="run again later: it resumes where it broke off",
        )


@contextmanager
def _request(method: str, address: _Address, headers: Mapping[str, str]) -> Iterator[_Answer]:
    """Send a request by huggingface_hub's own session: its proxies, certificates and time limit are the user's.

    That is a client of httpx, or of requests before huggingface_hub 1.0. Redirects are not followed here: a token must
    not follow them.
    """
    from huggingface_hub import get_session
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    session: Any = get_session()
    sent = {**build_hf_headers(), **headers}
    if not address.own:
        sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
    common = {"headers": sent, "timeout": HF_HUB_DOWNLOAD_TIMEOUT}
    if callable(getattr(session, "stream", None)):
        with session.stream(method, address.url, follow_redirects=False, **common) as response:
            yield _Answer(response.status_code, response.headers, response.iter_raw())
    else:
        with session.request(method, address.url, allow_redirects=False, stream=True, **common) as response:
            chunks = response.iter_content(CHUNK_BYTES)
            yield _Answer(response.status_code, response.headers, chunks)


def _connection_errors() -> tuple[type[Exception], ...]:
    """Return what the client raises when a connection fails: its base exceptions, as huggingface_hub inherits them."""
    from huggingface_hub.errors import HfHubHTTPError

    clients = ("httpx", "httpx2", "requests")
    own = tuple(c for c in HfHubHTTPError.__mro__ if c.__module__.partition(".")[0] in clients)
    invalid = [getattr(sys.modules[c.__module__.partition(".")[0]], "InvalidURL", None) for c in own]
    return (*own, *(error for error in invalid if error is not None), ConnectionError, TimeoutError, UnicodeError)


def _plain(etag: str | None) -> str | None:
    """Return an ETag that can be sent back and written down; any other is none."""
    return etag if etag is not None and etag.isascii() and etag.isprintable() else None


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()
