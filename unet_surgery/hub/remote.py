"""Weights that lie on the Hub, of which only the bytes that are needed come here.

They appear as sparse files in this package's cache, so everything that reads weights reads them as any others.
"""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.header import LARGEST_HEADER_BYTES, MAX_HEADER_BYTES
from unet_surgery.checkpoint.layout import WeightsChoice
from unet_surgery.checkpoint.reader import Weights, open_weights
from unet_surgery.errors import ContainerError, HubError, OutputError
from unet_surgery.hub.connections import fetch_pieces, locked, pieces
from unet_surgery.hub.download import check_room, download
from unet_surgery.hub.partial import Part, PartialFile, Range, merged, total_bytes
from unet_surgery.hub.repository import Repository
from unet_surgery.hub.transport import ChangedError, NoRangesError, RangeReader

__all__ = ["RemoteWeights"]

FIRST_BYTES = 128 << 10  # SD 1's header has 84 KB
SPARE_SHARE = 200  # one part in so many may be fetched in vain, to fetch fewer ranges


@dataclass(frozen=True, slots=True)
class RemoteWeights:
    """The weights ``choice`` in the folder ``inside`` ("" or ending in a slash) of a repository.

    ``shards`` are the files that hold tensors: names within that folder.
    """

    repository: Repository
    inside: str
    choice: WeightsChoice
    shards: tuple[str, ...]
    checked: dict[str, set[Part]] = field(default_factory=dict, compare=False, repr=False)
    """Which parts of each shard were compared with their checksums in this run."""

    @property
    def folder(self) -> Path:
        """Where the sparse copies are."""
        return self.repository.folder / self.inside

    @property
    def num_bytes(self) -> int:
        """The size of all shards."""
        return sum(self._size(shard) for shard in self.shards)

    def open(self, *, max_header_bytes: int = MAX_HEADER_BYTES) -> Weights:
        """Open the weights for reading what was fetched; their headers are fetched if they are not there yet.

        While they are open no other process throws away what is there.

        Raises:
            NoRangesError: the server cannot send a part of a file.
            HubError, OutputError: as :meth:`fetch`.
            TeacherError: a file is damaged or no safetensors file.
        """
        if self.choice.sharded:
            self._copy_index()
        for shard in self.shards:
            self._fetch_header(shard, max_header_bytes)
        try:
            weights = open_weights(self.folder, self.choice, max_header_bytes=max_header_bytes)
        except ContainerError:  # the file's own fault, or the network's: a second copy of the headers tells
            for shard in self.shards:
                with _cache_errors(self.folder), self._partial(shard) as partial:
                    partial.forget()
                self._fetch_header(shard, max_header_bytes)
            weights = open_weights(self.folder, self.choice, max_header_bytes=max_header_bytes)
        try:
            for file in weights.files:
                fcntl.flock(file.fd, fcntl.LOCK_SH)
            # others may fetch more parts meanwhile: that the file's time changes means nothing
            return Weights([replace(file, status=None) for file in weights.files])
        except BaseException:
            weights.close()
            raise

    def has_ranges(self) -> bool:
        """True if the server sends parts of a file; the first of them, which are needed anyway, are fetched to see."""
        try:
            for shard in self.shards:
                self._fetch(shard, [Range(0, min(FIRST_BYTES, self._size(shard)))], _ignore)
        except NoRangesError:
            return False
        return True

    def fetch(self, wanted: Mapping[str, Sequence[tuple[int, int]]], on_bytes: disk.OnBytes) -> int:
        """Fetch these ranges of the shards, as far as they are not here; return how many bytes that were.

        Raises:
            HubError: the Hub cannot be reached, refuses, or breaks off; what came is kept, and the next run goes on.
            OutputError: the cache cannot be written or has no room.
        """
        return sum(self._fetch(shard, ranges, on_bytes) for shard, ranges in wanted.items())

    def missing(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> int:
        """Return how many bytes :meth:`fetch` would fetch."""
        return sum(total_bytes(_thrifty(self._missing(shard, ranges))) for shard, ranges in wanted.items())

    def require(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> None:
        """Check, while they are open, that these ranges are here: what is not would be read as zeros.

        Raises:
            HubError: some are not.
        """
        if num_bytes := self.missing(wanted):
            raise HubError(
                "parts of the weights that were here are gone",
                where=str(self.folder),
                found=f"{num_bytes} bytes are missing",
                hint="run again: they are fetched again",
            )

    def _missing(self, shard: str, ranges: Sequence[tuple[int, int]]) -> list[Range]:
        """Return what is not here, without waiting for another process that fetches."""
        partial = self._partial(shard).look()
        if partial is None:
            return merged(ranges)
        try:
            return partial.missing(ranges)
        finally:
            partial.close()

    def _fetch(self, shard: str, ranges: Sequence[tuple[int, int]], on_bytes: disk.OnBytes) -> int:
        if not self._missing(shard, ranges):
            return 0
        with _cache_errors(self.folder), self._partial(shard) as partial:
            missing = _thrifty(partial.missing(ranges))
            if missing:
                check_room(self.folder, total_bytes(missing))
                self._transfer(partial, shard, missing, on_bytes)
            return total_bytes(missing)

    def _transfer(self, partial: PartialFile, shard: str, missing: Sequence[Range], on_bytes: disk.OnBytes) -> None:
        """Fetch pieces over several connections; the first failure stops all, and what is whole by then stays."""
        if self.repository.files is None:
            raise HubError(
                "the Hugging Face Hub cannot be reached, and its weights are not all here",
                where=f"{self.repository.id}/{self.inside}{shard}",
                found=f"{total_bytes(missing)} bytes are missing",
                hint="try again with a network",
            )
        stop = threading.Event()
        name, commit = f"{self.inside}{shard}", self.repository.commit
        reader = RangeReader(self.repository.id, name, commit, self._size(shard), stop, partial.etag)
        count = locked(on_bytes)

        def take(offset: int, data: bytes) -> None:
            partial.write(offset, data)
            count(len(data))

        def fetch(piece: Range) -> None:
            try:
                crc = reader.read(piece.begin, piece.end, take)
                partial.served_as(reader.etag)  # before the part counts: the next run must know whose it is
                partial.record(piece.begin, piece.end, crc)
            except BaseException:
                stop.set()
                raise

        try:
            fetch_pieces(pieces(missing), fetch, stop)
        except ChangedError:
            partial.forget()
            raise

    def _fetch_header(self, shard: str, max_header_bytes: int) -> None:
        size = self._size(shard)
        self._fetch(shard, [Range(0, min(FIRST_BYTES, size))], _ignore)
        with (self.folder / shard).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length <= min(max_header_bytes, LARGEST_HEADER_BYTES, size - 8):  # else opening it says what is wrong
            self._fetch(shard, [Range(0, 8 + length)], _ignore)

    def _copy_index(self) -> None:
        index = self.choice.file
        data = (download(self.repository, [f"{self.inside}{index}"]) / self.inside / index).read_bytes()
        copy = self.folder / index
        with _cache_errors(self.folder):
            disk.make_folders(self.folder)
            while not copy.is_file() or copy.read_bytes() != data:
                try:
                    disk.replace_file(copy, data, force=True)
                except BlockingIOError:  # another process writes the same
                    time.sleep(0.05)

    def _partial(self, shard: str) -> PartialFile:
        path, checked = self.folder / shard, self.checked.setdefault(shard, set())
        file = None if self.repository.files is None else self.repository.files[f"{self.inside}{shard}"]
        if file is None:
            return PartialFile.as_it_is(path, checked)
        return PartialFile(path, file.identity or self.repository.commit, self._size(shard), checked)

    def _size(self, shard: str) -> int:
        if self.repository.files is not None:
            size = self.repository.files[f"{self.inside}{shard}"].size
            if size is None:
                raise HubError(
                    "the Hub does not say how large the file is", where=f"{self.repository.id}/{self.inside}{shard}"
                )
            return size
        return PartialFile.as_it_is(self.folder / shard).size


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """Say which cache it is that cannot be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            "the cache cannot be written",
            where=str(folder),
            found=error.strerror,
            hint="UNET_SURGERY_CACHE says where it lies",
        ) from error


def _thrifty(missing: Sequence[Range]) -> list[Range]:
    """Join ranges over gaps so small that fetching them costs less than another request."""
    return merged(missing, spare=total_bytes(missing) // SPARE_SHARE)


def _ignore(_: int) -> None:
    """Headers are too small to count."""
