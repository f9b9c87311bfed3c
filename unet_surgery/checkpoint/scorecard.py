"""A model card's results, from the JSON of scores: the Hub's ``model-index``.

Scores of the same metric, of pictures that were drawn alike and measured alike, are replaced where they stand; all
others, and whatever else the card says, stay as they are, to the last byte. Comments inside the list of results are
lost when it changes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.check import unet_folder
from unet_surgery.checkpoint.drawing import deciding
from unet_surgery.checkpoint.identity import network_sha256
from unet_surgery.checkpoint.jsonfile import MAX_JSON_BYTES, read_regular
from unet_surgery.checkpoint.layout import is_weights_file
from unet_surgery.checkpoint.student import CONFIG
from unet_surgery.errors import DataError, OutputBusyError, OutputError, SurgeryError, escaped, printable

__all__ = ["CARD", "SCORES_FORMAT", "add_scores", "card_with_scores", "check_card", "check_drawn_by"]

CARD = "README.md"
SCORES_FORMAT = "unet-surgery-scores"
TASK = "text-to-image"
INDEX = "model-index"
KEY = "protocol_sha256"
"""Of a metric's ``args``: the hash of all that decides the number beside the model. Two results of one are the same."""
_FRONT = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?=\r?\n|\Z)", re.DOTALL)
_SHOWN = (("scheduler", None), ("steps", None), ("guidance", None), ("seed", None), ("seeding", "keyed"),
          ("negative", ""), ("resize", None), ("jpeg", None), ("strength", None))  # fmt: skip
"""Settings that a result names, and the value of each that goes without saying."""

T = TypeVar("T")
Result = tuple[dict[str, str], dict[str, Any]]
"""A data set and a metric, in the form that they have in the index."""


def check_card(folder: str | Path) -> None:
    """Check that :meth:`add_scores` will find a card that it can write into, before anything is computed.

    Raises:
        DataError: the card's metadata cannot be read.
        OutputError: there is no card.
    """
    path = _card(folder)
    _in_file(path, lambda: _parts(_text(path)))


def add_scores(folder: str | Path, scores: Mapping[str, Any]) -> int:
    """Write the scores (:meth:`ScoreReport.to_json`'s form) into the card of the model in ``folder``; return how many.

    The card is there whole before and after. The same scores again change no byte.

    Raises:
        DataError: ``scores`` is something else or of another model's pictures, or the card's metadata cannot be read.
        OutputError: there is no card, or it cannot be written.
    """
    path = _card(folder)
    text = _text(path)
    images = scores.get("images")
    check_drawn_by(folder, images.get("generation") if isinstance(images, Mapping) else None)
    changed = _in_file(path, lambda: card_with_scores(text, scores, name=Path(folder).resolve().name))
    if changed != text:
        try:
            disk.replace_file(path, changed.encode(), force=True)
        except BlockingIOError as error:
            raise OutputBusyError("another process is writing this card", where=str(path)) from error
        except OSError as error:
            raise OutputError("the model card cannot be written", where=str(path), found=error.strerror) from error
    return len(scores["scores"])


def check_drawn_by(folder: str | Path, generation: Mapping[str, Any] | None) -> None:
    """Check that pictures whose ``generation.json`` is given were drawn by the U-Net in ``folder``, by its contents.

    Where either is not recorded, or not there, nothing is said.

    Raises:
        DataError: they were drawn by another one.
        TeacherError: the U-Net is damaged.
    """
    model = generation.get("model") if generation is not None else None
    if not isinstance(model, Mapping):
        return
    told = model.get("sha256")
    unet = unet_folder(Path(folder))
    if not isinstance(told, str) or not (unet / CONFIG).is_file() or not any(map(is_weights_file, os.listdir(unet))):
        return
    own = network_sha256(unet)
    if own != told:
        raise DataError(
            "these pictures were drawn by another model than this card's",
            where=str(Path(folder) / CARD),
            expected=f"pictures by its U-Net, {own[:12]}…",
            found=printable(f"pictures by {model.get('name')}, {told[:12]}…"),
            hint="--card takes the folder of the model that drew them",
        )


def card_with_scores(card: str, scores: Mapping[str, Any], *, name: str) -> str:
    """Return the card with the scores in its metadata; ``name`` is the model's, where the card has no results yet.

    Raises:
        DataError: ``scores`` is something else, or the card's metadata cannot be read.
    """
    match, metadata = _parts(card)
    before = _dumped(metadata.get(INDEX))
    _put(metadata, _results(scores), name)
    if _dumped(metadata[INDEX]) == before:
        return card
    line_end = "\r\n" if "\r\n" in card else "\n"
    if match is None:
        return line_end.join(("---", _with_index("", metadata, line_end), "---", "", card))
    return card[: match.start(1)] + _with_index(match[1], metadata, line_end) + card[match.end(1) :]


def _card(folder: str | Path) -> Path:
    path = Path(folder) / CARD
    if not path.is_file():
        raise OutputError(
            "there is no model card to write scores into",
            where=str(path),
            expected="a model's folder with README.md, as unet-surgery prune makes it",
        )
    return path


