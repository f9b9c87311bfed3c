"""A model card's results, from the JSON of scores: the Hub's ``model-index``, in the form of its own library.

Scores of the same metric on the same prompts, with the same sampler, steps, guidance, seed, size and number of
pictures are replaced; all others, and whatever else the card says, stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.jsonfile import MAX_JSON_BYTES, read_regular
from unet_surgery.errors import DataError, OutputError, escaped, printable

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["CARD", "SCORES_FORMAT", "add_scores", "card_with_scores"]

CARD = "README.md"
SCORES_FORMAT = "unet-surgery-scores"
TASK = "text-to-image"
INDEX = "model-index"
_FRONT = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?=\r?\n|\Z)", re.DOTALL)
_SETTINGS = ("scheduler", "steps", "guidance", "seed")


def add_scores(folder: str | Path, scores: Mapping[str, Any]) -> int:
    """Write the scores (:meth:`ScoreReport.to_json`'s form) into the card of the model in ``folder``; return how many.

    The card is there whole before and after. The same scores again change no byte.

    Raises:
        DataError: ``scores`` is something else, or the card's metadata cannot be read.
        OutputError: there is no card, or it cannot be written.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        raise OutputError(
            "there is no model card to write scores into",
            where=str(path),
            expected="a model's folder with README.md, as unet-surgery prune makes it",
        )
    text = read_regular(path, MAX_JSON_BYTES)
    try:
        changed = card_with_scores(text.decode("utf-8"), scores, name=Path(folder).resolve().name).encode()
    except UnicodeDecodeError as error:
        raise DataError("the model card is not UTF-8 text", where=str(path)) from error
    except DataError as error:
        raise error.at(str(path)) from None
    if changed != text:
        try:
            disk.replace_file(path, changed, force=True)
        except OSError as error:
            raise OutputError("the model card cannot be written", where=str(path), found=error.strerror) from error
    return len(scores["scores"])


def card_with_scores(card: str, scores: Mapping[str, Any], *, name: str) -> str:
    """Return the card with the scores in its metadata; ``name`` is the model's, where the card has no results yet.

    Raises:
        DataError: ``scores`` is something else, or the card's metadata cannot be read.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    match = _FRONT.match(card)
    metadata: Any = {}
    before: list[EvalResult] = []
    try:
        if match is not None:
            metadata = yaml.safe_load(match[1]) or {}
        if INDEX in metadata:
            name, before = model_index_to_eval_results(metadata[INDEX])
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DataError("the card's metadata cannot be read", found=printable(str(error))) from error
    if not isinstance(metadata, dict):
        raise DataError("the card's metadata cannot be read", found="YAML, but no mapping")
    results = _results(scores)
    keys = {_key(result) for result in results}
    metadata[INDEX] = eval_results_to_model_index(name, [*(r for r in before if _key(r) not in keys), *results])
    front = yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True)
    rest = card[match.end() :] if match is not None else "\n" + card
    return f"---\n{front}---{rest}"


def _results(scores: Mapping[str, Any]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    try:
        if scores["format"] != SCORES_FORMAT:
            raise DataError("these are no scores of unet-surgery", found=printable(scores["format"]))
        images = scores["images"]
        generation = images["generation"] or {}
        prompts = (generation.get("prompts") or {}).get("name") or images["folder"]
        found = []
        for score in scores["scores"]:
            protocol = score["protocol"]
            drawn = protocol["generation"] or {}
            settings = {key: drawn[key] for key in _SETTINGS if drawn.get(key) is not None}
            weights = protocol["weights"] or {}
            arguments = {
                "error": score["error"],
                "error_is": protocol["error_is"],
                "implementation": protocol["implementation"],
                "weights_sha256": weights.get("sha256"),
                "reference": (protocol["reference"] or {}).get("name"),
                "unet_surgery": scores["unet_surgery"],
            }
            width, height = protocol["resolution"]
            told = [f"{protocol['count']} pictures of {width}×{height}", *(f"{k} {v}" for k, v in settings.items())]
            found.append(
                EvalResult(
                    task_type=TASK,
                    dataset_type=re.sub(r"[^a-z0-9]+", "-", str(prompts).lower()).strip("-") or "prompts",
                    dataset_name=escaped(str(prompts)),
                    dataset_config=escaped(", ".join(told)),
                    metric_type=_metric(score["metric"]),
                    metric_value=_number(score["value"]),
                    metric_args={key: value for key, value in arguments.items() if value is not None},
                )
            )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError("these are no scores of unet-surgery", found=printable(repr(error))) from error
    if not found:
        raise DataError("there are no scores to write")
    return found


def _metric(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9.-]{1,60}", name):
        raise DataError("a score has no name", found=printable(name))
    return name


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise DataError("a score is no number", found=printable(value))
    return float(value)


def _key(result: EvalResult) -> tuple[str, ...]:
    """Return what two results have in common when one replaces the other; the first three make the library's groups."""
    return (result.task_type, result.dataset_type, result.dataset_config or "", result.metric_type)
