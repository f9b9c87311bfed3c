"""Writing a safetensors file out of tensors of other files: bytes go from file to file, and no tensor is built.

A file is what the reference implementation would write: tensors by dtype (widest first), then by name, and the same
header. So equal models are equal files, wherever their tensors lay before.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.header import DTYPE_BITS, DTYPE_ORDER, encode_header
from unet_surgery.checkpoint.reader import Located, OpenFile
from unet_surgery.errors import SurgeryError, TeacherError

__all__ = ["METADATA", "OutTensor", "Transposed", "in_file_order", "source_ranges", "write_tensors"]

CAST_CHUNK_BYTES = 4 << 20
METADATA = {"format": "pt"}
ZEROS = bytes(1 << 20)


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix of another file that is written with rows and columns exchanged."""

    matrix: Located


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor to write.

    ``content`` is where its values come from: tensors of open files, one behind the other; a matrix to transpose; the
    bytes themselves; or None for zeros.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: tuple[Located, ...] | Transposed | bytes | None

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def chunks(self, size: int = CAST_CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the bytes that are written for it, from pieces of ``size`` bytes of its sources.

        Raises:
            TeacherError: as :func:`write_tensors`.
        """
        content = self.content
        if content is None:
            for start in range(0, self.num_bytes, len(ZEROS)):
                yield ZEROS[: self.num_bytes - start]
        elif isinstance(content, bytes):
            yield content
        elif isinstance(content, Transposed):
            yield _as(self.dtype, content.matrix, _transposed(content.matrix))
        else:
            for source in content:
                for start in range(0, source.info.num_bytes, size):
                    yield _as(self.dtype, source, _read(source, start, min(size, source.info.num_bytes - start)))


def in_file_order(tensors: Iterable[OutTensor]) -> list[OutTensor]:
    """Return the tensors in the order in which they are written."""
    return sorted(tensors, key=lambda t: (-DTYPE_ORDER[t.dtype], t.name))


def source_ranges(tensors: Iterable[OutTensor]) -> dict[str, list[tuple[int, int]]]:
    """Return file name → the bytes [begin, end) of it that the tensors' content is made of."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for tensor in tensors:
        content = tensor.content
        located = (content.matrix,) if isinstance(content, Transposed) else content
        for file, info, _ in located if isinstance(located, tuple) else ():
            ranges.setdefault(file.path.name, []).append((info.offset, info.offset + info.num_bytes))
    return ranges


def write_tensors(fd: int, tensors: Sequence[OutTensor], on_bytes: disk.OnBytes) -> None:
    """Write a safetensors file of ``tensors``, which are :func:`in_file_order`, to the empty file open at ``fd``.

    Raises:
        TeacherError: a source file ends early, or a value overflows the dtype it is converted to (names the tensor).
        OSError: the disk refuses.
    """
    disk.write(fd, encode_header([(t.name, t.dtype, t.shape) for t in tensors], METADATA))
    for piece in _pieces(tensors):
        if isinstance(piece, _Range):
            _copy(piece, fd, on_bytes)
        else:
            for chunk in piece.chunks():
                disk.write(fd, chunk)
                on_bytes(len(chunk))
    disk.fsync(fd)


@dataclass(slots=True)
class _Range:
    """Neighbouring bytes of one file that are neighbours in the new one as well."""

    file: OpenFile
    offset: int
    num_bytes: int


def _pieces(tensors: Sequence[OutTensor]) -> Iterator[_Range | OutTensor]:
    """Yield what to write in order: what is copied as it is coalesced into ranges, the other tensors one by one."""
    run: _Range | None = None
    for tensor in tensors:
        copied = tensor.content if isinstance(tensor.content, tuple) else ()
        if not copied or any(info.dtype != tensor.dtype for _, info, _ in copied):
            if run is not None:
                yield run
                run = None
            yield tensor
            continue
        for file, info, _ in copied:
            if run is not None and run.file is file and run.offset + run.num_bytes == info.offset:
                run.num_bytes += info.num_bytes
                continue
            if run is not None:
                yield run
            run = _Range(file, info.offset, info.num_bytes)
    if run is not None:
        yield run


def _copy(piece: _Range, fd: int, on_bytes: disk.OnBytes) -> None:
    try:
        disk.copy_range(piece.file.fd, piece.offset, piece.num_bytes, fd, on_bytes)
    except EOFError:
        raise _cut_short(piece.file) from None


def _cut_short(file: OpenFile) -> TeacherError:
    return TeacherError("the teacher's file ended while it was read", where=str(file.path), hint="run again")


def _as(dtype: str, source: Located, data: bytes) -> bytes:
    """Return values of ``source`` as values of ``dtype``."""
    file, info, name = source
    if info.dtype == dtype:
        return data
    from unet_surgery.checkpoint.cast import CAST_DTYPES, cast  # numpy, which plain copies do without

    if info.dtype not in CAST_DTYPES:
        raise TeacherError(
            f"a tensor of dtype {info.dtype} cannot be converted to {dtype}",
            where=f"{file.path}, tensor {name}",
            expected=" or ".join(CAST_DTYPES),
            hint="leave --dtype out to copy it as it is",
        )
    try:
        return cast(data, info.dtype, dtype)
    except SurgeryError as error:
        raise error.at(f"{file.path}, tensor {name}") from None


def _transposed(matrix: Located) -> bytes:
    import numpy as np

    rows, columns = matrix.info.shape
    item_bytes = DTYPE_BITS[matrix.info.dtype] // 8
    values = np.frombuffer(_read(matrix, 0, matrix.info.num_bytes), dtype=f"V{item_bytes}").reshape(rows, columns)
    return values.T.tobytes()


def _read(source: Located, start: int, length: int) -> bytes:
    data = os.pread(source.file.fd, length, source.info.offset + start)
    if len(data) != length:
        raise _cut_short(source.file)
    return data
