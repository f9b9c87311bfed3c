"""Writing the student's weights: bytes go from file to file, and no tensor is ever built.

A single file is what ``save_pretrained`` would write, byte for byte: tensors by dtype (widest first), then by name, and
the same header. So equal students are equal files, however the teacher was stored. Shards are filled in the same order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.header import DTYPE_BITS, DTYPE_ORDER, encode_header
from unet_surgery.checkpoint.layout import UNET_BASE
from unet_surgery.checkpoint.reader import MAX_SHARDS, OpenFile, Weights
from unet_surgery.errors import SurgeryError, TeacherError, UsageError
from unet_surgery.lower import SurgeryPlan, replaced_tensor

__all__ = ["DEFAULT_SHARD_BYTES", "StudentTensor", "student_tensors", "write_weights"]

DEFAULT_SHARD_BYTES = 10_000_000_000  # diffusers' own default
CAST_CHUNK_BYTES = 4 << 20
METADATA = {"format": "pt"}
ZEROS = bytes(1 << 20)


@dataclass(frozen=True, slots=True)
class StudentTensor:
    """A tensor to write; ``source`` is the teacher's, None for zeros."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str | None

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def student_tensors(plan: SurgeryPlan, weights: Weights) -> list[StudentTensor]:
    """Return the student's tensors in the order in which they are written."""
    tensors = []
    for name, source in plan.weights.items():
        info = weights.info(source if source is not None else replaced_tensor(plan.weights, name))
        tensors.append(StudentTensor(name, plan.dtype or info.dtype, info.shape, source))
    return sorted(tensors, key=lambda t: (-DTYPE_ORDER[t.dtype], t.name))


def write_weights(
    plan: SurgeryPlan,
    weights: Weights,
    folder: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_bytes: disk.OnBytes,
) -> None:
    """Write the student's weights into ``folder``: one file, or shards and their index above ``max_shard_bytes``.

    Raises:
        TeacherError: the teacher's file ends early, or a value overflows ``plan.dtype`` (names the tensor).
        OSError: the disk refuses; the caller's staging folder takes care of what is there.
    """
    shards = _shards(student_tensors(plan, weights), max_shard_bytes)
    if len(shards) > MAX_SHARDS:
        raise UsageError(
            "the shards would be too many to be read back",
            expected=f"at most {MAX_SHARDS}",
            found=str(len(shards)),
            hint="a larger --max-shard-size",
        )
    if len(shards) == 1:
        _write_file(folder / f"{UNET_BASE}.safetensors", shards[0], weights, on_bytes)
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{UNET_BASE}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, weights, on_bytes)
        index |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True) + "\n"
    disk.write_file(folder / f"{UNET_BASE}.safetensors.index.json", text.encode())


def _shards(tensors: Sequence[StudentTensor], max_bytes: int) -> list[list[StudentTensor]]:
    """Fill shards greedily, as huggingface_hub does: a tensor larger than a shard gets one of its own."""
    shards: list[list[StudentTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_file(path: Path, tensors: list[StudentTensor], weights: Weights, on_bytes: disk.OnBytes) -> None:
    fd = disk.create(path)
    try:
        disk.write(fd, encode_header([(t.name, t.dtype, t.shape) for t in tensors], METADATA))
        for piece in _pieces(tensors, weights):
            if isinstance(piece, _Range):
                _copy(piece, fd, on_bytes)
            elif piece.source is None:
                _write_zeros(fd, piece.num_bytes, on_bytes)
            else:
                _write_cast(fd, piece, piece.source, weights, on_bytes)
        disk.fsync(fd)
    finally:
        os.close(fd)


@dataclass(slots=True)
class _Range:
    """Neighbouring bytes of one teacher file that are neighbours in the student as well."""

    file: OpenFile
    offset: int
    num_bytes: int


def _pieces(tensors: Sequence[StudentTensor], weights: Weights) -> Iterator[_Range | StudentTensor]:
    """Yield what to write in order: copied tensors coalesced into ranges, the others one by one."""
    run: _Range | None = None
    for tensor in tensors:
        if tensor.source is not None:
            file, info = weights.locate(tensor.source)
            if info.dtype == tensor.dtype:
                if run is not None and run.file is file and run.offset + run.num_bytes == info.offset:
                    run.num_bytes += info.num_bytes
                    continue
                if run is not None:
                    yield run
                run = _Range(file, info.offset, info.num_bytes)
                continue
        if run is not None:
            yield run
            run = None
        yield tensor
    if run is not None:
        yield run


def _copy(piece: _Range, fd: int, on_bytes: disk.OnBytes) -> None:
    try:
        disk.copy_range(piece.file.fd, piece.offset, piece.num_bytes, fd, on_bytes)
    except EOFError:
        raise _cut_short(piece.file) from None


def _cut_short(file: OpenFile) -> TeacherError:
    return TeacherError("the teacher's file ended while it was read", where=str(file.path), hint="run again")


def _write_zeros(fd: int, num_bytes: int, on_bytes: disk.OnBytes) -> None:
    for start in range(0, num_bytes, len(ZEROS)):
        piece = ZEROS[: num_bytes - start]
        disk.write(fd, piece)
        on_bytes(len(piece))


def _write_cast(fd: int, tensor: StudentTensor, source: str, weights: Weights, on_bytes: disk.OnBytes) -> None:
    from unet_surgery.checkpoint.cast import CAST_DTYPES, cast  # numpy, which plain copies do without

    file, info = weights.locate(source)
    if info.dtype not in CAST_DTYPES:
        raise TeacherError(
            f"a tensor of dtype {info.dtype} cannot be converted to {tensor.dtype}",
            where=f"{file.path}, tensor {source}",
            expected=" or ".join(CAST_DTYPES),
            hint="leave --dtype out to copy it as it is",
        )
    for start in range(0, info.num_bytes, CAST_CHUNK_BYTES):
        length = min(CAST_CHUNK_BYTES, info.num_bytes - start)
        data = os.pread(file.fd, length, info.offset + start)
        if len(data) != length:
            raise _cut_short(file)
        try:
            converted = cast(data, info.dtype, tensor.dtype)
        except SurgeryError as error:
            raise error.at(f"{file.path}, tensor {source}") from None
        disk.write(fd, converted)
        on_bytes(len(converted))
