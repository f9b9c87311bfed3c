"""The safetensors container: reading, checking and writing its header.

A file is 8 bytes (little-endian length of the header), the header (a JSON object, padded with spaces), and the
tensors' bytes. The header maps each name to dtype, shape and data_offsets [begin, end) behind the header, and
``__metadata__`` to an object of strings. Here a file is valid only if its tensors cover the data exactly: no
hole, no overlap, nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from unet_surgery.checkpoint.foreign import recognise
from unet_surgery.checkpoint.jsonfile import parse_object
from unet_surgery.errors import ContainerError, printable

__all__ = ["DTYPE_BITS", "DTYPE_ORDER", "MAX_HEADER_BYTES", "Header", "TensorInfo", "encode_header", "read_header"]

MAX_HEADER_BYTES = 8 << 20  # SD 1's header has 84 KB
LARGEST_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
MAX_TENSOR_NAME = 512
MAX_VALUES = 1 << 60
MAX_CONTAINERS = 90_000  # in a header of MAX_HEADER_BYTES: 30,000 tensors
MAX_COMMAS = 1_000_000
TENSOR_KEYS = {"dtype", "shape", "data_offsets"}

# In the reference implementation's order, which is the order it sorts by when it writes.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
DTYPE_ORDER = {name: rank for rank, name in enumerate(DTYPE_BITS)}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's dtype, shape and place in the file: ``num_bytes`` from ``offset``, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; ``sha256`` is of the file's first bytes up to the data, so it identifies names and layout."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    file_bytes: int
    data_start: int
    sha256: str


def read_header(fd: int, name: str, *, max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read and check the header of the file open at ``fd``; ``name`` is what errors call it.

    Time and memory are bounded by the header's size, whatever numbers it holds; ``max_bytes`` bounds that, and nothing
    lets a header of more than 100,000,000 bytes pass.

    Raises:
        ContainerError: the file is not a valid safetensors file; says what is wrong with which tensor.
    """
    file_bytes = os.fstat(fd).st_size
    prefix = os.pread(fd, 64, 0)
    what = recognise(prefix, file_bytes)
    if what is not None:
        raise ContainerError(
            "this is not a safetensors file",
            where=name,
            found=what,
            hint=f"unet-surgery convert {shlex.quote(name)} makes safetensors of it"
            if what.endswith("a pickle")
            else "download the safetensors weights; nothing but safetensors is ever opened",
        )
    if len(prefix) < 8:
        raise ContainerError(
            "the file is too short for a safetensors file",
            where=name,
            expected="8 bytes or more",
            found=f"{file_bytes}",
        )
    length = int.from_bytes(prefix[:8], "little")
    if length > file_bytes - 8:
        raise ContainerError(
            "the file is cut short, or not a safetensors file",
            where=name,
            expected=f"a header of {length} bytes, as its first 8 bytes say",
            found=f"{file_bytes - 8} bytes behind them",
            hint="download it again",
        )
    limit = min(max_bytes, LARGEST_HEADER_BYTES)
    if length > limit:
        raise ContainerError(
            "the header is implausibly large",
            where=name,
            expected=f"at most {limit} bytes",
            found=f"{length} bytes",
            hint=None if length > LARGEST_HEADER_BYTES else f"--max-header {length}, if you trust the file",
        )
    raw = os.pread(fd, length, 8)
    _check_bulk(raw, limit, name)
    if not raw.startswith(b"{"):
        raise ContainerError("the header is not a JSON object", where=name, expected="{", found=printable(raw[:8]))
    try:
        entries = parse_object(raw)
    except ValueError as error:
        raise ContainerError("the header is not valid JSON", where=name, found=printable(str(error))) from error
    data_start = 8 + length
    metadata = _metadata(entries.pop("__metadata__", {}), name)
    tensors = {key: _tensor(key, entry, data_start, name) for key, entry in entries.items()}
    _check_cover(tensors, data_start, file_bytes, name)
    digest = hashlib.sha256(prefix[:8] + raw).hexdigest()
    return Header(tensors, metadata, file_bytes, data_start, digest)


