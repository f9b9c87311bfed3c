"""Do the losses earn their keep? Equal steps on the toy world, one objective after the other, three seeds each.

    python benchmarks/ablation.py [--jobs 2] [--only bk_tiny] [--steps 100]

For ``bk_base`` and ``bk_tiny`` of the toy teacher: random weights and the task; the teacher's weights and the task;
then its predictions besides; its activations besides; these divided by their power; and that at a tenth of the weight,
as the run file has it. A job is a run of
``examples/runs/toy_bk_tiny.yaml`` with other keys, in a process of its own; its JSON is kept in
``benchmarks/results/ablation``, and a job that has one for the same settings is not run again. At the end
``docs/ablation.md`` and its picture are written from whatever is there.

Each student (its average) is judged three ways: how often the checker finds its pictures of held-out captions right;
how far its predictions are from the teacher's on fixed held-out noisy latents, relative to the teacher's power; and the
Fréchet distance of its pictures to real ones of the same captions on *pooled VAE latents*: the means that the toy
teacher's own VAE encodes them to, averaged over 2 × 2 (64 numbers). That feature is this benchmark's own: the
number compares rows of this table, and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from measure import machine

from unet_surgery.errors import SurgeryError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "toy_world"))

RUN = ROOT / "examples" / "runs" / "toy_bk_tiny.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "ablation"
DOCS = ROOT / "docs"
RECIPES = ("bk_base", "bk_tiny")
SEEDS = (0, 1, 2)
FEATURE = "pooled VAE latents"
POLL_SECONDS = 0.2
BARS_LEFT, BARS_WIDTH = 250, 400
"""Where the bars of the picture begin, and how long one of 100 % is, in pixels."""

VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "random-task": (
        "random weights; task",
        ("init=random", "objectives={task: 1.0, output_kd: 0, feature_kd: 0}"),
    ),
    "task": ("the teacher's weights; task", ("objectives={task: 1.0, output_kd: 0, feature_kd: 0}",)),
    "output": ("+ output", ("objectives={task: 1.0, output_kd: 1.0, feature_kd: 0}",)),
    "features": (
        "+ output + features",
        ("objectives={task: 1.0, output_kd: 1.0, feature_kd: {weight: 1.0, pairs: bk, normalise: none}}",),
    ),
    "normalised": (
        "+ output + normalised features",
        ("objectives={task: 1.0, output_kd: 1.0, feature_kd: {weight: 1.0, pairs: bk, normalise: teacher_power}}",),
    ),
    "normalised-tenth": (
        "+ output + 0.1 normalised features",
        ("objectives={task: 1.0, output_kd: 1.0, feature_kd: {weight: 0.1, pairs: bk, normalise: teacher_power}}",),
    ),
}
"""Name → what the table calls it, and the run's changes: each differs from the one before in one thing."""

UNTRAINED, ITSELF = "pruned", "itself"


@dataclass(frozen=True, slots=True)
class Settings:
    """What all jobs share, and what makes a kept result another one."""

    teacher: str = "toy"
    steps: int = 200
    batch: int = 32
    captions: int = 120
    """Of one object, and as many of two."""
    sampling_steps: int = 12
    guidance: float = 2.0
    noisy: int = 512
    """Noisy latents on which predictions are compared."""


