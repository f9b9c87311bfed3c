"""What an input is, found by looking at it, and what it says.

folder with plan.json                   Surgery
… and training.json (a student), or with metrics.jsonl (a run)   Run
folder with generation.json             Drawn
JSON of scores, of a bench, of a plan   Scored, Benched, Surgery
"""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.check import read_plan
from unet_surgery.checkpoint.jsonfile import parse_object, read_object, read_regular
from unet_surgery.checkpoint.scorecard import SCORES_FORMAT
from unet_surgery.checkpoint.student import PLAN, TRAINING
from unet_surgery.distill.metrics import FEATURE, METRICS, sum_of_features, term
from unet_surgery.errors import DataError, SurgeryError, TeacherError, UsageError, printable
from unet_surgery.lower import PLAN_FORMAT, SurgeryPlan
from unet_surgery.results.formats import MAX_LINES, Bench, Generation, Scores, Training, parsed
from unet_surgery.sample.generated import FORMAT as GENERATION_FORMAT
from unet_surgery.sample.generated import GENERATION_FILE, METADATA_FILE, UNFINISHED, read_generation

__all__ = ["Benched", "Drawn", "Finding", "Run", "Scored", "Surgery", "look"]

MAX_JSON_BYTES = 64 << 20
MAX_METRICS_BYTES = 256 << 20
STUDENT = "student"
EXPECTED = (
    "a pruned or distilled student, a distill run, a folder of unet-surgery generate, "
    "or the JSON of unet-surgery score, bench or plan"
)
TERMS: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "loss": lambda line: term(line, "loss"),
    "task": lambda line: term(line, "task"),
    "output": lambda line: term(line, "output_kd"),
    "features, summed": sum_of_features,
    "step distillation": lambda line: term(line, "step_kd"),
}
"""What is shown of a line of metrics: the whole, and its terms before their weights."""
SHOWN_KEYS = ("loss", "task", "output_kd", "step_kd")


@dataclass(frozen=True, slots=True)
class Surgery:
    """A plan: of a pruned student, or alone."""

    name: str
    plan: SurgeryPlan


@dataclass(frozen=True, slots=True)
class Run:
    """A training: the plan of its student, if there is one yet, and name → value at each of ``steps``."""

    name: str
    plan: SurgeryPlan | None
    steps: Sequence[float]
    terms: Mapping[str, Sequence[float]]
    config: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Drawn:
    """A folder of generated pictures: file and caption of each prompt, in the prompts' order."""

    name: str
    root: Path
    generation: Generation
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Scored:
    name: str
    scores: Scores


@dataclass(frozen=True, slots=True)
class Benched:
    name: str
    bench: Bench


Finding = Surgery | Run | Drawn | Scored | Benched


