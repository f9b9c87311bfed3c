"""Fetching a published set: its files, resumed where they broke off, then unpacked, and put in place whole.

What is being fetched lies in ``.NAME.parts.unet-surgery`` beside the set's folder, on the disk that was chosen for it,
until the set is in place.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import ipaddress
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.foreign import recognise
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.staging import Staging
from unet_surgery.checkpoint.target import check_space
from unet_surgery.data.coco import first_captions
from unet_surgery.data.publishedsets import Archive, Piece, PublishedSet, find_set
from unet_surgery.data.statisticsnote import note_bytes, note_path
from unet_surgery.data.unpack import DamagedArchiveError, Limits, Unpacked, unpack_tar_gz, unpack_zip
from unet_surgery.errors import DataError, SurgeryError, UsageError, printable
from unet_surgery.hub.webfile import Fetched, WebFile, fetch_file, remove_fetched
from unet_surgery.version import __version__

__all__ = ["DATA_FILE", "DataResult", "get_data", "parts_folder"]

log = logging.getLogger(__name__)

DATA_FILE = "data.json"
METADATA = "metadata.csv"
MAX_CAPTIONS_BYTES = 256 << 20
SLACK = 1.5  # sizes are published to two digits, and a folder holds more than its pictures
SLACK_BYTES = 1 << 30

Progress = Callable[[int, int], None]
"""Called with bytes done and in all; an archive's count twice, as they are fetched and as they are unpacked."""


@dataclass(frozen=True, slots=True)
class DataResult:
    """A set in place. ``num_received`` bytes came in this run; ``is_checked`` says whether all hashes were known."""

    name: str
    folder: Path
    num_files: int
    num_bytes: int
    num_pictures: int
    num_received: int
    is_checked: bool
    licence: str
    use: str


def get_data(
    name: str,
    out: str | Path | None = None,
    *,
    base_url: str | None = None,
    progress: Progress | None = None,
) -> DataResult:
    """Fetch the published set ``name`` (:data:`unet_surgery.data.publishedsets.SETS`) as the folder ``out``.

    ``out`` is ``./NAME`` if None. With ``base_url`` its files come from a mirror: ``BASE_URL/NAME/FILE``. A call that
    was cut short goes on with what it has; the folder appears whole or not at all.

    Raises:
        UsageError: there is no such set, or ``base_url`` is no web address, or is plain http where no hash is known.
        HubError: a server cannot be reached, refuses, breaks off, or has another file than is expected.
        DataError: an archive is damaged, or holds what it should not.
        OutputError: ``out`` exists, or the disk refuses or has no room.
    """
    published = find_set(name)
    target = Path(os.path.abspath(Path(out or name).expanduser()))
    urls = [_url(published, piece, base_url) for piece in published.pieces]
    if len({piece.name for piece in published.pieces}) != len(urls):
        raise AssertionError("two pieces of one name")
    parts = parts_folder(target)
    bars = _Bars(published, progress or (lambda _done, _total: None))
    with Staging(target) as staging, _tidied(parts):
        if not parts.is_dir():
            check_space(target.parent, (published.num_bytes or 0) + published.unpacked_bytes)
            disk.make_folders(parts)
        fetched = [
            _fetch(published, piece, url, parts, bars) for piece, url in zip(published.pieces, urls, strict=True)
        ]
        unpacked = [
            _unpack(piece, file.path, staging.folder, bars)
            for piece, file in zip(published.pieces, fetched, strict=True)
        ]
        if published.captions is not None:
            unpacked.append(_write_table(staging.folder, published.captions))
        unpacked += _write_notes(staging.folder, published, unpacked)
        result = _result(published, target, str(out or name), fetched, unpacked)
        data = json.dumps(_facts(result, published, urls, fetched, unpacked), indent=2) + "\n"
        disk.write_file(staging.folder / DATA_FILE, data.encode())
        disk.sync_all()
        staging.commit()
    disk.remove_tree(parts)
    return result


@contextlib.contextmanager
def _tidied(parts: Path) -> Iterator[None]:
    """Leave no empty folder behind where nothing came."""
    try:
        yield
    except BaseException:
        if parts.is_dir() and not any(parts.iterdir()):
            disk.remove_folder(parts)
        raise


def parts_folder(target: Path) -> Path:
    """Return where what is fetched for the folder ``target`` lies meanwhile."""
    return target.parent / f".{target.name}.parts.unet-surgery"


def _url(published: PublishedSet, piece: Piece, base_url: str | None) -> str:
    if base_url is not None:
        if not base_url.startswith(("https://", "http://")):
            raise UsageError("this is no web address", expected="https://…", found=printable(base_url))
        if "@" in base_url:  # it is shown, and written down
            raise UsageError("a mirror's address may hold no user and password", expected="https://host/…")
        if piece.sha256 is None and base_url.startswith("http://") and not _is_loopback(base_url):
            raise UsageError(
                "plain http is only for files whose sha256 is known: what comes could not be compared",
                expected="https://…",
                found=f"{printable(base_url)}, and nobody published a sha256 of {piece.name}",
            )
        return f"{base_url.rstrip('/')}/{published.name}/{piece.name}"
    kind, is_hub, rest = piece.address.partition("hub:")
    if not is_hub or kind:
        return piece.address
    from huggingface_hub import hf_hub_url

    repository, _, path = rest.partition("@")
    commit, _, path = path.partition("/")
    return hf_hub_url(repository, path, repo_type="dataset", revision=commit)


