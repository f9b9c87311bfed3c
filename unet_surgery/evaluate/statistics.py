"""The moments of a reference set, as files that pytorch-fid reads and writes: ``.npz`` with ``mu`` and ``sigma``.

Ours hold more: how many pictures, their resolution, what was done to them, which weights. pytorch-fid skips these.
"""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.jsonfile import read_regular
from unet_surgery.errors import DataError, OutputError, TeacherError, printable
from unet_surgery.evaluate.inception import NUM_FEATURES

__all__ = ["Statistics", "read_statistics", "write_statistics"]

MAX_FILE_BYTES = 256 << 20
SYMMETRY = 1e-6
"""By how much of its largest value Σ may differ from its transpose."""

_TEXTS = ("change", "weights_sha256", "implementation", "name")


@dataclass(frozen=True, slots=True)
class Statistics:
    """μ [2048] and Σ [2048, 2048] in fp64, and what is known of them; None is what a file does not say.

    ``resolution`` is (width, height) of the pictures; ``change`` is what was done to them before, in words;
    ``implementation`` names network and resize.
    """

    mu_D: NDArray[np.float64]
    sigma_DD: NDArray[np.float64]
    count: int | None = None
    resolution: tuple[int, int] | None = None
    change: str | None = None
    weights_sha256: str | None = None
    implementation: str | None = None
    name: str | None = None


def write_statistics(path: Path, statistics: Statistics, *, force: bool = False) -> None:
    """Write the file, whole or not at all; the same statistics give the same bytes.

    Raises:
        OutputError: it exists (without ``force``), or cannot be written.
    """
    arrays: dict[str, Any] = {"mu": statistics.mu_D, "sigma": statistics.sigma_DD}
    if statistics.count is not None:
        arrays["count"] = np.int64(statistics.count)
    if statistics.resolution is not None:
        arrays["resolution"] = np.array(statistics.resolution, dtype=np.int64)
    arrays |= {name: np.str_(text) for name in _TEXTS if (text := getattr(statistics, name)) is not None}
    stored = io.BytesIO()
    np.savez_compressed(stored, **arrays)
    try:
        disk.replace_file(path, stored.getvalue(), force=force)
    except FileExistsError:
        raise OutputError(
            "the output exists", where=str(path), hint="choose another --out, or --force to replace it"
        ) from None
    except BlockingIOError as error:
        raise OutputError("another process is writing this output", where=str(path)) from error
    except OSError as error:
        raise OutputError("the output cannot be written", where=str(path), found=error.strerror) from error


def read_statistics(path: Path) -> Statistics:
    """Read a file of pytorch-fid's or ours; nothing is unpickled, and no size that it claims is believed.

    Raises:
        DataError: it is no such file, of another number of features, not finite, or its Σ is not symmetric.
    """
    try:
        data = read_regular(path, MAX_FILE_BYTES)
    except TeacherError as error:
        raise DataError(error.what, where=str(path), expected=error.expected, found=error.found) from error
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            mu_D = _array(archive, "mu", (NUM_FEATURES,))
            sigma_DD = _array(archive, "sigma", (NUM_FEATURES, NUM_FEATURES))
            count = _integers(archive, "count", ())
            resolution = _integers(archive, "resolution", (2,))
            texts = {name: _text(archive, name) for name in _TEXTS}
    except DataError as error:
        raise error.at(str(path)) from None
    except Exception as error:  # zip and numpy's header parser raise anything of hostile bytes, MemoryError too
        raise _refused("this is no .npz file of statistics", found=printable(str(error) or type(error).__name__)).at(
            str(path)
        ) from error
    return Statistics(
        mu_D,
        sigma_DD,
        None if count is None else count[0],
        None if resolution is None else (resolution[0], resolution[1]),
        **texts,
    )


def _refused(what: str, *, found: str) -> DataError:
    return DataError(
        what,
        expected=f"mu [{NUM_FEATURES}] and sigma [{NUM_FEATURES}, {NUM_FEATURES}], as pytorch-fid writes them",
        found=found,
        hint="unet-surgery stats FOLDER --out STATS.npz makes one",
    )


def _array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    found = _member(archive, name, shape)
    if found is None:
        raise _refused(f"the statistics lack {name}", found=printable(", ".join(archive.namelist()) or "nothing"))
    if found.dtype.kind != "f" or found.shape != shape:
        raise _refused(f"{name} has another form", found=f"{found.dtype} {list(found.shape)}")
    array = found.astype(np.float64)
    if not np.isfinite(array).all():
        raise _refused(f"{name} is not finite", found="NaN or infinity")
    if array.ndim == 2:
        largest = float(np.abs(array).max())
        if float(np.abs(array - array.T).max()) > SYMMETRY * largest or array.diagonal().min() < 0:
            raise _refused("sigma is no covariance", found="it is not symmetric, or a variance is below zero")
        array = (array + array.T) / 2
    return array


def _integers(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    found = _member(archive, name, shape)
    if found is None:
        return None
    if found.dtype.kind not in "iu" or found.shape != shape or found.size == 0 or int(found.min()) < 1:
        raise _refused(f"{name} has another form", found=f"{found.dtype} {list(found.shape)}")
    return tuple(int(value) for value in found.reshape(-1))


def _text(archive: zipfile.ZipFile, name: str) -> str | None:
    found = _member(archive, name, ())
    return None if found is None or found.dtype.kind != "U" else printable(str(found))


def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> NDArray[Any] | None:
    """Read one array; its header is checked before its values, whose number the zip's entry has to agree with."""
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        return None
    most = 8 * int(np.prod(shape)) + 4096
    if info.file_size > most:
        raise _refused(f"{name} is too large", found=f"{info.file_size} bytes")
    with archive.open(info) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise _refused(f"{name} is too large", found=f"more than {most} bytes")
    _check_header(name, data)
    array: NDArray[Any] = npy.read_array(io.BytesIO(data), allow_pickle=False)
    return array


def _check_header(name: str, data: bytes) -> None:
    """Refuse an array whose header claims other values than follow it: room is made for what it claims."""
    file = io.BytesIO(data)
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise _refused(f"{name} has another form", found=f"npy version {version}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise _refused(f"{name} is pickled", found="Python objects, which are not read")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise _refused(f"{name} is damaged", found=f"{len(data) - file.tell()} bytes for {dtype} {list(shape)}")
