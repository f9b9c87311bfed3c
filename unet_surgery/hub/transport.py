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

__all__ = [
    "CONNECTIONS",
    "AddressReader",
    "ChangedError",
    "NoRangesError",
    "RangeReader",
    "Served",
    "Stopped",
]

CHUNK_BYTES = 16 << 10
MAX_REDIRECTS = 5
CONNECTIONS = 8
MAX_WRONG_ANSWERS = 3
MAX_VAIN_RESTARTS = 8
"""Of a file that has to begin anew: attempts that came no further than another before."""
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

    def __init__(self, why: str, *, pause: float = 0.0, wrong: bool = False, moved: bool = False) -> None:
        super().__init__(why)
        self.pause = pause
        self.wrong = wrong
        self.moved = moved


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


class Served(NamedTuple):
    """What a server says of a file: its size in bytes (None: it does not say), its ETag, and whether it sends ranges.

    ``version`` is the ETag, or else the date of the last change: what differs once the file is another.
    """

    size: int | None
    etag: str | None
    version: str | None
    ranges: bool


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

    _sends_token = True
    _server = "the Hub"
    _compared = False
    """True if the whole is compared with a hash: then an ETag says nothing, and a whole file is no other file."""

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
        if self.etag is not None and not self._compared and not self.etag.startswith("W/"):
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
        if status in EXPIRED and not address.own and address.url != self._first_url():
            self._let_go(address)
            raise _Again(f"HTTP {status}", wrong=True)
        if status in REDIRECTS and "location" in answer.headers:
            self._follow(address, answer.headers["location"])
            raise _Again(f"HTTP {status}")
        is_other = not self._compared and self.etag not in (None, etag)
        if status == 200 and (not self._had_range or self._compared):
            raise NoRangesError
        if status in (200, 412, 416) or (status == 206 and is_other):
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
        target = self._redirected(address, location, _origin(self._first_url()))
        with self._lock:
            self._hops += 1
            if self._hops > MAX_REDIRECTS * CONNECTIONS:
                raise self._refused(302)
            if self._address is address:
                self._address = target

    def _first_url(self) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self._repository, self._name, revision=self._commit)

    def _look_up(self) -> _Address:
        address = _Address(self._first_url(), own=True)
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
                f"{self._server} redirects to an address that cannot be trusted",
                where=self.shown,
                expected="https",
                found=printable(scheme),
            )
        return _Address(url, self._sends_token and _origin(url) == host)

    def _refused(self, status: int) -> HubError:
        return HubError(
            f"{self._server} refuses the file",
            where=self.shown,
            found=f"HTTP {status}",
            hint=HINTS.get(status, "run again"),
        )

    def _changed(self) -> ChangedError:
        return ChangedError(
            f"the file changed on {self._server} while it was read",
            where=self.shown,
            hint="run again; or with --full, which compares the whole file with its checksum",
        )

    def _gave_up(self, why: str) -> HubError:
        return HubError(
            "the transfer from the Hugging Face Hub broke off" if self._sends_token else "the transfer broke off",
            where=self.shown,
            found=why + (": too many requests" if why.endswith("429") else ""),
            hint="run again later: it resumes where it broke off",
        )


