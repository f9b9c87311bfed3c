"""Datasets of the Hub, and those that the library ``datasets`` saved, read through that library.

No code of a dataset is ever run: the library gave that up with version 4, the oldest that the extra allows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.jsonfile import read_regular
from unet_surgery.data.pictures import MAX_PICTURE_BYTES
from unet_surgery.data.reasons import BadSampleError
from unet_surgery.data.sources import CAPTION_COLUMNS, RawSample, caption_column
from unet_surgery.errors import DataError, MissingExtraError, TeacherError, first_few, printable

__all__ = ["DatasetSource", "open_hub_dataset", "open_saved_dataset"]


def open_hub_dataset(text: str, *, caption: str, split: str) -> DatasetSource:
    """Fetch, or take from its cache, a ``split`` of the dataset ``org/name[@revision]``."""
    name, _, revision = text.partition("@")
    library = _library()
    try:
        dataset = library.load_dataset(name, split=split, revision=revision or None)
    except Exception as error:  # a dozen kinds, and none is a fault of ours
        raise DataError(
            "the dataset cannot be had from the Hub",
            where=printable(text),
            found=printable(f"{type(error).__name__}: {error}"),
        ) from error
    return DatasetSource(dataset, caption=caption, where=text)


def open_saved_dataset(folder: Path, *, caption: str, split: str) -> DatasetSource:
    """Open what ``save_to_disk`` wrote; of several splits, ``split``."""
    library = _library()
    try:
        dataset = library.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            "the folder is not a whole dataset", where=str(folder), found=printable(f"{type(error).__name__}: {error}")
        ) from error
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(
                "the dataset has no such split", where=str(folder), expected=split, found=first_few(sorted(dataset))
            )
        dataset = dataset[split]
    return DatasetSource(dataset, caption=caption, where=str(folder))


class DatasetSource:
    """The samples of a ``datasets.Dataset`` with a column of pictures and one of captions."""

    def __init__(self, dataset: Any, *, caption: str = CAPTION_COLUMNS[0], where: str = "") -> None:
        library = _library()
        pictures = [name for name, feature in dataset.features.items() if isinstance(feature, library.Image)]
        if len(pictures) != 1:
            raise DataError(
                "the dataset should have one column of pictures",
                where=printable(where),
                found=first_few(pictures) or f"columns {first_few(dataset.column_names)}, none of them pictures",
            )
        self._picture, self._caption = pictures[0], caption_column(dataset.column_names, caption, where)
        self._all = dataset
        self._rows = dataset.select_columns([self._picture, self._caption]).cast_column(
            self._picture, library.Image(decode=False)
        )
        if len(self._rows) == 0:
            raise DataError("the dataset holds no samples", where=printable(where))
        text = f"{dataset._fingerprint}\0{self._picture}\0{self._caption}\0{len(self._rows)}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def id(self, index: int) -> str:
        return str(index)

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, object]]]:
        """Yield the values of ``columns`` of each row.

        Raises:
            DataError: the dataset has no such column; names those it has.
        """
        there = self._all.column_names
        if missing := [column for column in columns if column not in there]:
            raise DataError(
                "a filter names a column that is not there", expected=first_few(there), found=printable(missing[0])
            )
        for index, row in enumerate(self._all.select_columns(list(columns))):
            yield f"row {index}", row

    def read(self, index: int) -> RawSample:
        try:
            row = self._rows[index]
        except (OSError, ValueError, UnicodeDecodeError) as error:
            raise BadSampleError("unreadable", printable(str(error))) from error
        caption = row[self._caption]
        if isinstance(caption, list):  # several captions of one picture: the first, so that it is always the same
            caption = caption[0] if caption else None
        return RawSample(str(index), caption, _bytes(row[self._picture]))


def _bytes(picture: dict[str, Any] | None) -> bytes:
    if picture is None:
        raise BadSampleError("missing")
    if picture["bytes"] is not None:
        return bytes(picture["bytes"])
    try:
        return read_regular(Path(picture["path"] or ""), MAX_PICTURE_BYTES)
    except TeacherError as error:
        raise BadSampleError("missing", f"{error.what}: {error.found}") from error


def _library() -> Any:
    try:
        import datasets
    except (ImportError, RuntimeError, OSError) as error:
        raise MissingExtraError(
            "the library datasets is needed for this, and does not import",
            found=printable(str(error)),
            hint="pip install 'unet-surgery[datasets]'",
        ) from error
    datasets.disable_progress_bars()
    return datasets
