"""Run files: YAML with positions, ``--set``, and errors that say which line and which key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from unet_surgery.distill.config import RunConfig, Stage, merged
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
        raise RunError("the run file cannot be read", where=file, found=error.strerror) from error
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is none"
        raise RunError("the run file cannot be read as UTF-8 text", where=file, found=found) from error
    return RunFile(parse_run(text, file, changes), file)


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
        if path[0] in Stage.model_fields and isinstance(data.get("stages"), list):
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
    as_written = _as_written(path, data)
    where = next(
        (said for at, said in origins.items() for p in (path, as_written) if at[: len(p)] == p[: len(at)]),
        located.where(as_written),
    )
    key = ".".join(map(str, as_written))
    result = _of_kind(first["type"], key, path, first["msg"].removeprefix("Value error, "), first["input"])
    result.path = as_written
    return result.at(where)


def _of_kind(kind: str, key: str, path: tuple[str | int, ...], message: str, found: object) -> RunError:
    if kind == "extra_forbidden":
        known = _keys_at(path[:-1])
        close = get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        return RunError(
            f"the run file has an unknown key {printable(key)!r}",
            expected=", ".join(known),
            hint=f"did you mean {close[0]!r}?" if close else "remove the key",
        )
    if kind == "missing":
        return RunError(f"the run file has no {key!r}", hint=f"add {key}: …")
    shown = printable(found) if not isinstance(found, (dict, list)) else None
    return RunError(
        f"the run file's {key!r} is wrong" if key else "the run file is wrong", expected=message, found=shown
    )


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
    model: type[BaseModel] = RunConfig
    for part in path:
        if isinstance(part, str) and part in model.model_fields:
            found = _model_in(model.model_fields[part].annotation)
            model = found or model
    names = list(model.model_fields)
    if model is RunConfig:
        names += [name for name in Stage.model_fields if name != "name"]
    return names


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