@dataclass(frozen=True, slots=True)
class Job:
    """A student: a recipe, what it is trained with (or ``pruned``), and the run's seed; or the teacher ``itself``."""

    recipe: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.variant}-{self.seed}"

    def changes(self, settings: Settings) -> tuple[str, ...]:
        """Return what of the run file is other."""
        return (
            *VARIANTS[self.variant][1],
            f"teacher={settings.teacher}",
            f"seed={self.seed}",
            f"steps={settings.steps}",
            f"batch={settings.batch}",
            "optimizer.warmup=" + str(min(20, settings.steps // 2)),
        )


def main(words: Sequence[str] | None = None) -> int:
    options = parse_options(words)
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    try:
        return run_or_report(options, settings)
    except SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run_or_report(options: argparse.Namespace, settings: Settings) -> int:
    """Do one job, or all that have no result yet and then the table."""
    if options.job is not None:
        run_job(job_of(options.job), settings, options.results, options.work)
        return 0
    teacher_digest(settings.teacher)  # where there is none, one error is better than as many as there are jobs
    jobs = [job for job in all_jobs() if not options.only or any(part in job.name for part in options.only)]
    failed = run_all([job for job in jobs if kept(job, settings, options.results) is None], settings, options)
    results = [found for job in all_jobs() if (found := kept(job, settings, options.results)) is not None]
    if results:
        write_docs(results, settings, options.docs)
        print(f"{len(results)} of {len(all_jobs())} results are in {options.docs / 'ablation.md'}")
    for name in failed:
        print(f"failed: {name}; see {options.work / name}.log", file=sys.stderr)
    return 1 if failed else 0


def parse_options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; each gets its share of the cores")
    parser.add_argument("--only", action="append", help="part of a job's name, such as bk_tiny or -task-; repeatable")
    for name, field in Settings.__dataclass_fields__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(field.default), default=field.default)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--work", type=Path, default=Path("local-ablation"), help="runs that are not finished")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args(words)


# -- the list ----------------------------------------------------------------------------------------------------------


def all_jobs() -> list[Job]:
    """Return every job, all variants of a seed before the next seed: a list broken off is still a comparison."""
    untrained = [Job("teacher", ITSELF, 0), *(Job(recipe, UNTRAINED, 0) for recipe in RECIPES)]
    return untrained + [Job(recipe, variant, seed) for seed in SEEDS for recipe in RECIPES for variant in VARIANTS]


def job_of(name: str) -> Job:
    """Return the job of a name."""
    return next(job for job in all_jobs() if job.name == name)


def key(job: Job, settings: Settings) -> str:
    """Return a digest of all that a result depends on, but for the code."""
    changes = job.changes(settings) if job.variant in VARIANTS else ()
    said = [asdict(job), asdict(settings), changes, RUN.read_text("utf-8"), teacher_digest(settings.teacher)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


@cache
def teacher_digest(name: str) -> str:
    """Return a digest of the teacher's U-Net."""
    from unet_surgery.checkpoint.check import unet_folder
    from unet_surgery.distill.identity import fingerprint
    from unet_surgery.hub import fetch_teacher, resolve_teacher

    return fingerprint(unet_folder(fetch_teacher(resolve_teacher(name), progress=lambda _done, _all: None).folder))


def kept(job: Job, settings: Settings, results: Path) -> dict[str, Any] | None:
    """Return the result of a job if it was run with these settings."""
    path = results / f"{job.name}.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found if found["key"] == key(job, settings) else None


def run_all(jobs: Sequence[Job], settings: Settings, options: argparse.Namespace) -> list[str]:
    """Run the jobs, ``options.jobs`` at a time, each in a process of its own; return the names of those that failed."""
    options.work.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = list(jobs), dict[str, subprocess.Popen[bytes]](), list[str]()
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                job = waiting.pop(0)
                running[job.name] = _start(job, settings, options)
            time.sleep(POLL_SECONDS)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    failed += [name] if process.returncode else []
                    print(f"{name}: {'failed' if process.returncode else 'done'}; {len(waiting)} to go", flush=True)
    finally:
        for process in running.values():  # a run that is told to stop saves, and goes on next time
            process.terminate()
            process.wait()
    return failed


def _start(job: Job, settings: Settings, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    words = [sys.executable, __file__, "--job", job.name, "--results", options.results, "--work", options.work]
    for name, value in asdict(settings).items():
        words += [f"--{name.replace('_', '-')}", value]
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // options.jobs)))
    with (options.work / f"{job.name}.log").open("wb") as log:
        return subprocess.Popen(
            [str(word) for word in words],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            start_new_session=True,  # Ctrl-C is for this process: a second signal would end a run that is saving
        )


# -- a job -------------------------------------------------------------------------------------------------------------


def run_job(job: Job, settings: Settings, results: Path, work: Path) -> None:
    """Prune, train, judge, and keep the numbers; what was trained is thrown away."""
    import torch

    import unet_surgery as us

    started, cpu = time.monotonic(), time.process_time()
    folder = work / job.name
    folder.mkdir(parents=True, exist_ok=True)
    student, metrics = settings.teacher, list[dict[str, Any]]()
    if job.variant != ITSELF:
        student = str(us.prune(job.recipe, settings.teacher, folder / "student", force=True).folder)
    if job.variant in VARIANTS:
        student, metrics = _train(job, settings, student, folder / "run")
    trained, trained_cpu = time.monotonic() - started, time.process_time() - cpu
    found = {
        "job": job.name,
        **asdict(job),
        "key": key(job, settings),
        "settings": asdict(settings),
        **judged(student, settings),
        "metrics": metrics,
        "training_seconds": round(trained, 1),
        "training_cpu_seconds": round(trained_cpu, 1),
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    results.mkdir(parents=True, exist_ok=True)
    part = results / f"{job.name}.json.part"
    part.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    part.replace(results / f"{job.name}.json")
    shutil.rmtree(folder)


def _train(job: Job, settings: Settings, student: str, output: Path) -> tuple[str, list[dict[str, Any]]]:
    """Train, or go on where the job was broken off."""
    from unet_surgery.distill import distill, load_run

    changes = (*job.changes(settings), f"student={student}", f"output={output}")
    result = distill(load_run(RUN, changes).config)
    if result.student is None:
        raise SystemExit(f"stopped after step {result.step}")
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    return str(result.student), [json.loads(line) for line in lines]


def judged(student: str, settings: Settings) -> dict[str, Any]:
    """Return scores, Fréchet distance and output error of a student's pipeline."""
    from score import captions_of, drawing, load_pipeline, tally

    from unet_surgery.evaluate.frechet import frechet_distance
    from unet_surgery.toyworld.draw import draw_many
    from unet_surgery.toyworld.grammar import parse

    unet, parts = load_pipeline(student)
    teacher, _ = load_pipeline(settings.teacher)
    captions = captions_of("one", settings.captions) + captions_of("two", settings.captions)
    pictures = drawing(unet, parts, steps=settings.sampling_steps, guidance=settings.guidance)(captions, 0)
    real = draw_many([parse(text) for text in captions], range(len(captions)))
    return {
        "scores": tally(pictures, captions),
        "frechet": frechet_distance(*pooled_moments(parts.vae, pictures), *pooled_moments(parts.vae, real)),
        "frechet_feature": FEATURE,
        "output_error": output_error(unet, teacher, parts, settings.noisy),
    }


def pooled_moments(vae: Any, pictures: Any) -> tuple[Any, Any]:
    """Return mean [64] and covariance [64, 64] of a feature of pictures, uint8 [n, 32, 32, 3].

    It is the VAE's means, scaled, averaged over 2 × 2.
    """
    import numpy as np
    import torch

    from unet_surgery.data.encode import encode_moments
    from unet_surgery.evaluate.frechet import Moments

    moments = Moments()
    for start in range(0, len(pictures), 256):
        pixels = torch.from_numpy(np.ascontiguousarray(pictures[start : start + 256])).permute(0, 3, 1, 2)
        mean_BCHW = encode_moments(vae, pixels.float() / 127.5 - 1).chunk(2, dim=1)[0]
        pooled = torch.nn.functional.avg_pool2d(mean_BCHW * vae.config.scaling_factor, 2)
        moments.add(pooled.flatten(1))
    return moments.mean_and_covariance()


def output_error(student: Any, teacher: Any, parts: Any, count: int) -> float:
    """Return Σ(student − teacher)² / Σ teacher² of predictions at held-out pictures with fixed noise, at all times."""
    import torch

    from unet_surgery.data.encode import encode_moments
    from unet_surgery.data.toy import ToyPictures
    from unet_surgery.distill.diffusion import NoiseSchedule
    from unet_surgery.runtime.parts import encode_prompts

    samples = ToyPictures(parts.tokenizer, count, 0, split="held_out")
    schedule = NoiseSchedule.from_config(parts.scheduler_config)
    noise = torch.Generator().manual_seed(0)
    apart = power = 0.0
    with torch.no_grad():
        for start in range(0, count, 64):
            numbers = range(start, min(start + 64, count))
            pixels, ids = samples.batch(numbers)
            latents = encode_moments(parts.vae, pixels).chunk(2, dim=1)[0] * parts.vae.config.scaling_factor
            places = torch.tensor([number * 0.6180339887 % 1 for number in numbers])  # evenly spread, in any order
            timesteps = (places * schedule.num_timesteps).long()
            noisy = schedule.add_noise(latents, torch.randn(latents.shape, generator=noise), timesteps)
            embeds = encode_prompts(parts, ids)
            ours, theirs = (unet(noisy, timesteps, embeds, return_dict=False)[0] for unet in (student, teacher))
            apart += float((ours - theirs).double().square().sum())
            power += float(theirs.double().square().sum())
    return apart / power


# -- the table ---------------------------------------------------------------------------------------------------------


def write_docs(results: Sequence[Mapping[str, Any]], settings: Settings, docs: Path) -> None:
    """Write the table as Markdown, and the accuracies as a picture beside it."""
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "ablation.md").write_text(markdown(results, settings), "utf-8")
    (docs / "ablation.svg").write_text(picture(results), "utf-8")


def markdown(results: Sequence[Mapping[str, Any]], settings: Settings) -> str:
    """Return the page: means over seeds, with the smallest and the largest."""
    judged_how = (__doc__ or "").split("\n\n")[3].strip()
    what = (
        f"Students of the toy teacher after {settings.steps} steps of {settings.batch} samples: means over seeds, in "
        "brackets the smallest and the largest. `benchmarks/ablation.py` wrote this."
    )
    accuracy = (
        f"Accuracy is of {settings.captions} held-out captions of one object and as many of two, drawn in "
        f"{settings.sampling_steps} steps."
    )
    accuracy += "".join(_of_teacher(r) for r in results if r["variant"] == ITSELF)
    shown = "![how many pictures are right, by what the students were trained with](ablation.svg)"
    lines = [f"# Do the losses earn their keep?\n\n{what}\n\n{judged_how}\n\n{accuracy}\n\n{shown}"]
    for recipe in RECIPES:
        columns = f"right, one | right, two | output error | Fréchet distance on {FEATURE}"
        lines += [
            "",
            f"## {recipe}",
            "",
            f"| | trained with | seeds | {columns} |",
            "|---:|---|---:|---:|---:|---:|---:|",
        ]
        for number, (variant, title) in enumerate(_rows()):
            rows = [r for r in results if r["recipe"] == recipe and r["variant"] == variant]
            if rows:
                lines.append(_line(number, title, rows))
    seconds = [r["training_cpu_seconds"] for r in results if r["variant"] in VARIANTS]
    if seconds:
        machines = sorted({f"{r['machine']}, {r['threads']} threads a job" for r in results})
        lines += ["", f"A training took {min(seconds):.0f} to {max(seconds):.0f} CPU seconds ({'; '.join(machines)})."]
    return "\n".join(lines) + "\n"


def _of_teacher(result: Mapping[str, Any]) -> str:
    scores = result["scores"]
    return (
        f" The teacher itself: {scores['one']['right']:.1%} and {scores['two']['right']:.1%} right, Fréchet distance "
        f"{result['frechet']:.2f}."
    )


def _rows() -> list[tuple[str, str]]:
    return [(UNTRAINED, "pruned, not trained"), *((name, title) for name, (title, _) in VARIANTS.items())]


def _line(number: int, title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        _range([100 * r["scores"]["one"]["right"] for r in rows], "{:.1f} %"),
        _range([100 * r["scores"]["two"]["right"] for r in rows], "{:.1f} %"),
        _range([r["output_error"] for r in rows], "{:.4f}"),
        _range([r["frechet"] for r in rows], "{:.2f}"),
    ]
    return f"| {number} | {title} | {len(rows)} | {' | '.join(cells)} |"


def _range(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.fmean(values))
    if len(values) == 1:
        return mean
    bare = form.removesuffix(" %")
    return f"{mean} ({bare.format(min(values))} to {bare.format(max(values))})"


def picture(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the accuracies as an SVG file: a bar for each row of each table, its length the mean over seeds.

    A line through its end leads from the smallest of the seeds to the largest.
    """
    from unet_surgery.picture.palette import FONTS

    lines, y = list[str](), 0
    for recipe in RECIPES:
        y += 28
        lines.append(f'<text class="head" x="0" y="{y}">{recipe}: pictures that are right</text>')
        for variant, title in _rows():
            rows = [r for r in results if r["recipe"] == recipe and r["variant"] == variant]
            if rows:
                y += 24
                lines += _bar(title, [r["scores"]["all"]["right"] for r in rows], y)
        y += 8
    style = (
        f"text{{font:13px {FONTS};fill:#37414b}}.head{{font-weight:600}}.value{{text-anchor:end}}.bar{{fill:#2f6fb0}}"
        ".range{stroke:#b3590f;stroke-width:2}@media (prefers-color-scheme:dark){text{fill:#c3ccd5}.bar{fill:#6fb1f2}"
        ".range{stroke:#f0a35e}}"
    )
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {BARS_LEFT + BARS_WIDTH + 70} {y}">'
    return "\n".join([start, f"<style>{style}</style>", *lines, "</svg>"]) + "\n"


def _bar(title: str, shares: Sequence[float], y: int) -> list[str]:
    """Return a row of the picture whose text stands on ``y``."""
    low, mean, high = (BARS_WIDTH * share for share in (min(shares), statistics.fmean(shares), max(shares)))
    right = BARS_LEFT + BARS_WIDTH + 66
    line = f'<path class="range" d="M{BARS_LEFT + low:.1f} {y - 5}H{BARS_LEFT + high:.1f}"/>' if high > low else ""
    return [
        f'<text x="0" y="{y}">{title}</text>',
        f'<rect class="bar" x="{BARS_LEFT}" y="{y - 12}" width="{mean:.1f}" height="14"/>{line}',
        f'<text class="value" x="{right}" y="{y}">{statistics.fmean(shares):.1%}</text>',
    ]


if __name__ == "__main__":
    raise SystemExit(main())