def _text(path: Path) -> str:
    try:
        return read_regular(path, MAX_JSON_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("the model card is not UTF-8 text", where=str(path)) from error
    except SurgeryError as error:
        raise DataError(error.what, where=str(path), expected=error.expected, found=error.found) from error


def _in_file(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except DataError as error:
        raise error.at(str(path)) from None


def _parts(card: str) -> tuple[re.Match[str] | None, dict[str, Any]]:
    """Return where the card's metadata stand, and what they say; what the Hub's own library cannot read is refused."""
    from huggingface_hub.repocard_data import model_index_to_eval_results

    match = _FRONT.match(card)
    metadata: Any = {}
    try:
        if match is not None:
            metadata = yaml.safe_load(match[1]) or {}
        if INDEX in metadata:
            model_index_to_eval_results(metadata[INDEX])
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DataError("the card's metadata cannot be read", found=printable(str(error))) from error
    if not isinstance(metadata, dict):
        raise DataError("the card's metadata cannot be read", found="YAML, but no mapping")
    return match, metadata


def _put(metadata: dict[str, Any], results: Sequence[Result], name: str) -> None:
    """Put results into the index: where one of the same protocol stands, else beside those of its data set, or last."""
    index = metadata.setdefault(INDEX, [{"name": name, "results": []}])
    for dataset, metric in results:
        groups = [group for model in index for group in model["results"] if group["task"]["type"] == TASK]
        same = next(
            (
                (group["metrics"], k)
                for group in groups
                for k, old in enumerate(group["metrics"])
                if _alike(old, metric)
            ),
            None,
        )
        beside = next((group["metrics"] for group in groups if group["dataset"] == dataset), None)
        if same is not None:
            same[0][same[1]] = metric
        elif beside is not None:
            beside.append(metric)
        else:
            index[0]["results"].append({"task": {"type": TASK}, "dataset": dataset, "metrics": [metric]})


def _alike(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    arguments = old.get("args")
    key = arguments.get(KEY) if isinstance(arguments, Mapping) else None
    return bool(old["type"] == new["type"] and key == new["args"][KEY])


def _with_index(front: str, metadata: Mapping[str, Any], line_end: str) -> str:
    """Return the text of the metadata with another index; all else is left as it was written, wherever that can be."""
    new = _dumped({INDEX: metadata[INDEX]}).replace("\n", line_end)
    node = yaml.compose(front, Loader=yaml.SafeLoader)
    starts = [key.start_mark.index for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    if INDEX in names:
        place = names.index(INDEX)
        start, end = starts[place], [*starts, len(front)][place + 1]
        lines = front[start:end].splitlines(keepends=True)
        while lines and (not lines[-1].strip() or lines[-1].startswith("#")):  # they belong to what follows
            lines.pop()
        text = front[:start] + new + front[start + sum(map(len, lines)) :]
    else:
        text = front + line_end + new if front.strip() else new
    text = text.removesuffix(line_end)
    try:
        if _dumped(yaml.safe_load(text)) == _dumped(metadata):
            return text
    except yaml.YAMLError:
        pass
    return _dumped(metadata).replace("\n", line_end).removesuffix(line_end)  # in braces, indented, or with anchors


def _dumped(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def _results(scores: Mapping[str, Any]) -> list[Result]:
    try:
        if scores["format"] != SCORES_FORMAT:
            raise DataError("these are no scores of unet-surgery", found=printable(scores["format"]))
        images = scores["images"]
        found = [
            (_dataset(images, score), _scored(images, score, scores["unet_surgery"])) for score in scores["scores"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError("these are no scores of unet-surgery", found=printable(repr(error))) from error
    if not found:
        raise DataError("there are no scores to write")
    return found


def _dataset(images: Mapping[str, Any], score: Mapping[str, Any]) -> dict[str, str]:
    """Return the prompts, by the name of their protocol where they have one, and in words how they were drawn."""
    protocol = score["protocol"]
    drawn = images["generation"] or protocol["generation"] or {}
    name = str(drawn.get("preset") or (drawn.get("prompts") or {}).get("name") or images["folder"])
    width, height = protocol["resolution"]
    told = [f"{protocol['count']} pictures of {width}×{height}"]
    if drawn.get("drawn_width") not in (None, width) or drawn.get("drawn_height") not in (None, height):
        told.append(f"drawn at {drawn['drawn_width']}×{drawn['drawn_height']}")
    for key, usual in _SHOWN:
        value = drawn.get(key)
        value = value.get("class") if isinstance(value, Mapping) else value
        if value not in (None, usual):
            told.append(f"{key} {value}")
    return {
        "name": escaped(name),
        "type": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "prompts",
        "config": escaped(", ".join(told)),
    }


def _scored(images: Mapping[str, Any], score: Mapping[str, Any], version: Any) -> dict[str, Any]:
    protocol = score["protocol"]
    weights, reference = protocol["weights"] or {}, protocol["reference"] or {}
    arguments = {
        "error": score["error"],
        "interval": score.get("interval"),
        "error_is": protocol["error_is"],
        "implementation": protocol["implementation"],
        "resize": protocol.get("resize"),
        "weights_sha256": weights.get("sha256"),
        "reference": reference.get("name"),
        "reference_sha256": reference.get("sha256"),
        "unet_surgery": version,
        KEY: _protocol_sha256(images, protocol),
    }
    told = {key: value for key, value in arguments.items() if value is not None}
    return {"type": _metric(score["metric"]), "value": _number(score["value"]), "args": json.loads(json.dumps(told))}


def _protocol_sha256(images: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """Return a hash of all that decides a score beside the model: how pictures were drawn, and measured."""
    weights, reference = protocol["weights"] or {}, protocol["reference"] or {}
    told = {
        "drawn": deciding(images["generation"]) if images["generation"] else [images["folder"], protocol["generation"]],
        "implementation": protocol["implementation"],
        "resize": protocol.get("resize"),
        "resolution": protocol["resolution"],
        "count": protocol["count"],
        "weights": weights.get("sha256") or weights.get("name"),
        "reference": reference.get("sha256") or reference.get("name"),
        "reference_resolution": reference.get("resolution"),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _metric(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9.-]{1,60}", name):
        raise DataError("a score has no name", found=printable(name))
    return name


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise DataError("a score is no number", found=printable(value))
    return float(value)
