"""How close do students come to their teacher? All three terms, longer, on the toy world.

    python benchmarks/longer_run.py [--steps 1500] [--only bk_tiny]

``bk_base``, ``bk_small`` and ``bk_tiny`` of the toy teacher by the objectives of ``examples/runs/toy_bk_tiny.yaml``,
judged as ``benchmarks/ablation.py`` judges, on more captions. Results are kept in ``benchmarks/results/longer``; what
is there is not run again, and a run that was broken off goes on. ``docs/longer_run.md`` is written from whatever is
there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation import DOCS, FEATURE, ITSELF, ROOT, Job, Settings, kept, run_job

from unet_surgery.errors import SurgeryError

RESULTS = ROOT / "benchmarks" / "results" / "longer"
VARIANT = "normalised-tenth"
JOBS = (Job("teacher", ITSELF, 0), *(Job(recipe, VARIANT, 0) for recipe in ("bk_base", "bk_small", "bk_tiny")))


def main() -> int:
    options = parse_options()
    settings = Settings(steps=options.steps, captions=options.captions, sampling_steps=20)
    try:
        for job in JOBS:
            if options.only in (None, job.recipe) and kept(job, settings, options.results) is None:
                print(f"{job.recipe} …", file=sys.stderr, flush=True)
                run_job(job, settings, options.results, options.work)
    except SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    found = [result for job in JOBS if (result := kept(job, settings, options.results)) is not None]
    text = markdown(found, settings)
    (options.docs / "longer_run.md").write_text(text, "utf-8")
    print(text)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--captions", type=int, default=250, help="of one object, and as many of two")
    parser.add_argument("--only", help="one recipe")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--work", type=Path, default=Path("local-longer"), help="runs that are not finished")
    return parser.parse_args()


def markdown(results: Sequence[Mapping[str, Any]], settings: Settings) -> str:
    """Return the page: a row a network."""
    columns = f"right, one object | right, two objects | output error | Fréchet distance on {FEATURE} | CPU minutes"
    what = (
        f"The toy teacher's students after {settings.steps:,} steps of {settings.batch} samples with the objectives of "
        f"`examples/runs/toy_bk_tiny.yaml`; of {settings.captions} held-out captions of each kind, drawn in "
        f"{settings.sampling_steps} steps, with 95 % Wilson intervals. `benchmarks/longer_run.py` wrote this; the "
        "columns are those of [ablation.md](ablation.md). Each row is a run of its own; that they end so near each "
        "other is this world's doing: at its 8×8 latents the innermost stage and the mid, which they differ in, see "
        "one place."
    )
    lines = [
        "# How close students come",
        "",
        what,
        "",
        f"| | {columns} |",
        "|---|---:|---:|---:|---:|---:|",
        *(_row(result) for result in results),
    ]
    return "\n".join(lines) + "\n"


def _row(result: Mapping[str, Any]) -> str:
    shares = []
    for kind in ("one", "two"):
        low, high = result["scores"][kind]["interval"]
        shares.append(f"{result['scores'][kind]['right']:.1%} ({low:.1%} to {high:.1%})")
    minutes = result["training_cpu_seconds"] / 60
    return (
        f"| {result['recipe']} | {' | '.join(shares)} | {result['output_error']:.6f} | {result['frechet']:.4f} | "
        f"{'' if result['variant'] == ITSELF else f'{minutes:.0f}'} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())
