"""Run files: YAML with positions, ``--set``, and errors that say which line and which key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from unet_surgery.distill.config import REFUSED, RunConfig, Stage, merged
from unet_surgery.distill.refusals import refusal
from unet_surgery.errors import RunError, printable
from unet_surgery.recipe.yamlfile import MAX_BYTES, Kind, LocatedData, parse_yaml

__all__ = ["RunFile", "load_run", "parse_run", "to_yaml"]

RUN = Kind("run file", "output:, student: and data:", RunError)


@dataclass(frozen=True, slots=True)
class RunFile:
    """A checked run and the file it came from."""

    config: RunConfig
    file: str


def load_run(path: str | Path, changes: Sequence[str] = ()) -> RunFile:
    """Read a run file; ``changes`` are ``key.key=value``, the value in YAML, written over what the file says.

    Raises:
        RunError: no such file, wrong YAML, an unknown key or a wrong value; with line, column and the nearest key.
    """
    file = str(path)
    try:
        with open(path, "rb") as stream:
            text = stream.read(MAX_BYTES + 1).decode("utf-8")
    except OSError as error:
        hint = _nearest(Path(path)) if isinstance(error, FileNotFoundError) else None
        raise RunError("the run file cannot be read", where=file, found=error.strerror, hint=hint) from error
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is none"
        raise RunError("the run file cannot be read as UTF-8 text", where=file, found=found) from error
    return RunFile(parse_run(text, file, changes), file)


def _nearest(path: Path) -> str:
    """Return what to try in place of a file that is not there."""
    beside = [p.name for suffix in ("*.yaml", "*.yml") for p in sorted(path.parent.glob(suffix))]
    close = get_close_matches(path.name, beside, n=1, cutoff=0.5)
    if close:
        return f"did you mean {printable(str(path.parent / close[0]))}?"
    return "examples/runs/ of unet-surgery's repository has run files to begin with"


def parse_run(text: str, file: str, changes: Sequence[str] = ()) -> RunConfig:
    """Check the text of a run file.

    Raises:
        RunError: as :func:`load_run`.
    """
    located = parse_yaml(text, file, RUN)
    data: dict[str, Any] = located.data
    origins: dict[tuple[str | int, ...], str] = {}
    for change in changes:
        path, value = _parse_change(change)
        origins[path] = f"--set {change}"
        if value is None and not _may_be_null(path):
            _remove(data, path)
        elif path[0] in Stage.model_fields and isinstance(data.get("stages"), list):
            # Said once on the command line, it is meant for all of them.
            for i, stage in enumerate(data["stages"]):
                if isinstance(stage, dict):
                    _put(stage, path, value, change)
                    origins["stages", i, *path] = f"--set {change}"
        else:
            _put(data, path, value, change)
    try:
        return RunConfig.from_data(data)
    except ValidationError as error:
        raise _explain(error, located, origins, data) from error


def to_yaml(config: RunConfig) -> str:
    """Return the whole config as a run file; a single stage stands at the top level, as people write it."""
    data = config.model_dump(mode="json")
    if len(config.stages) == 1 and config.stages[0].name == Stage.model_fields["name"].default:
        stage = data.pop("stages")[0]
        stage.pop("name")
        data |= stage
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def _parse_change(change: str) -> tuple[tuple[str | int, ...], Any]:
    key, equals, text = change.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RunError(
            "--set takes key=value", found=printable(change), hint="such as --set optimizer.lr=1e-4 or --set steps=500"
        )
    value = parse_yaml(f"value: {text}", f"--set {printable(key)}", RUN).data["value"]
    return tuple(int(part) if part.isdigit() else part for part in parts), value


def _put(data: Any, path: tuple[str | int, ...], value: Any, change: str) -> None:
    """Write ``value`` at ``path``, making mappings where there are none yet."""
    for i, part in enumerate(path[:-1]):
        if isinstance(data, dict) and not isinstance(data.get(part), (dict, list)):
            # feature_kd: 1.0 is short for its weight, and stays so when another of its keys is set.
            short = {"weight": data[part]} if part in ("feature_kd", "step_kd") and part in data else {}
            data[part] = short
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            raise RunError(
                "--set leads nowhere", where=f"--set {printable(change)}", found=f"no {part!r} in {path[:i]!r}"
            ) from None
    try:
        data[path[-1]] = merged(data[path[-1]], value) if _both_mappings(data, path[-1], value) else value
    except (IndexError, TypeError):
        raise RunError(
            "--set leads nowhere", where=f"--set {printable(change)}", found=f"no {path[-1]!r} there"
        ) from None


def _may_be_null(path: tuple[str | int, ...]) -> bool:
    """True if null has a meaning at ``path``, or the key is unknown, which is for the check to say."""
    checked = ("stages", 0, *path) if path[0] in Stage.model_fields else path
    field = _model_at(checked[:-1]).model_fields.get(str(checked[-1]))
    return field is None or type(None) in get_args(field.annotation)


def _remove(data: Any, path: tuple[str | int, ...]) -> None:
    """Take the key at ``path`` away, if it is there; at the top, what is a stage's from all stages."""
    stages = data.get("stages") if path[0] in Stage.model_fields else None
    for root in (data, *(stages if isinstance(stages, list) else ())):
        at = root
        try:
            for part in path[:-1]:
                at = at[part]
        except (KeyError, IndexError, TypeError):  # nothing stands there
            continue
        if isinstance(at, dict):
            at.pop(path[-1], None)


