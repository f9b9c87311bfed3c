"""A file of which only parts are here: a sparse copy, and a journal of the parts with their checksums.

The journal's first line is JSON and says which file it is of (its content's hash and its size); ``etag`` lines say what
its server calls it, and every other line is ``begin end crc32`` of one part, written once the part is whole. A process
may be killed at any time: a torn last line is no line, and a part whose bytes are not those of its checksum is not
there.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from unet_surgery.checkpoint import disk

__all__ = ["JOURNAL", "Part", "PartialFile", "Range", "merged", "total_bytes"]

log = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20
MAX_JOURNAL_BYTES = 64 << 20
MAX_LINE_BYTES = 4096
JOURNAL = ".parts"


class Range(NamedTuple):
    """The bytes [begin, end) of a file."""

    begin: int
    end: int


class Part(NamedTuple):
    """The bytes [begin, end), and their CRC-32."""

    begin: int
    end: int
    crc: int


def merged(ranges: Iterable[tuple[int, int]], *, spare: int = 0) -> list[Range]:
    """Return the ranges in order, joined where they touch; and over the smallest gaps, of ``spare`` bytes in all."""
    joined: list[Range] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1].end:
            joined[-1] = Range(joined[-1].begin, max(end, joined[-1].end))
        elif begin < end:
            joined.append(Range(begin, end))
    bridged = set()
    for gap, index in sorted((joined[i + 1].begin - joined[i].end, i) for i in range(len(joined) - 1)):
        if gap > spare:
            break
        spare -= gap
        bridged.add(index)
    result: list[Range] = []
    for i, (begin, end) in enumerate(joined):
        if i - 1 in bridged:
            result[-1] = Range(result[-1].begin, end)
        else:
            result.append(Range(begin, end))
    return result


def total_bytes(ranges: Iterable[tuple[int, int]]) -> int:
    """Return how many bytes ranges that do not overlap hold."""
    return sum(end - begin for begin, end in ranges)


def _journal_of(path: Path) -> Path:
    return path.with_name(path.name + JOURNAL)


def _first_line(identity: str, size: int) -> bytes:
    return json.dumps({"identity": identity, "size": size}).encode() + b"\n"


class PartialFile:
    """The sparse copy at ``path`` of a file of ``size`` bytes and this ``identity``, locked for writing.

    What the journal says of another identity is thrown away. A context manager: inside it no other process writes,
    though others may read; several threads may write parts at once. :meth:`look` opens it for reading alone.
    ``checked`` remembers, for further instances, which parts were compared with their checksums.

    Raises:
        OSError: the cache cannot be written.
    """

    def __init__(self, path: Path, identity: str, size: int, checked: set[Part] | None = None) -> None:
        self.path = path
        self.size = size
        self.etag: str | None = None
        self._journal_path = _journal_of(path)
        self._first_line = _first_line(identity, size)
        self._lock = threading.Lock()
        self._parts: list[Part] = []
        self._checked = set() if checked is None else checked
        self._data = self._journal = -1

    @classmethod
    def as_it_is(cls, path: Path, checked: set[Part] | None = None) -> PartialFile:
        """Return the copy at ``path`` of whatever file it is of.

        Raises:
            OSError, ValueError: there is none.
        """
        with _journal_of(path).open("rb") as journal:
            said = json.loads(journal.readline(MAX_LINE_BYTES))
        if not isinstance(said, dict) or not isinstance(said.get("identity"), str) or type(said.get("size")) is not int:
            raise ValueError("this is no journal of a file's parts")
        return cls(path, said["identity"], said["size"], checked)

    def is_of(self, identity: str, size: int) -> bool:
        """True if this is a copy of that file."""
        return self._first_line == _first_line(identity, size)

    def __enter__(self) -> PartialFile:
        disk.make_folders(self.path.parent)
        self._data = disk.open_for_update(self.path)
        try:
            self._journal = disk.open_for_update(self._journal_path)
            self._lock_alone()
            self._load()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for fd in (self._journal, self._data):
            if fd >= 0:
                os.close(fd)
        self._data = self._journal = -1

    def look(self) -> PartialFile | None:
        """Open the copy for reading alone, whoever writes it meanwhile; None if there is none of this file."""
        try:
            self._data = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self._journal = os.open(self._journal_path, os.O_RDONLY | os.O_CLOEXEC)
            text = os.pread(self._journal, MAX_JOURNAL_BYTES, 0)
        except OSError:
            self.close()
            return None
        if not self._is_of(text):
            self.close()
            return None
        self._read_lines(text)
        return self

    def missing(self, wanted: Sequence[tuple[int, int]]) -> list[Range]:
        """Return what of ``wanted`` is not there; what is there has been compared with its checksum."""
        self._check(wanted)
        parts = sorted(self._parts)
        gaps = []
        for begin, end in merged(wanted):
            position = begin
            for part in parts:
                if part.end > position and part.begin < end:
                    if part.begin > position:
                        gaps.append(Range(position, part.begin))
                    position = part.end
            if position < end:
                gaps.append(Range(position, end))
        return gaps

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes at their place; they count once :meth:`record` is called for the part they belong to."""
        disk.write_at(self._data, data, offset)

    def record(self, begin: int, end: int, crc: int) -> None:
        """Say that [begin, end) is whole, and what its CRC-32 is."""
        part = Part(begin, end, crc)
        with self._lock:
            disk.write(self._journal, b"%d %d %d\n" % part)
            self._parts.append(part)
            self._checked.add(part)

    def served_as(self, etag: str | None) -> None:
        """Remember what the server calls the file."""
        with self._lock:
            if etag is not None and etag != self.etag:
                disk.write(self._journal, b"etag " + etag.encode("ascii") + b"\n")
                self.etag = etag

    def forget(self) -> None:
        """Let go of all parts."""
        with self._lock:
            disk.truncate(self._journal, len(self._first_line))
            os.lseek(self._journal, len(self._first_line), os.SEEK_SET)
            self._parts.clear()
            self._checked.clear()
            self.etag = None

    def read(self, begin: int, end: int) -> bytes:
        """Return bytes that are there; fewer where the file is too short."""
        return os.pread(self._data, end - begin, begin)

    def _lock_alone(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process fetches parts of %s: waiting for it", self.path.name)
            fcntl.flock(self._journal, fcntl.LOCK_EX)

    def _load(self) -> None:
        text = os.pread(self._journal, MAX_JOURNAL_BYTES, 0)
        whole_lines = b""
        if self._is_of(text):
            whole_lines = self._read_lines(text)
        else:
            fcntl.flock(self._data, fcntl.LOCK_EX)  # nobody may be reading what is thrown away
            disk.truncate(self._data, 0)
            disk.truncate(self._data, self.size)
        disk.truncate(self._journal, len(whole_lines))
        os.lseek(self._journal, len(whole_lines), os.SEEK_SET)
        if not whole_lines:
            disk.write(self._journal, self._first_line)
            fcntl.flock(self._data, fcntl.LOCK_UN)

    def _is_of(self, text: bytes) -> bool:
        return text.startswith(self._first_line) and os.fstat(self._data).st_size == self.size

    def _read_lines(self, text: bytes) -> bytes:
        """Take what a journal's whole lines say; return them."""
        whole_lines = text[: text.rfind(b"\n") + 1]
        for line in whole_lines.splitlines()[1:]:
            if line.startswith(b"etag "):
                self.etag = line[5:].decode("ascii", "replace")
            elif (part := self._part(line)) is not None:
                self._parts.append(part)
        return whole_lines

    def _part(self, line: bytes) -> Part | None:
        try:
            part = Part(*(int(word) for word in line.split()))
        except (TypeError, ValueError):
            return None
        return part if 0 <= part.begin < part.end <= self.size else None

    def _check(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Forget parts that are wanted and whose bytes are no longer those that were recorded."""
        for part in [p for p in self._parts if p not in self._checked]:
            if any(begin < part.end and part.begin < end for begin, end in wanted):
                if self._crc(part) == part.crc:
                    self._checked.add(part)
                else:
                    log.warning("a part of %s in the cache is damaged: fetching it again", self.path.name)
                    self._parts.remove(part)

    def _crc(self, part: Part) -> int:
        crc = 0
        for begin in range(part.begin, part.end, CHUNK_BYTES):
            crc = zlib.crc32(self.read(begin, min(part.end, begin + CHUNK_BYTES)), crc)
        return crc
