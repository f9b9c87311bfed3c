"""Scoring a folder of pictures: everything is checked first, then each network runs over them once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from unet_surgery.checkpoint.disk import Progress
from unet_surgery.data.shards import choose_device
from unet_surgery.errors import DataError, SurgeryError, UsageError, printable
from unet_surgery.evaluate.clip import Fit, load_clip
from unet_surgery.evaluate.features import Compute, Features, caption_cosines, inception_features
from unet_surgery.evaluate.frechet import frechet_distance
from unet_surgery.evaluate.kernel import kernel_distance
from unet_surgery.evaluate.metrics import METRICS, Metric, Score, ScoreReport, chosen_metrics
from unet_surgery.evaluate.pictures import PictureFolder, batches, captions_of, survey
from unet_surgery.evaluate.reference import Reference, check_enough, load_inception, open_reference
from unet_surgery.evaluate.spread import inception_score
from unet_surgery.evaluate.toy import check_toy, shares, verdicts
from unet_surgery.evaluate.weights import CLIP, HPS, HPS_V21, Known, Weights, find_inception, find_weights
from unet_surgery.sample.generated import GENERATION_FILE, UNFINISHED, read_generation
from unet_surgery.sample.interval import wilson
from unet_surgery.toyworld.checker import Verdict
from unet_surgery.version import __version__

__all__ = ["score"]

FEW_PICTURES = 10_000
CHUNK = 80  # pictures of which hpsv2 takes means, for its standard deviation

CLIPS: dict[str, tuple[Known, str, Fit]] = {
    "clip": (CLIP, "ViT-g-14", "crop"),
    "hpsv2": (HPS, "ViT-H-14", "pad"),
    "hpsv2.1": (HPS_V21, "ViT-H-14", "pad"),
}
"""Metric → its weights, the architecture of a file that does not say its own, how pictures are fitted."""


@dataclass(frozen=True, slots=True)
class _Job:
    """All that was decided before anything is computed."""

    metrics: tuple[Metric, ...]
    pictures: PictureFolder
    generation: dict[str, Any] | None
    captions: list[str]
    reference: Reference | None
    weights: dict[str, Weights]
    refused: dict[str, str]
    compute: Compute

    def wants(self, name: str) -> bool:
        return any(metric.name == name for metric in self.metrics)


def score(
    images: str | Path,
    metrics: Sequence[str] = ("fid", "is"),
    *,
    reference: str | Path | None = None,
    reference_resolution: int | None = None,
    inception: str | Path | None = None,
    clip: str | Path | None = None,
    hps: str | Path | None = None,
    tokenizer: str | Path | None = None,
    weights_sha256: str | None = None,
    batch: int = 50,
    device: str = "auto",
    dtype: str = "fp32",
    decoders: int = 4,
    progress: Progress | None = None,
) -> ScoreReport:
    """Score the pictures of a folder, by the protocols that published numbers came from.

    ``metrics`` are of ``fid``, ``is``, ``kid``, ``clip``, ``hpsv2``, ``hpsv2.1`` and ``toy``. ``reference`` is a folder
    of pictures or a file of statistics (``fid``; ``kid`` needs a folder); ``reference_resolution`` is the side of its
    pictures, where statistics do not record it. ``inception``, ``clip`` and ``hps`` are paths to weights; without them
    PyTorch's cache is looked into, or the Hub is asked. ``progress`` is called with pictures done and in all, of all
    networks. A metric for which the pictures, or the reference's, are too few is refused, and the others go on.

    Raises:
        UsageError: an argument has a wrong value, or a metric lacks what it needs.
        DataError: pictures, captions or reference cannot be read or do not fit together.
        TeacherError, HubError: weights are missing, damaged or not those that they should be.
        MissingExtraError: a caption needs ftfy, and it is not installed.
    """
    chosen = chosen_metrics(metrics, reference=reference, reference_resolution=reference_resolution)
    generation = _generation(Path(images))  # first: of a folder that is not finished it says so
    pictures = survey(Path(images), decoders=decoders)
    _check_told(generation, pictures)
    kept, refused = _without(chosen, _small(chosen, len(pictures), str(pictures.folder)))
    captions = captions_of(pictures) if any(metric.captions for metric in kept) else []
    if any(metric.name == "toy" for metric in kept):
        check_toy(pictures, captions)
    compared = _reference(kept, reference, reference_resolution, pictures, decoders)
    if compared is not None:
        kept, too_few = _without(kept, _small_reference(kept, compared, str(reference)))
        refused |= {name: f"of the reference, {why}" for name, why in too_few.items()}
        compared = compared if any(metric.reference != "none" for metric in kept) else None
    weights = _weights(kept, inception=inception, clip=clip, hps=hps, tokenizer=tokenizer, sha256=weights_sha256)
    if compared is not None and compared.statistics is not None and "inception" in weights:
        _check_same_network(compared, weights["inception"])
    passes = _num_passes(kept, pictures, compared)
    compute = Compute(choose_device(device), dtype, batch, decoders, _counting(progress, passes))
    job = _Job(kept, pictures, generation, captions, compared, weights, refused, compute)
    scores = {found.protocol["asked_for"]: found for found in (*_inception_scores(job), *_caption_scores(job))}
    return ScoreReport(
        _images(pictures, generation),
        tuple(scores[metric.name] for metric in kept),
        refused,
        tuple(_warnings(job)),
    )


def _generation(folder: Path) -> dict[str, Any] | None:
    """Return what generation.json says, if there is one, or should be one."""
    if not (folder / GENERATION_FILE).exists() and not (folder / UNFINISHED).exists():
        return None
    return read_generation(folder)


def _check_told(generation: Mapping[str, Any] | None, pictures: PictureFolder) -> None:
    """Compare what generation.json says with what lies there."""
    if generation is None:
        return
    told = (generation.get("images"), generation.get("width"), generation.get("height"))
    real = (len(pictures), pictures.width, pictures.height)
    if told != real:
        raise DataError(
            "the pictures are not those that generation.json tells of",
            where=str(pictures.folder / GENERATION_FILE),
            expected=printable(f"{told[0]} pictures of {told[1]}×{told[2]}"),
            found=f"{real[0]} pictures of {real[1]}×{real[2]}",
        )


def _without(chosen: Sequence[Metric], errors: Mapping[str, SurgeryError]) -> tuple[tuple[Metric, ...], dict[str, str]]:
    """Return the metrics that have no error, and for the others in words why not.

    Raises:
        DataError: all have one.
    """
    kept = tuple(metric for metric in chosen if metric.name not in errors)
    if not kept:
        raise next(iter(errors.values()))
    return kept, {name: f"{error.what}: {error.found} of {error.expected}" for name, error in errors.items()}


def _small(metrics: Sequence[Metric], count: int, where: str) -> dict[str, SurgeryError]:
    """Return the metrics that so many pictures are not enough for, and the error of each."""
    return {metric.name: _too_few(metric, count, where) for metric in metrics if count < metric.min_pictures}


def _small_reference(kept: Sequence[Metric], reference: Reference, where: str) -> dict[str, SurgeryError]:
    comparing = [metric for metric in kept if metric.reference != "none"]
    return {} if reference.count is None else _small(comparing, reference.count, where)


def _too_few(metric: Metric, count: int, where: str) -> SurgeryError:
    if metric.name == "fid":
        try:
            check_enough(count, where)
        except DataError as error:
            return error
    return DataError(
        f"too few pictures for {metric.name}",
        where=where,
        expected=f"{metric.min_pictures:,} or more",
        found=f"{count:,}",
    )


def _reference(
    kept: Sequence[Metric], text: str | Path | None, resolution: int | None, pictures: PictureFolder, decoders: int
) -> Reference | None:
    if text is None or all(metric.reference == "none" for metric in kept):
        return None
    found = open_reference(text, resolution, decoders=decoders)
    if found.resolution != (pictures.width, pictures.height):
        raise DataError(
            "pictures and reference have different resolutions",
            where=str(text),
            expected=f"{pictures.width}×{pictures.height}, as {pictures.folder} has",
            found=f"{found.resolution[0]}×{found.resolution[1]}",
            hint="unet-surgery stats --resize brings a reference to one size",
        )
    return found


def _weights(
    kept: Sequence[Metric],
    *,
    inception: str | Path | None,
    clip: str | Path | None,
    hps: str | Path | None,
    tokenizer: str | Path | None,
    sha256: str | None,
) -> dict[str, Weights]:
    """Return network → its weights, all of them there."""
    names = {metric.name for metric in kept}
    found: dict[str, Weights] = {}
    if any(metric.network == "inception" for metric in kept):
        found["inception"] = find_inception(inception, sha256=sha256)
    if hps is not None and {"hpsv2", "hpsv2.1"} <= names:
        raise UsageError("--hps names one file, and hpsv2 and hpsv2.1 have one each", hint="ask for one at a time")
    for name, path in (("clip", clip), ("hpsv2", hps), ("hpsv2.1", hps)):
        if name in names:
            found[name] = find_weights(CLIPS[name][0], path, tokenizer=tokenizer)
    return found


def _check_same_network(reference: Reference, weights: Weights) -> None:
    statistics = reference.statistics
    if statistics is not None and statistics.weights_sha256 not in (None, weights.sha256):
        raise DataError(
            "the statistics were made with other weights",
            where=reference.name,
            expected=f"sha256 {weights.sha256}",
            found=statistics.weights_sha256,
        )


def _num_passes(kept: Sequence[Metric], pictures: PictureFolder, reference: Reference | None) -> int:
    """Return how many pictures go through a network or the checker."""
    networks = {metric.network or metric.name for metric in kept}
    others = 0 if reference is None or reference.pictures is None else len(reference.pictures)
    return len(networks) * len(pictures) + others


def _counting(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return step


def _inception_scores(job: _Job) -> list[Score]:
    if "inception" not in job.weights:
        return []
    net = load_inception(job.weights["inception"], job.compute)
    fid, spread, kid = (job.wants(name) for name in ("fid", "is", "kid"))
    drawn = inception_features(net, job.pictures, job.compute, moments=fid, pool3=kid, logits=spread)
    others = Features()
    if job.reference is not None and job.reference.pictures is not None:
        others = inception_features(net, job.reference.pictures, job.compute, moments=fid, pool3=kid)
        job = replace(job, reference=replace(job.reference, sha256=others.sha256))
    scores = []
    if fid:
        assert job.reference is not None
        known = job.reference.statistics
        mu_D, sigma_DD = others.moments.mean_and_covariance() if known is None else (known.mu_D, known.sigma_DD)
        try:
            distance = frechet_distance(*drawn.moments.mean_and_covariance(), mu_D, sigma_DD)
        except ValueError as error:
            raise DataError(
                "the reference's statistics are no normal distribution", where=job.reference.name, found=str(error)
            ) from error
        scores.append(_score(job, "fid", distance, None))
    if spread:
        assert drawn.logits_NC is not None
        scores.append(_score(job, "is", *inception_score(drawn.logits_NC)))
    if kid:
        assert drawn.pool3_ND is not None
        assert others.pool3_ND is not None
        scores.append(_score(job, "kid", *kernel_distance(drawn.pool3_ND, others.pool3_ND)))
    return scores


def _caption_scores(job: _Job) -> list[Score]:
    scores = []
    for metric in job.metrics:
        if metric.name == "toy":
            scores.append(_toy_score(job))
        elif metric.name in CLIPS:
            weights = job.weights[metric.name]
            _, default, fit = CLIPS[metric.name]
            model = load_clip(weights, fit, default=default, device=job.compute.device)
            cosines_N = caption_cosines(model, job.pictures, job.captions, job.compute)
            del model
            scores.append(_of_cosines(job, metric, cosines_N))
    return scores


def _of_cosines(job: _Job, metric: Metric, cosines_N: Any) -> Score:
    count = len(cosines_N)
    if metric.name == "clip":
        error = float(np.std(cosines_N, ddof=1) / count**0.5) if count > 1 else None
        return _score(job, metric.name, float(cosines_N.mean()), error)
    means = [float(cosines_N[i : i + CHUNK].mean()) for i in range(0, count, CHUNK)]
    return _score(
        job, metric.name, 100 * float(cosines_N.mean()), 100 * float(np.std(means)) if len(means) > 1 else None
    )


def _toy_score(job: _Job) -> Score:
    found: list[Verdict] = []
    for batch_BHW3 in batches(job.pictures, job.compute.batch, decoders=job.compute.decoders):
        found += verdicts(batch_BHW3, job.captions[len(found) : len(found) + len(batch_BHW3)])
        job.compute.step(len(batch_BHW3))
    right = sum(verdict.right for verdict in found)
    attributes = {"attributes": shares(found)}
    return _score(job, "toy", right / len(found), None, interval=wilson(right, len(found)), more=attributes)


def _score(
    job: _Job,
    name: str,
    value: float,
    error: float | None,
    *,
    interval: tuple[float, float] | None = None,
    more: dict[str, Any] | None = None,
) -> Score:
    metric = next(metric for metric in job.metrics if metric.name == name)
    weights = None if metric.network is None else job.weights["inception" if metric.network == "inception" else name]
    published = weights is None or weights.published
    used = metric.reference != "none" and job.reference is not None
    libraries = ("torch", "numpy", "pillow", *(("transformers",) if name in CLIPS else ()))
    protocol = {
        "asked_for": name,
        "implementation": metric.implementation,
        "weights": weights and {"name": weights.name, "sha256": weights.sha256, "published": published},
        "reference": job.reference.to_json() if used and job.reference is not None else None,
        "resolution": [job.pictures.width, job.pictures.height],
        "resize": metric.resize,
        "count": len(job.pictures),
        "error_is": metric.error if error is not None or interval is not None else None,
        "dtype": job.compute.dtype if name not in CLIPS and weights is not None else "fp32",
        "device": job.compute.device.type,
        "generation": _drawn_with(job.generation),
        "versions": {"unet_surgery": __version__, **{library: version(library) for library in libraries}},
        **(more or {}),
    }
    return Score(metric.called(published), value, error, protocol, interval)


def _drawn_with(generation: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what of the generation decides a score, to stand beside it."""
    if generation is None:
        return None
    scheduler = generation.get("scheduler")
    name = scheduler.get("class") if isinstance(scheduler, dict) else None
    return {"scheduler": name, **{key: generation.get(key) for key in ("steps", "guidance", "seed", "resize")}}


def _images(pictures: PictureFolder, generation: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "folder": pictures.folder.resolve().name,
        "count": len(pictures),
        "width": pictures.width,
        "height": pictures.height,
        "generation": generation,
    }


def _warnings(job: _Job) -> list[str]:
    """Return what a reader of the scores has to know beside them."""
    told = []
    for name, weights in job.weights.items():
        if name in CLIPS and not weights.published:
            told.append(f"{name} is called {METRICS[name].called(published=False)}: {weights.why}")
    if not job.wants("fid"):
        return told
    for what, count in (("pictures", len(job.pictures)), ("pictures in the reference", _reference_count(job))):
        if count is not None and count < FEW_PICTURES:
            told.append(
                f"{count:,} {what} are few: the Fréchet distance of a sample lies above that of what it is drawn "
                "from, the more the smaller it is; compare it with numbers of the same count only"
            )
    return told


def _reference_count(job: _Job) -> int | None:
    return None if job.reference is None else job.reference.count