def encode_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return length prefix and header for ``tensors`` (name, dtype, shape), laid out in the given order.

    Given in the reference implementation's order these are the bytes that it writes.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_bulk(raw: bytes, max_bytes: int, file: str) -> None:
    """Refuse what would become millions of objects: an empty list takes 3 bytes of JSON, and 64 of memory."""
    share = max(1.0, max_bytes / MAX_HEADER_BYTES)
    for what, found, most in (
        ("lists and objects", raw.count(b"[") + raw.count(b"{"), MAX_CONTAINERS),
        ("values", raw.count(b","), MAX_COMMAS),
    ):
        if found > most * share:
            raise ContainerError(
                f"the header holds implausibly many {what}",
                where=file,
                expected=f"at most {int(most * share)}",
                found=str(found),
                hint="SD 1 has 686 tensors, of 3 lists and objects each; --max-header raises this limit as well",
            )


def _metadata(value: Any, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ContainerError(
            "the header's __metadata__ is not an object of strings", where=file, found=printable(value)
        )
    return value


def _tensor(name: str, entry: Any, data_start: int, file: str) -> TensorInfo:
    problem = _problem(name, entry)
    if problem is not None:
        what, expected, found = problem
        where = f"{file}, tensor {printable(name)}"
        raise ContainerError(what, where=where, expected=expected, found=printable(found))
    begin, end = entry["data_offsets"]
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)


def _problem(name: str, entry: Any) -> tuple[str, str, object] | None:
    """Return what is wrong with a tensor's entry, what was expected and what is there; None if nothing is."""
    if not 0 < len(name) <= MAX_TENSOR_NAME or not name.isprintable():
        return "a tensor has an impossible name", "1 to 512 printable characters", f"{len(name)} characters"
    if type(entry) is not dict or entry.keys() != TENSOR_KEYS:
        found = sorted(entry) if isinstance(entry, dict) else entry
        return "a tensor's entry is malformed", "dtype, shape and data_offsets", found
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        return "a tensor has an unknown dtype", "F32, F16, BF16 or another of safetensors' names", dtype
    if not _all_naturals(shape):
        return "a tensor has an impossible shape", "a list of sizes, none negative", shape
    if not _all_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "a tensor has impossible data_offsets", "[begin, end] in bytes", offsets
    bits = _num_values(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        expected = f"{_in_bytes(bits)} for {dtype} {printable(shape)}"
        return "a tensor's shape and its bytes disagree", expected, f"{offsets[1] - offsets[0]} bytes"
    return None


def _num_values(shape: list[int]) -> int:
    """Return the product, or a number beyond any file once it is passed: a million sizes must not make a bignum."""
    values = 1
    for size in shape:
        values *= size
        if values > MAX_VALUES:
            return MAX_VALUES
    return values


def _in_bytes(bits: int) -> str:
    if bits >= MAX_VALUES:
        return "more bytes than a file can have"
    return f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits / 8:.1f} bytes (no whole number)"


def _all_naturals(value: Any) -> bool:
    if type(value) is not list:
        return False
    for item in value:  # noqa: SIM110  # all() takes three times as long, and this runs twice a tensor
        if type(item) is not int or item < 0:
            return False
    return True


def _check_cover(tensors: Mapping[str, TensorInfo], data_start: int, file_bytes: int, file: str) -> None:
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if info.offset != position:
            raise ContainerError(
                "the tensors " + ("overlap" if info.offset < position else "leave a hole"),
                where=f"{file}, tensor {printable(name)}",
                expected=f"data from byte {position - data_start}",
                found=f"from {info.offset - data_start}",
            )
        position += info.num_bytes
    if position != file_bytes:
        raise ContainerError(
            "the file is cut short" if position > file_bytes else "there are bytes behind the last tensor",
            where=file,
            expected=f"{position} bytes",
            found=f"{file_bytes} bytes",
            hint="download it again" if position > file_bytes else None,
        )
