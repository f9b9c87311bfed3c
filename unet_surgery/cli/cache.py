"""``unet-surgery cache``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.options import Quiet
from unet_surgery.cli.processes import own_device, part_of_work
from unet_surgery.cli.sink import command, progress_bar, say, show
from unet_surgery.errors import UsageError

if TYPE_CHECKING:
    from unet_surgery.data.cache import CacheResult

__all__ = ["cache"]


@command
def cache(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A folder with metadata.csv or metadata.jsonl, tars (a folder, or shards/{00000..00041}.tar), what "
            "the library datasets saved, or a Hub dataset: \\[hub:]org/name\\[@revision]."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The pipeline whose VAE and tokenizer encode: a diffusers folder, a Hub id "
            "org/name\\[@revision], or a built-in name: toy, tiny-random, …",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The cache's folder.")] = None,
    resolution: Annotated[
        int | None,
        typer.Option(help="Pictures become squares of this side, from their middle. Default: the model's own."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures that go through the VAE at once.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="What the VAE runs in: fp32 or bf16.")] = "fp32",
    max_bad: Annotated[
        float, typer.Option("--max-bad", min=0, max=1, help="The share of samples that may be unusable.")
    ] = 0.01,
    flip: Annotated[bool, typer.Option("--flip", help="Encode every picture's mirror image as well.")] = False,
    shard_samples: Annotated[int, typer.Option("--shard-samples", help="Samples a file.")] = 4096,
    caption_column: Annotated[
        str, typer.Option("--caption-column", help="The column, or JSON key, of captions.")
    ] = "text",
    limit: Annotated[int | None, typer.Option(help="Take only the first samples of the source.")] = None,
    split: Annotated[str, typer.Option(help="Of a dataset with several splits.")] = "train",
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help="Take only samples whose metadata says so: score>=6.5, style=='photo'. Several: all of them.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes on this machine; each takes a GPU of its own.")] = 1,
    part: Annotated[
        str | None,
        typer.Option(
            help="i/n, from 1/n to n/n: one of n such commands that share the work. Default: RANK, WORLD_SIZE."
        ),
    ] = None,
    decoders: Annotated[int, typer.Option(help="Threads that decode pictures, for each process.")] = 4,
    check: Annotated[
        Path | None,
        typer.Option("--check", help="Compare this finished cache with the hashes of its making, and stop."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Encode training pictures once, for distillation: latents, token ids and captions in one folder. Needs torch.

    It writes what datasets.load_from_disk opens. A run that was stopped goes on when the same command is given again.
    Samples that cannot be used are left out, and listed with reasons in quarantine.jsonl.

    Example: unet-surgery cache ./pictures --model tiny-random --out ./latents
    """
    if check is not None:
        _check(check, quiet)
        return
    if source is None or model is None or out is None:
        raise UsageError("a source, --model and --out are needed", hint="unet-surgery cache --help")
    index, count = part_of_work(part)
    from unet_surgery.data.cache import make_cache

    with progress_bar("encoding", quiet, of_bytes=False) as progress:
        result = make_cache(
            source,
            model,
            out,
            resolution=resolution,
            batch=batch,
            device=own_device(device),
            dtype=dtype,
            max_bad=max_bad,
            flip=flip,
            shard_samples=shard_samples,
            caption_column=caption_column,
            limit=limit,
            split=split,
            filters=filters or (),
            part=(index, count),
            workers=workers,
            decoders=decoders,
            progress=progress,
        )
    show(str(out))
    if not quiet:
        _tell(result)


def _check(folder: Path, quiet: bool) -> None:
    from unet_surgery.data.latents import check_cache

    with progress_bar("reading", quiet) as progress:
        report = check_cache(folder, progress=progress)
    if not quiet:
        from unet_surgery.cli.format import gigabytes

        size = gigabytes(report.num_bytes)
        show(f"{folder}: {report.num_samples} samples in {report.num_shards} shards, {size}, as they were written")


def _tell(result: CacheResult) -> None:
    from unet_surgery.cli.format import gigabytes

    bad = sum(result.bad.values())
    if result.num_filtered:
        say(f"--filter left out {result.num_filtered}")
    each = f", {result.num_bytes / result.num_samples / 1024:.1f} KiB each" if result.num_samples else ""
    say(f"{result.num_samples} samples, {gigabytes(result.num_bytes)}{each}; {result.num_encoded} encoded now")
    if bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(result.bad.items()))
        say(f"left out {bad}: {reasons}" + ("; see quarantine.jsonl" if result.finished else ""))
    if not result.finished:
        say(
            f"{result.num_shards_done} of {result.num_shards} shards are there; "
            "the part that is done last completes the cache"
        )
