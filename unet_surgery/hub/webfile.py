"""A large file from any web address: in pieces over several connections, resumed where it broke off, then compared.

What has come lies beside a journal of its parts (:mod:`unet_surgery.hub.partial`), so a process may be killed at any
time. A server that knows no ranges sends the whole at once, and again from its beginning where it breaks off.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.target import check_space
from unet_surgery.errors import HubError, OutputError
from unet_surgery.hub.connections import fetch_pieces, locked, pieces
from unet_surgery.hub.partial import JOURNAL, PartialFile, Range, total_bytes
from unet_surgery.hub.transport import AddressReader, ChangedError, NoRangesError, Served

__all__ = ["Fetched", "WebFile", "fetch_file", "remove_fetched"]

log = logging.getLogger(__name__)

ATTEMPTS = 2
BLOCK_BYTES = 4 << 20

Progress = Callable[[int, int], None]
"""Called with bytes done and in all."""


@dataclass(frozen=True, slots=True)
class WebFile:
    """A file's address and, where they are known, its size in bytes and the sha256 of its content."""

    url: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that is here whole. ``num_received`` bytes came in this run; the rest was here already."""

    path: Path
    size: int
    num_received: int


def fetch_file(file: WebFile, path: Path, progress: Progress, *, room: int = 0) -> Fetched:
    """Fetch ``file`` as ``path``, or what of it is not there yet; ``room`` bytes more must fit on the disk.

    Raises:
        HubError: the server cannot be reached, refuses or breaks off, or what it has is not the file that is expected.
            What came stays, and the next call goes on with it.
        OutputError: the disk refuses, or has no room.
    """
    changed: ChangedError | None = None
    for _ in range(ATTEMPTS):
        try:
            fetched = _fetch(file, path, progress, room)
        except ChangedError as error:
            log.warning("%s changed on the server: fetching it from its beginning", file.url)
            changed = error
            continue
        except OSError as error:
            raise OutputError(
                "what is fetched cannot be written", where=str(path), found=error.strerror or str(error)
            ) from error
        if file.sha256 is None or _sha256(path) == file.sha256:
            return fetched
        log.warning("%s is not what it should be: fetching it again", path.name)
        remove_fetched(path)
        changed = None
    if changed is not None:
        raise changed
    raise HubError(
        "the file is not the one that is expected",
        where=file.url,
        expected=f"content with the sha256 {file.sha256}",
        hint="it was replaced on the server, or is damaged on the way; a mirror can be named with --base-url",
    )


def remove_fetched(path: Path) -> None:
    """Remove a file that was fetched, or what came of it, and its journal."""
    for name in (path, path.with_name(path.name + JOURNAL)):
        if name.is_file():
            disk.remove_file(name)


def _fetch(file: WebFile, path: Path, progress: Progress, room: int) -> Fetched:
    stop = threading.Event()
    reader = AddressReader(file.url, stop, compared=file.sha256 is not None)
    served = reader.probe()
    size = _checked_size(file, served)
    _say_if_changed(path, _identity(file, served), size)
    with PartialFile(path, _identity(file, served), size) as partial:
        missing = partial.missing([Range(0, size)])
        num_missing = total_bytes(missing)
        check_space(path.parent, num_missing + room)
        count = locked(disk.counting(progress, size, size - num_missing))
        progress(size - num_missing, size)
        if missing:
            try:
                if served.ranges:
                    _in_pieces(reader, partial, missing, count, stop)
                else:
                    _whole(reader, partial, size, progress)
            except ChangedError:
                partial.forget()
                raise
            except NoRangesError:  # another host of that name, say; what came stays, should this break off as well
                stop.clear()
                _whole(reader, partial, size, progress)
    return Fetched(path, size, num_missing)


def _checked_size(file: WebFile, served: Served) -> int:
    if served.size is None:
        raise HubError("the server does not say how large the file is", where=file.url)
    if served.size == 0 or file.size not in (None, served.size):
        raise HubError(
            "the file on the server is not the one that is expected",
            where=file.url,
            expected="more than nothing" if file.size is None else f"{file.size} bytes",
            found=f"{served.size} bytes",
            hint="it was replaced; a mirror can be named with --base-url",
        )
    return served.size


def _identity(file: WebFile, served: Served) -> str:
    """Return what tells the file from another: its hash; else what the server calls this version; else its address."""
    return file.sha256 or served.version or file.url


def _say_if_changed(path: Path, identity: str, size: int) -> None:
    try:
        before = PartialFile.as_it_is(path)
    except (OSError, ValueError):
        return
    if not before.is_of(identity, size):
        log.warning("%s is another than the one of which parts are here: fetching it from its beginning", path.name)


def _in_pieces(
    reader: AddressReader,
    partial: PartialFile,
    missing: list[Range],
    count: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Fetch over several connections; the first failure stops all, and what is whole by then stays."""

    def take(offset: int, data: bytes) -> None:
        partial.write(offset, data)
        count(len(data))

    def fetch(piece: Range) -> None:
        try:
            crc = reader.read(piece.begin, piece.end, take)
            partial.record(piece.begin, piece.end, crc)
        except BaseException:
            stop.set()
            raise

    fetch_pieces(pieces(missing), fetch, stop)


def _whole(reader: AddressReader, partial: PartialFile, size: int, progress: Progress) -> None:
    log.warning("%s: the server sends no parts of files, so a break begins it anew", partial.path.name)

    def take(offset: int, data: bytes) -> None:
        if offset + len(data) <= size:  # what is too long is refused at its end
            partial.write(offset, data)
            progress(offset + len(data), size)

    crc = reader.read_whole(take, lambda: progress(0, size))
    partial.record(0, size, crc)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
