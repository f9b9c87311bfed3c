"""A shard of a latent cache: an Arrow stream as ``datasets`` writes and maps it, made and read without that library.

Columns: ``moments`` (and ``moments_flipped``), fixed-size lists of half-precision numbers, [2C, h, w] flattened;
``ids``, token ids int32 [T]; ``caption``; ``id``, what the sample is called in the source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from unet_surgery.checkpoint import disk
from unet_surgery.data.cacheplan import CacheSettings
from unet_surgery.errors import DataError, printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Rows", "ShardSink", "ShardView", "dataset_info", "dataset_state", "open_shard"]

BATCH_ROWS = 256  # 16 MiB at 512 pixels


@dataclass(frozen=True, slots=True)
class Rows:
    """Samples ready to be written; ``moments`` are one array [n, 2C·h·w], and one more if flipped ones are kept."""

    moments: Sequence[NDArray[np.float16]]
    ids: NDArray[np.int32]
    captions: Sequence[str]
    names: Sequence[str]


class ShardSink:
    """Writes rows to a descriptor, and hashes what it writes. Record batches have a fixed length, however rows come."""

    def __init__(self, fd: int, settings: CacheSettings) -> None:
        self.num_bytes = self.num_rows = 0
        self.closed = False  # pyarrow asks
        self._fd, self._digest = fd, hashlib.sha256()
        self._schema = _schema(settings)
        self._stream = pa.ipc.new_stream(pa.PythonFile(self), self._schema)
        self._waiting: pa.Table = self._schema.empty_table()

    def write(self, data: Any) -> int:
        """Write bytes; pyarrow calls this."""
        view = memoryview(data).cast("B")
        disk.write(self._fd, view)
        self._digest.update(view)
        self.num_bytes += len(view)
        return len(view)

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def flush(self) -> None:
        """Do nothing: bytes go straight to the descriptor."""

    def append(self, rows: Rows) -> None:
        self.num_rows += len(rows.names)
        columns = [*map(_lists, rows.moments), _lists(rows.ids)]
        columns += [pa.array(rows.captions, pa.string()), pa.array(rows.names, pa.string())]
        self._waiting = pa.concat_tables([self._waiting, pa.Table.from_arrays(columns, schema=self._schema)])
        while len(self._waiting) >= BATCH_ROWS:
            self._put(BATCH_ROWS)

    def finish(self) -> str:
        """Write what waits and the end, and return the sha256 of all bytes."""
        if len(self._waiting):
            self._put(len(self._waiting))
        self._stream.close()
        return self._digest.hexdigest()

    def _put(self, count: int) -> None:
        (batch,) = self._waiting.slice(0, count).combine_chunks().to_batches()
        self._stream.write_batch(batch)
        self._waiting = self._waiting.slice(count)


@dataclass(frozen=True, slots=True)
class ShardView:
    """A record batch of a mapped shard. ``moments`` are views of the file: one array [n, 2C·h·w], or two."""

    moments: Sequence[NDArray[np.float16]]
    ids: NDArray[np.int32]
    captions: Any
    names: Any

    def __len__(self) -> int:
        return len(self.ids)


def open_shard(path: Path, settings: CacheSettings) -> list[ShardView]:
    """Map a shard and return its record batches; nothing but their headers is read.

    Raises:
        DataError: it is missing, or not a whole shard with these columns.
    """
    try:
        batches = list(pa.ipc.open_stream(pa.memory_map(str(path))))
        return [_view(batch, settings) for batch in batches]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(
            "a shard of the cache is damaged",
            where=str(path),
            found=printable(str(error)),
            hint="make the cache again; unet-surgery cache --check names every damaged shard",
        ) from error


def dataset_info(settings: CacheSettings) -> dict[str, Any]:
    """Return what ``datasets`` keeps in dataset_info.json."""
    return {"citation": "", "description": "", "features": _features(settings), "homepage": "", "license": ""}


def dataset_state(shards: Sequence[str], fingerprint: str) -> dict[str, Any]:
    """Return what ``datasets`` keeps in state.json."""
    return {
        "_data_files": [{"filename": name} for name in shards],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }


def _columns(settings: CacheSettings) -> dict[str, tuple[str, int]]:
    """Return column → type and length of its lists (0: no list)."""
    moments = ["moments", "moments_flipped"] if settings.flip else ["moments"]
    return {
        **dict.fromkeys(moments, ("float16", settings.row_values)),
        "ids": ("int32", settings.num_tokens),
        "caption": ("string", 0),
        "id": ("string", 0),
    }


def _schema(settings: CacheSettings) -> pa.Schema:
    fields = []
    for name, (kind, length) in _columns(settings).items():
        arrow = pa.type_for_alias(kind)
        fields.append(pa.field(name, pa.list_(arrow, length) if length else arrow))
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": _features(settings)}})})


def _features(settings: CacheSettings) -> dict[str, Any]:
    features: dict[str, Any] = {}
    for name, (kind, length) in _columns(settings).items():
        value = {"dtype": kind, "_type": "Value"}
        # Sequence is what every version of datasets reads; from version 4 it is called List.
        features[name] = {"feature": value, "length": length, "_type": "Sequence"} if length else value
    return features


def _lists(values: NDArray[Any]) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _view(batch: pa.RecordBatch, settings: CacheSettings) -> ShardView:
    batch.validate()
    if not batch.schema.equals(_schema(settings)):
        raise ValueError("other columns than cache.json says")
    for name in ("caption", "id"):
        batch.column(name).validate(full=True)  # an offset that leads out of the file ends the process
    lists = [
        batch.column(name).values.to_numpy(zero_copy_only=True).reshape(len(batch), length)
        for name, (_, length) in _columns(settings).items()
        if length
    ]
    return ShardView(lists[:-1], lists[-1], batch.column("caption"), batch.column("id"))