def look(path: str | Path, *, max_rows: int) -> Finding:
    """Return what ``path`` is, with at most ``max_rows`` prompts of a generated folder.

    Raises:
        UsageError: there is nothing, or nothing that a report shows.
        DataError: it is damaged, or not finished; names the file and the key.
        VerificationError: its plan is none.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise UsageError("there is no such input", where=printable(str(path)), expected=EXPECTED)
    return _folder(path, max_rows) if path.is_dir() else _file(path, max_rows)


def _folder(path: Path, max_rows: int) -> Finding:
    if (path / GENERATION_FILE).exists() or (path / UNFINISHED).is_dir():
        return _drawn(path, max_rows)
    if (path / METRICS).exists():
        return _run(path)
    if (path / TRAINING).exists():
        return _trained(path)
    if (path / PLAN).exists():
        return Surgery(_name(path), read_plan(path))
    raise UsageError(
        "there is nothing in this folder that a report shows", where=printable(str(path)), expected=EXPECTED
    )


def _file(path: Path, max_rows: int) -> Finding:
    if path.name == METRICS:
        return _run(path.parent)
    data = _object(path)
    match data.get("format"):
        case found if found == SCORES_FORMAT:
            return Scored(path.stem, parsed(Scores, data, path))
        case "unet-surgery-bench":
            return Benched(path.stem, parsed(Bench, data, path))
        case found if found == GENERATION_FORMAT:
            return _drawn(path.parent, max_rows)
        case "unet-surgery-training":
            return _trained(path.parent)
        case found if found == PLAN_FORMAT:
            return Surgery(_name(path.parent) if path.name == PLAN else path.stem, read_plan(path))
    raise UsageError(
        "this file is nothing that a report shows",
        where=printable(str(path)),
        expected=EXPECTED,
        found=printable(f"format {data.get('format')!r}"),
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, MAX_JSON_BYTES)
    except TeacherError as error:
        raise DataError(
            error.what, where=error.where, expected=error.expected or EXPECTED, found=error.found
        ) from error


def _bytes(path: Path, max_bytes: int) -> bytes:
    try:
        return read_regular(path, max_bytes)
    except TeacherError as error:
        raise DataError(error.what, where=error.where, expected=error.expected, found=error.found) from error


def _name(folder: Path) -> str:
    return os.path.basename(os.path.abspath(folder))


# -- runs --------------------------------------------------------------------------------------------------------------


def _run(folder: Path) -> Run:
    path = folder / METRICS
    lines = []
    for number, line in enumerate(_bytes(path, MAX_METRICS_BYTES).splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # of a run that was killed, or is writing it
            break
        if number > MAX_LINES:
            raise DataError("a run has implausibly many lines of metrics", where=str(path))
        try:
            lines.append(parse_object(line))
        except (ValueError, SurgeryError) as error:
            raise DataError(
                "a line of metrics cannot be read", where=f"{path}:{number}", found=printable(str(error))
            ) from error
    student = folder / STUDENT
    plan = read_plan(student) if (student / PLAN).is_file() else None
    config = parsed(Training, _object(student / TRAINING), student / TRAINING).run if _has(student) else None
    return _made_run(_name(folder), plan, lines, config, path)


def _has(student: Path) -> bool:
    return (student / TRAINING).is_file()


def _trained(folder: Path) -> Run:
    path = folder / TRAINING
    training = parsed(Training, _object(path), path)
    output = training.run.get("output")
    name = output if isinstance(output, str) and output else _name(folder)
    plan = read_plan(folder) if (folder / PLAN).is_file() else None
    return _made_run(name, plan, training.metrics, training.run, path)


def _made_run(
    name: str,
    plan: SurgeryPlan | None,
    lines: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any] | None,
    path: Path,
) -> Run:
    for number, line in enumerate(lines, 1):
        for key in ("step", *(key for key in line if key in SHOWN_KEYS or key.startswith(FEATURE))):
            value: Any = line.get(key)
            is_number = type(value) in (int, float) and abs(value) < 1e300 and isfinite(value)
            if not is_number and (key == "step" or value is not None):
                raise DataError(
                    "a line of metrics has a wrong value",
                    where=str(path),
                    expected="a number",
                    found=printable(f"line {number}: {key} is {value!r}"),
                )
    steps = [float(line["step"]) for line in lines]
    terms = {title: [value(line) for line in lines] for title, value in TERMS.items()}
    shown = {title: values for title, values in terms.items() if any(value != 0 for value in values)}
    return Run(name, plan, steps, {t: [v if isfinite(v) else nan for v in vs] for t, vs in shown.items()}, config)


# -- pictures ----------------------------------------------------------------------------------------------------------


def _drawn(folder: Path, max_rows: int) -> Drawn:
    generation = parsed(Generation, read_generation(folder), folder / GENERATION_FILE)
    return Drawn(_name(folder), folder, generation, _captions(folder / METADATA_FILE, max_rows))


def _captions(path: Path, max_rows: int) -> list[tuple[str, str]]:
    try:
        text = _bytes(path, MAX_JSON_BYTES).decode("utf-8")
        found = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = [(row.get("file_name") or "", row.get("caption") or "") for row in itertools.islice(found, max_rows)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError("the captions cannot be read", where=str(path), found=printable(str(error))) from error
    for file, _ in rows:
        if not file or os.path.basename(file) != file or file in (".", "..") or "\0" in file:
            raise DataError(
                "a picture is not named as generate names it",
                where=str(path),
                expected="a file_name in the same folder, such as 00000.png",
                found=printable(file),
            )
    return rows