class AddressReader(RangeReader):
    """Reads a file at any http or https address, as :class:`RangeReader` reads one of the Hub; no token is sent there.

    The size is not known before :meth:`probe`. With ``compared`` the whole will be compared with a hash that is known:
    then an ETag says nothing, of which hosts behind one name may each have their own.
    """

    _sends_token = False
    _server = "the server"

    def __init__(self, url: str, stop: threading.Event, *, compared: bool = False) -> None:
        super().__init__("", "", "", 0, stop)
        self.shown = self._url = url
        self._compared = compared

    def probe(self) -> Served:
        """Ask for the file's first byte, to learn what the server has and whether it knows ranges.

        Raises:
            HubError: it cannot be reached, or refuses.
        """
        served: list[Served] = []
        self._patiently(lambda _came: served.append(self._probe()))
        self._size, self.etag, self._had_range = served[0].size or 0, served[0].etag, served[0].ranges
        return served[0]

    def read_whole(self, on_data: OnData, on_restart: Callable[[], None]) -> int:
        """Read the file from its beginning, for a server that knows no ranges; return its CRC-32.

        What breaks off begins again from nothing, and ``on_restart`` is called: for as long as :meth:`read` waits, and
        not for ever where it breaks off again and again without coming further.

        Raises:
            HubError: as :meth:`read`.
        """
        crc = 0

        def attempt(came: Callable[[int], None]) -> None:
            nonlocal crc
            crc, position = 0, 0
            try:
                with _request("GET", self._locate(), {"Accept-Encoding": "identity"}) as answer:
                    if self._judge(answer) != 200:
                        raise self._refused(answer.status)
                    for chunk in answer.chunks:
                        if self._stop.is_set():
                            raise Stopped
                        on_data(position, chunk)
                        crc, position = zlib.crc32(chunk, crc), position + len(chunk)
                        came(position)
            except _connection_errors() as error:
                on_restart()
                raise _Again(type(error).__name__) from error
            if position != self._size:
                on_restart()
                raise _Again(f"{position} bytes in place of {self._size}", wrong=True)

        self._patiently(attempt)
        return crc

    def _patiently(self, attempt: Callable[[Callable[[int], None]], None]) -> None:
        """Make an attempt again while what fails may pass; unlike ranges, it has no parts that came.

        The attempt says how far it came with every chunk, from which patience counts.
        """
        last, pause, wrong, vain = time.monotonic(), FIRST_PAUSE_SECONDS, 0, 0
        position = furthest = 0

        def came(to: int) -> None:
            nonlocal last, pause, position
            last, pause, position = time.monotonic(), FIRST_PAUSE_SECONDS, to

        while True:
            position = 0
            try:
                return attempt(came)
            except _Again as failure:
                if failure.moved:  # as often as redirects are followed
                    continue
                wrong += failure.wrong
                vain += 0 < position <= furthest
                furthest = max(furthest, position)
                wait = max(pause, failure.pause)
                is_enough = wrong >= MAX_WRONG_ANSWERS or vain >= MAX_VAIN_RESTARTS
                if is_enough or time.monotonic() + wait > last + patience_seconds():
                    raise self._gave_up(str(failure)) from failure
                if self._stop.wait(wait):
                    raise Stopped from None
                pause = longer(pause)

    def _probe(self) -> Served:
        try:
            with _request("GET", self._locate(), {"Range": "bytes=0-0", "Accept-Encoding": "identity"}) as answer:
                status, headers = self._judge(answer), answer.headers
        except _connection_errors() as error:
            if type(error).__name__.startswith(("Connect", "Offline", "Unsupported", "Invalid", "LocalProtocol")):
                raise self._unreachable(error) from error
            raise _Again(type(error).__name__) from error
        etag = _plain(headers.get("etag")) or _plain(headers.get("last-modified"))
        found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
        if status == 206 and found is not None:
            return Served(int(found[3]), _plain(headers.get("etag")), etag, ranges=True)
        if status == 416:
            return Served(0, None, etag, ranges=False)
        length = headers.get("content-length", "")
        return Served(int(length) if length.isdecimal() else None, _plain(headers.get("etag")), etag, ranges=False)

    def _judge(self, answer: _Answer) -> int:
        """Return a status that is an answer; follow redirects, wait for what may pass."""
        status, address = answer.status, self._locate()
        if status in AGAIN:
            raise _Again(f"HTTP {status}", pause=retry_after(answer.headers))
        if status in REDIRECTS and "location" in answer.headers:
            self._follow(address, answer.headers["location"])
            raise _Again(f"HTTP {status}", moved=True)
        if status not in (200, 206, 416):
            raise self._refused(status)
        return status

    def _first_url(self) -> str:
        return self._url

    def _look_up(self) -> _Address:
        return _Address(self._url, own=False)

    def _refused(self, status: int) -> HubError:
        return HubError(
            "the server refuses the file",
            where=self.shown,
            found=f"HTTP {status}",
            hint="it may have moved: a mirror can be named with --base-url",
        )

    def _changed(self) -> ChangedError:
        return ChangedError("the file changed on the server while it was read", where=self.shown, hint="run again")

    def _unreachable(self, error: Exception) -> HubError:
        return HubError(
            "the server cannot be reached",
            where=self.shown,
            found=f"{type(error).__name__}: {printable(str(error))}",
            hint="run again with a network: it goes on where it was; or name a mirror with --base-url",
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
