"""Where pictures and captions come from: folders with metadata, WebDataset tars, ``datasets`` on disk or on the Hub.

A source is an index of samples. What is broken is a sample too, which raises when it is read: then a set's length
and order do not depend on what is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from unet_surgery.data.reasons import BadSampleError, Reason
from unet_surgery.errors import DataError, first_few, printable

__all__ = [
    "CAPTION_COLUMNS",
    "Broken",
    "RawSample",
    "Source",
    "Texts",
    "caption_column",
    "caption_names",
    "open_source",
]

CAPTION_COLUMNS = ("text", "caption")
"""What the column of captions is called: the first is the default, and where there is none of that name, the second."""

_HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class RawSample:
    """A picture's bytes as they lie in the source; the caption is not checked yet."""

    id: str
    caption: object
    image: bytes


@dataclass(frozen=True, slots=True)
class Broken:
    """What is known to be unusable from the index alone."""

    id: str
    reason: Reason
    found: str

    def refuse(self) -> BadSampleError:
        return BadSampleError(self.reason, self.found)


class Source(Protocol):
    """Random access to samples, safe in threads."""

    @property
    def fingerprint(self) -> str:
        """Changes when names, sizes or captions do."""

    def __len__(self) -> int: ...

    def id(self, index: int) -> str:
        """Return what the sample is called in the source."""

    def read(self, index: int) -> RawSample:
        """Return a sample.

        Raises:
            BadSampleError: its picture cannot be read, or its entry is broken.
        """


class Texts:
    """Millions of short strings in two arrays: a fifth of what a list of them takes."""

    def __init__(self, texts: Iterable[str]) -> None:
        ends, blob = [0], bytearray()
        for text in texts:
            blob += text.encode("utf-8", "surrogatepass")
            ends.append(len(blob))
        self._blob, self._ends = bytes(blob), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._blob[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


def caption_names(wanted: str) -> tuple[str, ...]:
    """Return what the column of captions may be called."""
    return CAPTION_COLUMNS if wanted == CAPTION_COLUMNS[0] else (wanted,)


def caption_column(columns: Iterable[str], wanted: str, where: str) -> str:
    """Return the column that holds captions.

    Raises:
        DataError: there is none; names the columns.
    """
    there = list(columns)
    for name in caption_names(wanted):
        if name in there:
            return name
    raise DataError(
        "there is no column of captions",
        where=where,
        expected=" or ".join(map(printable, caption_names(wanted))),
        found=first_few(there) or "no columns",
        hint="name it with --caption-column",
    )


def open_source(
    spec: str | Path,
    *,
    caption_column: str = CAPTION_COLUMNS[0],
    split: str = "train",
    filters: Sequence[str] = (),
) -> Source:
    """Open the pictures and captions that ``spec`` names.

    It is a folder with metadata.csv or metadata.jsonl; a folder of tars, or tars by name (``shards/{00000..00041}.tar``
    for many); a folder that ``datasets`` saved; or a dataset of the Hub, ``[hub:]org/name[@revision]``, of which
    ``split`` is taken. ``caption_column`` is the column, or the key in a tar's JSON, that holds the captions; in place
    of ``text`` it may be ``caption``. Of its samples those stay that meet all ``filters``
    (:func:`unet_surgery.data.conditions.parse_filter`).

    Raises:
        DataError: it is none of these, or holds no samples, or none that meets the filters.
        UsageError: a filter cannot be read.
        MissingExtraError: it needs the library ``datasets``, which is not installed.
    """
    from unet_surgery.data.conditions import parse_filter
    from unet_surgery.data.filters import filtered

    for text in filters:
        parse_filter(text)  # before what may take long
    try:
        return filtered(_open(spec, caption_column, split), filters)
    except DataError as error:
        raise error.at(printable(str(spec))) from None


def _open(spec: str | Path, caption_column: str, split: str) -> Source:
    text = str(spec)
    hub, is_hub, rest = text.partition("hub:")
    if is_hub and not hub:
        from unet_surgery.data.hubsets import open_hub_dataset

        return open_hub_dataset(rest, caption=caption_column, split=split)
    path = Path(text).expanduser()
    if path.is_dir():
        return _open_folder(path, caption_column, split)
    from unet_surgery.data.tars import TarSource, expand_braces

    if "://" in text or text.startswith("pipe:"):
        raise DataError("training data is read from this machine's disks", where=printable(text), hint="download it")
    if path.is_file() or "{" in text:
        return TarSource(expand_braces(str(path)), caption=caption_column)
    if _HUB_DATASET.fullmatch(text) and not path.parent.is_dir():
        from unet_surgery.data.hubsets import open_hub_dataset

        return open_hub_dataset(text, caption=caption_column, split=split)
    raise DataError(
        "there is no such training data",
        where=printable(text),
        expected="a folder, tars by name, or a dataset of the Hub: org/name[@revision]",
    )


def _open_folder(path: Path, caption: str, split: str) -> Source:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        from unet_surgery.data.hubsets import open_saved_dataset

        return open_saved_dataset(path, caption=caption, split=split)
    from unet_surgery.data.imagefolder import FolderSource, find_metadata
    from unet_surgery.data.tars import TarSource

    if metadata := find_metadata(path):
        return FolderSource(path, metadata, caption=caption)
    if tars := sorted(path.glob("*.tar")):
        return TarSource(tars, caption=caption)
    raise DataError(
        "the folder holds no training data that is known",
        where=str(path),
        expected="metadata.csv or metadata.jsonl (columns file_name, text), tars, or what datasets saved",
        found=first_few(sorted(entry.name for entry in path.iterdir())) or "an empty folder",
    )
