"""One group of a training state on disk: a safetensors file, hashed in the pass that writes or reads it.

The file is the one that the reference implementation writes for the same tensors. Memory holds the tensors and a few
megabytes: what lies on another device passes through in pieces.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from types import TracebackType

import torch

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.header import (
    DTYPE_BITS,
    DTYPE_ORDER,
    MAX_HEADER_BYTES,
    MAX_TENSOR_NAME,
    TensorInfo,
    encode_header,
    read_header,
)
from unet_surgery.checkpoint.jsonfile import kind_of
from unet_surgery.checkpoint.tensorfile import METADATA
from unet_surgery.errors import ContainerError, printable

__all__ = ["DamagedError", "GroupFile", "Stored", "group_file", "open_stored", "read_group", "write_group"]

PIECE_BYTES = 8 << 20
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class DamagedError(Exception):
    """A file of a training state is not what was written; the message says what is wrong with which."""


@dataclass(frozen=True, slots=True)
class GroupFile:
    """What a group's file will hold: its first bytes, and the tensors behind them in their order."""

    head: bytes
    tensors: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.head) + sum(int(tensor.nbytes) for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Stored:
    """A file as the manifest knows it."""

    num_bytes: int
    sha256: str


def group_file(tensors: Mapping[str, torch.Tensor]) -> GroupFile:
    """Return the file of a group of tensors on any device; their strides are not kept.

    Raises:
        ValueError: a tensor has a name, dtype or layout that cannot be stored.
    """
    for name, tensor in tensors.items():
        if not 0 < len(name) <= MAX_TENSOR_NAME or not name.isprintable() or name == "__metadata__":
            raise ValueError(f"a tensor cannot be called {printable(name)!r} in a safetensors file")
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type == "meta":
            raise ValueError(f"{name}: a {tensor.layout} tensor of {tensor.dtype} on {tensor.device} cannot be stored")
    names = sorted(tensors, key=lambda name: (-DTYPE_ORDER[DTYPES[tensors[name].dtype]], name))
    head = encode_header([(name, DTYPES[tensors[name].dtype], tuple(tensors[name].shape)) for name in names], METADATA)
    if len(head) - 8 > MAX_HEADER_BYTES:
        raise ValueError(f"{len(tensors)} tensors are too many for one file")
    return GroupFile(head, tuple(tensors[name] for name in names))


def write_group(fd: int, group: GroupFile, on_bytes: disk.OnBytes) -> str:
    """Write a group to the empty file open at ``fd``, and return the SHA-256 of its bytes; nothing is forced to disk.

    Raises:
        OSError: the disk refuses.
    """
    unsent = 0
    with _Hashing() as hashing:
        for piece in (memoryview(group.head), *_pieces(group.tensors)):
            hashing.update(piece)
            disk.write(fd, piece)
            on_bytes(piece.nbytes)
            unsent += piece.nbytes
            if unsent >= disk.WRITEBACK_BYTES:
                disk.start_writeback(fd)  # so that little is left for the fsync
                unsent = 0
        return hashing.hexdigest()


def open_stored(path: str, stored: Stored | None = None) -> int:
    """Return a descriptor of a file of a state, which must be a regular one, of the size that the manifest names.

    Raises:
        DamagedError: it is missing, something else, or of another size.
        OSError: it cannot be opened for another reason.
    """
    name = os.path.basename(path)
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise DamagedError(f"{name} is missing") from None
        if error.errno == errno.ELOOP:
            raise DamagedError(f"{name} is a link, not a file") from None
        raise
    status = os.fstat(fd)
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = f"{name} is {kind_of(status.st_mode)}, not a file"
    elif stored is not None and status.st_size != stored.num_bytes:
        problem = f"{name} has {status.st_size} bytes, not {stored.num_bytes}"
    if problem is not None:
        os.close(fd)
        raise DamagedError(problem)
    return fd


def read_group(path: str, stored: Stored, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of a group's file, on ``device``, by name.

    Raises:
        DamagedError: the file is not the one that was written.
        OSError: it cannot be read.
    """
    name = os.path.basename(path)
    fd = open_stored(path, stored)
    try:
        try:
            header = read_header(fd, name)
        except ContainerError as error:
            raise DamagedError(": ".join(filter(None, (name, error.what, error.found)))) from error
        with _Hashing() as hashing:
            head = memoryview(bytearray(header.data_start))
            _read_into(fd, head, 0, name)
            hashing.update(head)
            tensors = {}
            for key, info in sorted(header.tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
                if info.dtype not in TORCH_DTYPES:
                    raise DamagedError(f"{name}: tensor {printable(key)} is of dtype {info.dtype}")
                tensors[key] = _read_tensor(fd, info, device, hashing, name)
            if hashing.hexdigest() != stored.sha256:
                raise DamagedError(f"{name} has other bytes than were written (its SHA-256 differs)")
        return tensors
    finally:
        os.close(fd)


def _pieces(tensors: tuple[torch.Tensor, ...]) -> Iterator[memoryview]:
    """Yield the tensors' bytes; those on the CPU are not copied, but where they are not contiguous."""
    for tensor in tensors:
        flat = _flat_bytes(tensor.detach().contiguous())
        for piece in flat.split(PIECE_BYTES):
            yield memoryview(piece.cpu().numpy())


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor as a view of it."""
    return tensor.view(-1).view(torch.uint8)


def _read_tensor(fd: int, info: TensorInfo, device: torch.device, hashing: _Hashing, name: str) -> torch.Tensor:
    """Return a tensor whose bytes begin at ``info.offset``; the container's check has bounded them by the file."""
    assert prod(info.shape) * DTYPE_BITS[info.dtype] == info.num_bytes * 8
    tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device=device)
    offset = info.offset
    for piece in _flat_bytes(tensor).split(PIECE_BYTES):
        here = piece if device.type == "cpu" else torch.empty(len(piece), dtype=torch.uint8)
        view = memoryview(here.numpy())
        _read_into(fd, view, offset, name)
        hashing.update(view)
        if here is not piece:
            piece.copy_(here)
        offset += len(piece)
    return tensor


def _read_into(fd: int, view: memoryview, offset: int, name: str) -> None:
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise DamagedError(f"{name} ended while it was read")
        view, offset = view[count:], offset + count


class _Hashing:
    """SHA-256 in a thread of its own, one piece behind the reading or writing: together they take the longer time."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Hashing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def update(self, piece: memoryview) -> None:
        """Add a piece, which must not change until the next call returns; waits for the piece before."""
        if self._pending is not None:
            self._pending.result()
        self._pending = self._pool.submit(self._digest.update, piece)

    def hexdigest(self) -> str:
        if self._pending is not None:
            self._pending.result()
        return self._digest.hexdigest()
