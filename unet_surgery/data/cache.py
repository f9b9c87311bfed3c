"""Make a latent cache: pictures through the VAE once, captions through the tokenizer, in shards that many can write."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from unet_surgery.checkpoint.identity import tokenizer_sha256, vae_sha256
from unet_surgery.checkpoint.target import check_space
from unet_surgery.data.cachefolder import (
    CACHE_FILE,
    bad_counts,
    begin_cache,
    check_output,
    finish_cache,
    finish_shard,
    finished_shards,
    read_facts,
    writing,
)
from unet_surgery.data.cacheplan import CacheFacts, CacheSettings, Part, check_share, shard_name, shard_ranges
from unet_surgery.data.encode import check_resolution
from unet_surgery.data.filters import FilteredSource
from unet_surgery.data.shards import Encoder, write_shard
from unet_surgery.data.sides import native_side
from unet_surgery.data.sources import CAPTION_COLUMNS, Source, open_source
from unet_surgery.errors import DataError, UsageError, printable
from unet_surgery.runtime.parts import check_pipeline

if TYPE_CHECKING:
    from unet_surgery.hub.resolve import ResolvedTeacher

__all__ = ["CacheRequest", "CacheResult", "Progress", "make_cache", "write_part"]

log = logging.getLogger(__name__)

DTYPES = ("fp32", "bf16")

Progress = Callable[[int, int], None]
"""Called with samples done and samples in all."""


@dataclass(frozen=True, slots=True)
class CacheRequest:
    """What was asked for, in words that another process understands as well."""

    source: str
    model: str
    out: Path
    resolution: int
    batch: int = 16
    device: str = "auto"
    dtype: str = "fp32"
    max_bad: float = 0.01
    flip: bool = False
    shard_samples: int = 4096
    caption_column: str = CAPTION_COLUMNS[0]
    limit: int | None = None
    split: str = "train"
    decoders: int = 4
    filters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CacheResult:
    """A cache, or this part of one: ``finished`` says whether all parts are there.

    ``num_encoded`` samples went through the VAE in this run; ``bad`` counts those that cannot be used, by reason;
    ``num_filtered`` are those that the filters left out before.
    """

    folder: Path
    finished: bool
    num_samples: int
    num_bytes: int
    num_shards: int
    num_shards_done: int
    num_encoded: int
    bad: dict[str, int] = field(default_factory=dict)
    num_filtered: int = 0


def make_cache(
    source: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    resolution: int | None = None,
    batch: int = 16,
    device: str = "auto",
    dtype: str = "fp32",
    max_bad: float = 0.01,
    flip: bool = False,
    shard_samples: int = 4096,
    caption_column: str = CAPTION_COLUMNS[0],
    limit: int | None = None,
    split: str = "train",
    filters: Sequence[str] = (),
    part: tuple[int, int] = (0, 1),
    workers: int = 1,
    decoders: int = 4,
    progress: Progress | None = None,
) -> CacheResult:
    """Encode the pictures of ``source`` by the VAE of ``model`` into the folder ``out``, or go on with it.

    ``source`` is what :func:`unet_surgery.data.sources.open_source` opens, ``model`` a pipeline: a folder, a built-in
    name or a Hub id. Pictures become squares of ``resolution`` pixels; by default what the model's U-Net was made for,
    its ``sample_size`` in the VAE's pixels, and that is logged. ``filters`` such as ``score>=6.5`` choose samples by
    the columns of the source's metadata (:func:`unet_surgery.data.conditions.parse_filter`); all must hold, and
    ``limit`` counts what they leave. ``flip`` keeps every picture's mirror image as well. The VAE runs in ``dtype``
    (``fp32``, or ``bf16``; in fp16 that of SD overflows). ``part`` is (index, count) of processes that share the work,
    each with ``workers`` processes of its own; the result is the same for any number, byte for byte where each encodes
    with the same number of threads, and up to rounding where not. ``decoders`` are threads that decode pictures.
    ``progress`` is called with samples done and in all, of this part.

    Raises:
        DataError: there is no such data, or more than the share ``max_bad`` of it cannot be used.
        OutputError: ``out`` is something else, was begun with other settings, or the disk refuses.
        UsageError: an argument has a wrong value, or there is no ``resolution`` and the model does not say its own.
        TeacherError, HubError, VerificationError: the model cannot be had, or is not whole.
        MissingExtraError: torch, diffusers, transformers or, for some sources, datasets is not installed.
    """
    if dtype not in DTYPES:
        raise UsageError("the VAE cannot run in this dtype", expected=" or ".join(DTYPES), found=printable(dtype))
    for name, value in (("batch", batch), ("shard_samples", shard_samples), ("workers", workers), ("limit", limit)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is not a positive number", found=str(value))
    request = CacheRequest(
        str(source),
        str(model),
        Path(os.path.abspath(Path(out).expanduser())),
        _native(str(model)) if resolution is None else resolution,
        batch,
        device,
        dtype,
        max_bad,
        flip,
        shard_samples,
        caption_column,
        limit,
        split,
        decoders,
        tuple(filters),
    )
    whole = Part(*part)
    report = progress or (lambda _done, _total: None)
    if workers == 1:
        return write_part(request, whole, report)
    from unet_surgery.data.workers import run_parts

    return _joined(run_parts(request, [whole.split(i, workers) for i in range(workers)], report))


def write_part(request: CacheRequest, part: Part, progress: Progress) -> CacheResult:
    """Write the shards of ``part`` that are not there yet, then the indices if all are."""
    source = open_source(
        request.source, caption_column=request.caption_column, split=request.split, filters=request.filters
    )
    check_output(request.out, *(Path(text).expanduser() for text in (request.source, request.model)))
    teacher, folder = _model(request.model)
    encoder = Encoder.load(folder, request.device, request.dtype, request.batch, request.decoders)
    check_resolution(encoder.parts.vae, request.resolution)
    settings = settings_for(request, source, encoder)
    num_shards = len(shard_ranges(settings.num_samples, settings.shard_samples))
    if begin_cache(request.out, settings):
        return _finished(request.out, num_shards, num_encoded=0)
    with encoder:
        num_encoded = _write_shards(request, settings, part, source, encoder, progress)
    done = finished_shards(request.out, settings)
    if len(done) < num_shards:
        if (request.out / CACHE_FILE).is_file():  # another process finished it just now
            return _finished(request.out, num_shards, num_encoded)
        num_rows, num_bytes = sum(s.rows for s in done.values()), sum(s.num_bytes for s in done.values())
        bad = dict(bad_counts(done))
        left_out = settings.num_left_out
        return CacheResult(request.out, False, num_rows, num_bytes, num_shards, len(done), num_encoded, bad, left_out)
    facts = CacheFacts.of(settings, encoder.empty_ids, teacher, done)
    check_share(facts.bad, settings.num_samples, request.max_bad, request.source)
    if not facts.count:
        raise DataError("no sample can be used", where=request.source, found=", ".join(facts.bad))
    finish_cache(request.out, facts, done)
    return _finished(request.out, num_shards, num_encoded)


def _finished(out: Path, num_shards: int, num_encoded: int) -> CacheResult:
    facts = read_facts(out)
    num_bytes = sum(shard.num_bytes for shard in facts.shards.values())
    left_out = facts.settings.num_left_out
    return CacheResult(
        out, True, facts.count, num_bytes, num_shards, num_shards, num_encoded, dict(facts.bad), left_out
    )


def _joined(results: Sequence[CacheResult]) -> CacheResult:
    """Return what several processes did together: the one that saw most tells how the cache stands."""
    last = max(results, key=lambda result: (result.finished, result.num_shards_done))
    return replace(last, num_encoded=sum(result.num_encoded for result in results))


def settings_for(request: CacheRequest, source: Source, encoder: Encoder) -> CacheSettings:
    """Return all that decides what the cache holds."""
    chosen = source if isinstance(source, FilteredSource) else None
    return CacheSettings(
        resolution=request.resolution,
        flip=request.flip,
        dtype=request.dtype,
        num_samples=min(len(source), request.limit or len(source)),
        shard_samples=request.shard_samples,
        caption_column=request.caption_column,
        moments_shape=encoder.moments_shape(request.resolution),
        num_tokens=len(encoder.empty_ids),
        scaling_factor=float(encoder.parts.vae.config.scaling_factor),
        vae=vae_sha256(encoder.parts.folder),
        tokenizer=tokenizer_sha256(encoder.parts.folder),
        source=source.fingerprint,
        filter=tuple(map(str, chosen.conditions)) if chosen else (),
        num_left_out=chosen.num_left_out if chosen else 0,
    )


def _native(model: str) -> int:
    """Return the resolution that a pipeline was made for, and say it; of the Hub, configs alone are fetched."""
    found = _pipeline(model)
    if found.hub is not None:
        found.hub.part_configs()
    check_pipeline(found.folder)
    resolution = native_side(found.folder)
    log.info("resolution %d, the model's", resolution)
    return resolution


def _pipeline(model: str) -> ResolvedTeacher:
    from unet_surgery.hub import resolve_teacher

    found = resolve_teacher(model)
    if found.file is not None:
        raise UsageError(
            "a single file has no VAE that can be used here", where=printable(model), expected="a pipeline"
        )
    return found


def _model(model: str) -> tuple[dict[str, str | None], Path]:
    """Fetch a pipeline's parts; the U-Net's weights on the Hub are left there."""
    from unet_surgery.hub import fetch_teacher

    found = fetch_teacher(_pipeline(model), parts_only=True, progress=lambda _done, _total: None)
    return {"name": found.teacher_id or found.name, "commit": found.commit}, found.folder


def _write_shards(
    request: CacheRequest,
    settings: CacheSettings,
    part: Part,
    source: Source,
    encoder: Encoder,
    progress: Progress,
) -> int:
    """Write the shards of a part that are missing, and return how many samples went through the VAE."""
    ranges = shard_ranges(settings.num_samples, settings.shard_samples)
    mine = part.shards(len(ranges))
    done = finished_shards(request.out, settings)
    missing = [index for index in mine if shard_name(index, len(ranges)) not in done]
    total = sum(len(ranges[index]) for index in mine)
    num_done = total - sum(len(ranges[index]) for index in missing)
    check_space(request.out, sum(len(ranges[index]) for index in missing) * settings.row_bytes)
    if missing and num_done:
        log.info("going on: %d of %d shards of this part are there", len(mine) - len(missing), len(mine))
    progress(num_done, total)
    num_encoded = 0
    for index in missing:
        known = bad_counts(finished_shards(request.out, settings))  # other processes' too

        def on_bad(bad: Counter[str], known: Counter[str] = known) -> None:
            check_share(known + bad, settings.num_samples, request.max_bad, request.source)

        def on_samples(count: int) -> None:
            nonlocal num_done
            num_done += count
            progress(num_done, total)

        name = shard_name(index, len(ranges))
        with writing(request.out / name):
            facts = write_shard(request.out / name, ranges[index], source, encoder, settings, on_bad, on_samples)
            finish_shard(request.out, name, facts)
        num_encoded += facts.rows
    check_share(
        bad_counts(finished_shards(request.out, settings)), settings.num_samples, request.max_bad, request.source
    )
    return num_encoded
