"""``unet-surgery score``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.options import Json, Quiet
from unet_surgery.cli.scoreoptions import Batch, Decoders, Device, FeatureDtype, Inception, WeightsHash
from unet_surgery.cli.sink import command, progress_bar, say, show, show_json, table

if TYPE_CHECKING:
    from rich.table import Table

    from unet_surgery.evaluate.metrics import Score, ScoreReport

__all__ = ["score"]


@command
def score(
    images: Annotated[
        Path, typer.Argument(help="A folder of pictures of one size; metadata.csv holds their captions.")
    ],
    metrics: Annotated[
        str, typer.Option("--metrics", "-m", help="Of fid, is, kid, clip, hpsv2, hpsv2.1 and toy, with commas.")
    ] = "fid,is",
    reference: Annotated[
        str | None,
        typer.Option("--reference", "-r", help="What fid and kid compare with: STATS.npz (fid), or a folder."),
    ] = None,
    reference_resolution: Annotated[
        int | None,
        typer.Option("--reference-resolution", help="The side of its pictures, where STATS.npz does not record it."),
    ] = None,
    inception: Inception = None,
    clip: Annotated[
        str | None,
        typer.Option("--clip", help="Weights of ViT-g-14 laion2b_s34b_b88k: a file or folder. Default: from the Hub."),
    ] = None,
    hps: Annotated[
        str | None, typer.Option("--hps", help="Weights of HPSv2, or of v2.1: a file. Default: from the Hub.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="A folder with vocab.json and merges.txt, where --clip or --hps has none."),
    ] = None,
    weights_sha256: WeightsHash = None,
    batch: Batch = 50,
    device: Device = "auto",
    dtype: FeatureDtype = "fp32",
    decoders: Decoders = 4,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the scores as JSON there as well.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file --out.")] = False,
    card: Annotated[
        Path | None,
        typer.Option("--card", help="Write the scores into the card of the model in this folder as well."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a folder of pictures: FID, IS, KID, CLIP score, HPSv2, by the protocols of published numbers. Needs torch.

    Every score carries its protocol in JSON. A metric has its name only with the published weights. Where pictures are
    too few for a metric, the others are computed, and the exit code is 1.

    Example: unet-surgery score ./pictures --reference coco.npz --metrics fid,is,clip --out scores.json
    """
    import json

    from unet_surgery.checkpoint.scorecard import add_scores, check_card, check_drawn_by
    from unet_surgery.checkpoint.target import check_new_file, write_target
    from unet_surgery.evaluate.metrics import chosen_metrics

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    chosen_metrics(names, reference=reference, reference_resolution=reference_resolution)  # before torch is imported
    if out is not None:
        check_new_file(out, force=force)
    if card is not None:
        check_card(card)
    from unet_surgery.evaluate.score import score as run
    from unet_surgery.sample.generated import GENERATION_FILE, read_generation

    if card is not None and (images / GENERATION_FILE).is_file():
        check_drawn_by(card, read_generation(images))

    with progress_bar("scoring", quiet, of_bytes=False) as progress:
        report = run(
            images,
            names,
            reference=reference,
            reference_resolution=reference_resolution,
            inception=inception,
            clip=clip,
            hps=hps,
            tokenizer=tokenizer,
            weights_sha256=weights_sha256,
            batch=batch,
            device=device,
            dtype=dtype,
            decoders=decoders,
            progress=progress,
        )
    data = report.to_json()
    show_json(data) if as_json else show(_table(report))  # first: hours of work are not lost to a full disk
    if out is not None:
        write_target(out, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(), force=force)
    if card is not None:
        add_scores(card, data)
    _tell(report, quiet)


def _table(report: ScoreReport) -> Table:
    rows = [
        (_name(score), f"{score.value:.4f}", _error(score), str(score.protocol["count"])) for score in report.scores
    ]
    return table(("metric", "value", "±", "pictures"), rows, right=(1, 2, 3))


def _name(score: Score) -> str:
    weights = score.protocol["weights"]
    if weights is None or weights["published"]:
        return score.metric
    return f"{score.metric} (weights {weights['name']}, not the published ones)"


def _error(score: Score) -> str:
    if score.interval is not None:
        return f"{score.interval[0]:.4f}–{score.interval[1]:.4f}"
    return "" if score.error is None else f"{score.error:.4f}"


def _tell(report: ScoreReport, quiet: bool) -> None:
    for warning in () if quiet else report.warnings:
        say(f"note: {warning}")
    for name, why in report.refused.items():
        say(f"error: {name} was not computed: {why}")
    if report.refused:
        raise typer.Exit(1)
