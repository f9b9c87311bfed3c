"""What pictures are compared with: a folder of others, or statistics of one; and making statistics."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.disk import Progress
from unet_surgery.checkpoint.target import check_new_file
from unet_surgery.data.shards import choose_device
from unet_surgery.data.statisticsnote import read_note
from unet_surgery.errors import DataError, UsageError
from unet_surgery.evaluate.features import DTYPES, Compute, inception_features
from unet_surgery.evaluate.inception import FidInception
from unet_surgery.evaluate.metrics import METRICS
from unet_surgery.evaluate.pictures import Change, PictureFolder, survey
from unet_surgery.evaluate.statistics import Statistics, read_statistics, write_statistics
from unet_surgery.evaluate.weights import Weights, find_inception, read_tensors

__all__ = ["Reference", "load_inception", "make_statistics", "open_reference"]

STATISTICS_SUFFIX = ".npz"


@dataclass(frozen=True, slots=True)
class Reference:
    """Pictures or their statistics; ``resolution`` is (width, height), ``told`` where only the caller says so.

    ``sha256`` is of the statistics' file, or of the pictures' files in the names' order, once they were read.
    """

    name: str
    resolution: tuple[int, int]
    count: int | None
    change: str | None
    sha256: str | None
    pictures: PictureFolder | None = None
    statistics: Statistics | None = None
    told: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sha256": self.sha256,
            "count": self.count,
            "resolution": list(self.resolution),
            "resolution_is_told": self.told,
            "change": self.change,
        }


def make_statistics(
    folder: str | Path,
    out: str | Path,
    *,
    inception: str | Path | None = None,
    weights_sha256: str | None = None,
    resize: int | None = None,
    jpeg: int | None = None,
    batch: int = 50,
    device: str = "auto",
    dtype: str = "fp32",
    decoders: int = 4,
    force: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Write mean and covariance of the features of a folder's pictures: what FID compares with.

    The file is one that pytorch-fid 0.3.0 reads; ours also says count, resolution and weights. ``resize`` squeezes
    every picture to that side first (PIL's bicubic), and ``jpeg`` stores it with that quality and reads it again:
    BK-SDM's reference is MS-COCO's with 256 and 75. ``inception`` is the weights' file.

    Raises:
        DataError: pictures cannot be read, differ in size, or are too few (2,048 is what the features' rank asks for).
        TeacherError: the weights are missing, or are not those that ``weights_sha256`` or the published hash says.
        OutputError: ``out`` exists (without ``force``), or cannot be written.
        UsageError: an argument has a wrong value.
    """
    path = Path(out)
    _check_output(path, force=force)
    for name, value, most in (("resize", resize, 4096), ("jpeg", jpeg, 100)):
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"--{name} is out of its range", expected=f"1 to {most}", found=str(value))
    pictures = survey(Path(folder), change=Change(resize, jpeg), decoders=decoders)
    check_enough(len(pictures), str(folder))
    weights = find_inception(inception, sha256=weights_sha256)
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(pictures))

    compute = Compute(choose_device(device), dtype, batch, decoders, step)
    net = load_inception(weights, compute)
    mu_D, sigma_DD = inception_features(net, pictures, compute, moments=True).moments.mean_and_covariance()
    statistics = Statistics(
        mu_D,
        sigma_DD,
        len(pictures),
        (pictures.width, pictures.height),
        pictures.change.words,
        weights.sha256,
        METRICS["fid"].implementation,
        pictures.folder.resolve().name,
    )
    write_statistics(path, statistics, force=force)
    return statistics


def load_inception(weights: Weights, compute: Compute) -> FidInception:
    """Load the network onto the device.

    Raises:
        TeacherError: the file is damaged or holds another network.
    """
    net = FidInception(read_tensors(weights.path), dtype=DTYPES[compute.dtype])
    net.to(compute.device)
    return net


def open_reference(text: str | Path, resolution: int | None, *, decoders: int) -> Reference:
    """Open statistics or look through a folder. ``resolution`` is for statistics that do not record theirs.

    Those that ``data get`` fetched have a note beside them, which says what they do not.

    Raises:
        DataError: it cannot be read, or records another resolution than the given one, or none and none is given.
    """
    path = Path(text)
    if path.suffix != STATISTICS_SUFFIX:
        pictures = survey(path, decoders=decoders)
        size = (pictures.width, pictures.height)
        _check_told(size, resolution, path)
        return Reference(path.resolve().name, size, len(pictures), None, None, pictures=pictures)
    statistics = read_statistics(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if statistics.resolution is None and (note := read_note(path, digest)) is not None:
        statistics = replace(
            statistics,
            resolution=note.resolution,
            count=statistics.count or note.count,
            change=statistics.change or note.change,
            name=statistics.name or note.name,
        )
    if statistics.resolution is None and resolution is None:
        raise DataError(
            "the statistics do not say of what resolution the pictures were",
            where=str(path),
            hint="--reference-resolution SIDE says it; a distance between resolutions means nothing",
        )
    if statistics.resolution is not None:
        _check_told(statistics.resolution, resolution, path)
    size = statistics.resolution or (resolution or 0, resolution or 0)
    name = statistics.name or path.stem
    told = statistics.resolution is None
    return Reference(name, size, statistics.count, statistics.change, digest, statistics=statistics, told=told)


def check_enough(count: int, where: str) -> None:
    """Refuse a set of which the covariance has not the features' rank.

    Raises:
        DataError: it is smaller than 2,048.
    """
    least = METRICS["fid"].min_pictures
    if count < least:
        raise DataError(
            "too few pictures for FID: the covariance of their features is singular",
            where=where,
            expected=f"{least:,} or more; 10,000 to 50,000 are usual, and numbers of different counts differ",
            found=f"{count:,}",
        )


def _check_told(found: tuple[int, int], told: int | None, path: Path) -> None:
    if told is not None and found != (told, told):
        raise DataError(
            "the reference has another resolution than --reference-resolution says",
            where=str(path),
            expected=f"{told}×{told}",
            found=f"{found[0]}×{found[1]}",
        )


def _check_output(path: Path, *, force: bool) -> None:
    """Refuse early, before minutes of work."""
    if path.suffix != STATISTICS_SUFFIX:
        raise UsageError("statistics are written to a file .npz", found=str(path))
    check_new_file(path, force=force)