def _both_mappings(data: Any, key: str | int, value: Any) -> bool:
    return isinstance(value, dict) and isinstance(data, dict) and isinstance(data.get(key), dict)


def _explain(
    error: ValidationError,
    located: LocatedData,
    origins: Mapping[tuple[str | int, ...], str],
    data: Mapping[str, Any],
) -> RunError:
    """Turn pydantic's first finding into one message that knows its line."""
    first = error.errors(include_url=False)[0]
    path = tuple(first["loc"])
    if first["type"] == REFUSED:
        path += first["ctx"]["at"]
    as_written = _as_written(path, data)
    where = next(
        (said for at, said in origins.items() for p in (path, as_written) if p and at[: len(p)] == p[: len(at)]),
        located.where(as_written),
    )
    known = _keys_at(path if first["type"] == "model_type" else path[:-1])
    result = refusal(first, ".".join(map(str, as_written)), known, _default(path))
    result.path = as_written
    return result.at(where)


def _as_written(path: tuple[str | int, ...], data: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Return where the value at ``path`` of the checked data stands in the file: stages' keys may stand at the top."""
    if len(path) < 2 or path[0] != "stages":
        return path
    stages, number = data.get("stages"), path[1]
    if not isinstance(stages, list):
        return path[2:]
    stage = stages[number] if isinstance(number, int) and number < len(stages) else None
    here = isinstance(stage, Mapping) and (len(path) == 2 or path[2] in stage)
    return path if here or path[2] not in data else path[2:]


def _keys_at(path: tuple[str | int, ...]) -> list[str]:
    """Return the keys that a mapping at ``path`` may have."""
    model = _model_at(path)
    names = list(model.model_fields)
    if model is RunConfig:
        names += [name for name in Stage.model_fields if name != "name"]
    return names


def _model_at(path: tuple[str | int, ...]) -> type[BaseModel]:
    """Return the model of the mapping at ``path``."""
    model: type[BaseModel] = RunConfig
    for part in path:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return model


def _default(path: tuple[str | int, ...]) -> str | None:
    """Return what holds where the key at ``path`` is left out, in YAML; None where it is needed, or no plain value.

    Of a value in a list, it is the list's.
    """
    while path and isinstance(path[-1], int):
        path = path[:-1]
    if not path:
        return None
    field = _model_at(path[:-1]).model_fields.get(str(path[-1]))
    value = None if field is None or field.is_required() else field.get_default()
    return None if value is None or isinstance(value, BaseModel) else json.dumps(value)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