def _is_loopback(url: str) -> bool:
    """True if an address is this machine's own, where nobody stands between."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Bars:
    """One count of bytes over all that is done: each piece fetched, each archive unpacked."""

    def __init__(self, published: PublishedSet, progress: Progress) -> None:
        self._progress = progress
        self._steps = {piece.name: [0, piece.num_bytes or 0] for piece in published.pieces}
        self._steps |= {f"{p.name}!": [0, p.num_bytes or 0] for p in published.pieces if p.archive}

    def tell(self, step: str, done: int, total: int) -> None:
        self._steps[step] = [done, total]
        self._progress(sum(done for done, _ in self._steps.values()), sum(total for _, total in self._steps.values()))


def _fetch(published: PublishedSet, piece: Piece, url: str, parts: Path, bars: _Bars) -> Fetched:
    file = WebFile(url, piece.size, piece.sha256)
    fetched = fetch_file(
        file,
        parts / piece.name,
        lambda done, total: bars.tell(piece.name, done, total),
        room=published.unpacked_bytes,
    )
    with fetched.path.open("rb") as opened:
        what = recognise(opened.read(64).lstrip().lower(), fetched.size)
    if what is not None and ("page" in what or "pointer" in what):
        remove_fetched(fetched.path)
        raise DataError("the server sent something else than the file", where=url, found=what)
    return fetched


def _unpack(piece: Piece, path: Path, folder: Path, bars: _Bars) -> Unpacked:
    """Put a piece into the folder: an archive's files, or the file itself."""
    if piece.archive is None:
        disk.copy_file(path, folder / piece.name)
        unpacked = Unpacked()
        unpacked.add(piece.name, path.stat().st_size)
        unpacked.sha256 = piece.sha256 or _sha256(path)
        return unpacked
    unpack = {"tar.gz": unpack_tar_gz, "zip": unpack_zip}[piece.archive.kind]
    count = disk.counting(lambda done, total: bars.tell(f"{piece.name}!", done, total), path.stat().st_size)
    try:
        unpacked = unpack(path, folder, _limits(piece.archive), count)
    except DamagedArchiveError:
        remove_fetched(path)  # else the next run would unpack the same
        raise
    if not unpacked.num_files:
        raise DataError("the archive holds nothing that is wanted", where=str(path), expected=piece.archive.only)
    if unpacked.skipped:
        log.info("%s: %d hidden files left out", path.name, unpacked.skipped)
    unpacked.sha256 = piece.sha256 or unpacked.sha256 or _sha256(path)
    return unpacked


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _limits(archive: Archive) -> Limits:
    num_bytes = int(SLACK * archive.unpacked_bytes) + SLACK_BYTES
    return Limits(num_bytes, archive.max_files, archive.top, archive.only)


def _result(
    published: PublishedSet, target: Path, shown: str, fetched: Sequence[Fetched], unpacked: Sequence[Unpacked]
) -> DataResult:
    num_pictures = sum(part.num_pictures for part in unpacked)
    if published.num_pictures not in (None, num_pictures):
        log.warning("%s: %d pictures, and %d are published", published.name, num_pictures, published.num_pictures)
    return DataResult(
        name=published.name,
        folder=target,
        num_files=sum(part.num_files for part in unpacked),
        num_bytes=sum(part.num_bytes for part in unpacked),
        num_pictures=num_pictures,
        num_received=sum(file.num_received for file in fetched),
        is_checked=published.is_checked,
        licence=published.licence,
        use=published.use_in(shown),
    )


def _facts(
    result: DataResult,
    published: PublishedSet,
    urls: Sequence[str],
    fetched: Sequence[Fetched],
    unpacked: Sequence[Unpacked],
) -> dict[str, Any]:
    """Return what data.json says: where the set comes from, and what of it was checked."""
    pieces = [
        {"name": piece.name, "url": url, "bytes": file.size, "sha256": out.sha256,
         "checked": piece.sha256 is not None}
        for piece, url, file, out in zip(published.pieces, urls, fetched, unpacked, strict=False)
    ]  # fmt: skip
    counts = {key: value for key, value in asdict(result).items() if key in ("num_files", "num_bytes", "num_pictures")}
    return {
        "format": "unet-surgery-data",
        "format_version": 1,
        "unet_surgery": __version__,
        "name": published.name,
        "what": published.what,
        "licence": published.licence,
        "source": published.source,
        "files": pieces,
        **counts,
    }


def _write_table(folder: Path, captions: str) -> Unpacked:
    """Write metadata.csv: each picture of COCO's captions, as they list them, with the first caption of it."""
    try:
        data = read_object(folder / captions, MAX_CAPTIONS_BYTES)
    except SurgeryError as error:
        raise DataError(error.what, where=captions, found=error.found) from error
    pairs = [(image, caption) for image, caption in first_captions(data, captions) if caption is not None]
    try:
        rows = [(image["file_name"], caption) for image, caption in pairs]
    except (KeyError, TypeError) as error:
        raise DataError("these are no captions of COCO", where=captions, found=printable(repr(error))) from error
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("file_name", "caption"))
    table.writerows(rows)
    return _write(folder / METADATA, text.getvalue().encode())


def _write_notes(folder: Path, published: PublishedSet, unpacked: Sequence[Unpacked]) -> list[Unpacked]:
    """Write beside each file of statistics what is known of it and it does not say itself."""
    return [
        _write(note_path(folder / piece.name), note_bytes(piece.note, out.sha256))
        for piece, out in zip(published.pieces, unpacked, strict=False)
        if piece.note is not None and out.sha256 is not None
    ]


def _write(path: Path, data: bytes) -> Unpacked:
    disk.write_file(path, data)
    written = Unpacked()
    written.add(path.name, len(data))
    return written
