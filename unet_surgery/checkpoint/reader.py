"""``Weights``: the tensors of a safetensors file or of an index and its shards, found by name, read by byte range."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from unet_surgery.checkpoint.header import MAX_HEADER_BYTES, Header, TensorInfo, read_header
from unet_surgery.checkpoint.jsonfile import kind_of, read_object
from unet_surgery.checkpoint.layout import WeightsChoice
from unet_surgery.errors import ContainerError, TeacherError, printable
from unet_surgery.lower import StoredFile, StoredWeights

__all__ = ["Located", "OpenFile", "Weights", "open_weights"]

MAX_SHARDS = 256  # all of them are open at once


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A safetensors file that is open for reading, and its checked header."""

    path: Path
    fd: int
    header: Header
    status: os.stat_result | None
    """As it was when it was opened; None where others may add to the file."""

    def check_unchanged(self) -> None:
        """Raise TeacherError if the file was changed since it was opened."""
        if self.status is None:
            return
        now = os.fstat(self.fd)
        if (now.st_size, now.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns):
            raise TeacherError("the teacher changed while it was read", where=str(self.path), hint="run again")


class Located(NamedTuple):
    """A tensor of an open file: the file, the tensor's place in it, and its name there."""

    file: OpenFile
    info: TensorInfo
    name: str


class Weights:
    """The tensors of one component. A context manager: files stay open until it is left."""

    def __init__(self, files: list[OpenFile], tensors: Mapping[str, Located] | None = None) -> None:
        self.files = files
        self._where: dict[str, Located] = dict(tensors or {})
        for file in files if tensors is None else ():
            for name, info in file.header.tensors.items():
                if name in self._where:
                    self.close()
                    raise ContainerError(
                        "a tensor stands in two shards",
                        where=f"{file.path}, tensor {printable(name)}",
                        found=f"also in {self._where[name].file.path.name}",
                    )
                self._where[name] = Located(file, info, name)

    def renamed(self, tensors: Mapping[str, Located]) -> Weights:
        """Return a view of the same open files with other names, and other tensors cut out of theirs.

        The view and these weights close the same files: leave only one of them.
        """
        return Weights(self.files, tensors)

    def close(self) -> None:
        """Close the files; nothing can be read any more."""
        for file in self.files:
            os.close(file.fd)

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def info(self, name: str) -> TensorInfo:
        return self._where[name].info

    def locate(self, name: str) -> Located:
        """Return where a tensor lies."""
        return self._where[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: located.info.shape for name, located in self._where.items()}

    def dtypes(self) -> dict[str, str]:
        return {name: located.info.dtype for name, located in self._where.items()}

    def tensor_bytes(self) -> dict[str, int]:
        return {name: located.info.num_bytes for name, located in self._where.items()}

    def stored(self) -> StoredWeights:
        """Return what identifies these weights: files, sizes, header digests, and the number of tensors by dtype."""
        dtypes: dict[str, int] = {}
        for _, info, _ in self._where.values():
            dtypes[info.dtype] = dtypes.get(info.dtype, 0) + 1
        files = tuple(StoredFile(f.path.name, f.header.file_bytes, f.header.sha256) for f in self.files)
        return StoredWeights(files, dict(sorted(dtypes.items())))

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()


def open_weights(folder: Path, choice: WeightsChoice, *, max_header_bytes: int = MAX_HEADER_BYTES) -> Weights:
    """Open the chosen weights of ``folder`` and check every header, each of at most ``max_header_bytes``.

    Raises:
        TeacherError: a file is missing, not a regular file, damaged, or contradicts the index.
    """
    if not choice.sharded:
        return Weights(_open_all([folder / choice.file], max_header_bytes))
    index_path = folder / choice.file
    weight_map = read_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ContainerError("the index has no weight_map", where=str(index_path), expected="tensor name → shard file")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", "..") or not shard.isprintable():
            raise ContainerError(
                "the index names a file outside its folder", where=str(index_path), found=printable(shard)
            )
    if len(shards) > MAX_SHARDS:
        raise ContainerError(
            "the index names implausibly many shards",
            where=str(index_path),
            expected=f"at most {MAX_SHARDS}",
            found=f"{len(shards)}",
        )
    weights = Weights(_open_all([folder / shard for shard in shards], max_header_bytes))
    try:
        _check_index(weights, weight_map, index_path)
    except BaseException:
        weights.close()
        raise
    return weights


def _open_all(paths: list[Path], max_header_bytes: int) -> list[OpenFile]:
    files: list[OpenFile] = []
    try:
        for path in paths:
            files.append(_open(path, max_header_bytes))  # noqa: PERF401  # what is open so far must be closed
    except BaseException:
        for file in files:
            os.close(file.fd)
        raise
    return files


def _open(path: Path, max_header_bytes: int) -> OpenFile:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TeacherError(
            "a weights file cannot be opened", where=str(path), found=error.strerror, hint="download the teacher again"
        ) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise TeacherError("a weights file is not a regular file", where=str(path), found=kind_of(status.st_mode))
        return OpenFile(path, fd, read_header(fd, str(path), max_bytes=max_header_bytes), status)
    except BaseException:
        os.close(fd)
        raise


def _check_index(weights: Weights, weight_map: Mapping[str, str], index_path: Path) -> None:
    for name, shard in weight_map.items():
        found = weights.locate(name).file.path.name if name in weights else "no shard"
        if found != shard:
            raise ContainerError(
                "the index and the shards disagree",
                where=f"{index_path}, tensor {printable(name)}",
                expected=f"in {printable(shard)}",
                found=f"in {found}",
                hint="download index and shards again",
            )
    for name in weights:
        if name not in weight_map:
            raise ContainerError(
                "a shard holds a tensor that the index does not list",
                where=f"{weights.locate(name).file.path}, tensor {printable(name)}",
                expected=f"every tensor in {index_path.name}",
                hint="download index and shards again",
            )
