"""What is wrong with a run file, in the words that the command line uses: pydantic's findings, read for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from unet_surgery.distill.config import REFUSED
from unet_surgery.errors import RunError, printable

__all__ = ["refusal"]

_NUMBER, _WHOLE = "a number", "a whole number"
_BOOL, _TEXT, _MAPPING, _LIST = "true or false", "text", "a mapping: key: value", "a list"
_KINDS: Mapping[str, str] = {
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "a number, and a finite one",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "bool_type": _BOOL,
    "bool_parsing": _BOOL,
    "string_type": _TEXT,
    "model_type": _MAPPING,
    "dict_type": _MAPPING,
    "tuple_type": _LIST,
    "list_type": _LIST,
}
_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("more than {}", "gt"),
    "greater_than_equal": ("{} or more", "ge"),
    "less_than": ("less than {}", "lt"),
    "less_than_equal": ("{} or less", "le"),
    "too_long": ("at most {} values", "max_length"),
    "too_short": ("at least {} values", "min_length"),
    "string_too_long": ("text of at most {} characters", "max_length"),
    "string_too_short": ("text of at least {} characters", "min_length"),
}


def refusal(finding: Mapping[str, Any], key: str, known: Sequence[str], default: str | None) -> RunError:
    """Return the error for what pydantic found at ``key``.

    ``known`` are the keys that may stand beside it, or in it where it should be a mapping; ``default`` is what holds
    where the key is left out, in YAML, or None where it is needed.
    """
    kind, context, name = finding["type"], finding.get("ctx", {}), printable(key)
    if kind == "extra_forbidden":
        close = get_close_matches(key.rpartition(".")[2], known, n=1, cutoff=0.5)
        return RunError(
            f"the run file has an unknown key {name!r}",
            expected=", ".join(known),
            hint=f"did you mean {close[0]!r}?" if close else "remove the key",
        )
    if kind == "missing":
        if key.rpartition(".")[2].isdigit():  # a place in a list
            above = key.rpartition(".")[0]
            return RunError(
                f"the run file's {printable(above)!r} is too short",
                expected="one value more",
                hint=_hint(kind, context, above, None, known, default),
            )
        return RunError(f"the run file has no {name!r}", expected="that key", hint=f"add {name}: …")
    if kind == REFUSED:
        return RunError(context["what"], expected=context["expected"], hint=context["hint"])
    found = finding["input"]
    return RunError(
        f"the run file's {name!r} is wrong" if key else "the run file is wrong",
        expected=_expected(kind, context, finding["msg"].removeprefix("Value error, ")),
        found=_found(found),
        hint=_hint(kind, context, key, found, known, default),
    )


def _expected(kind: str, context: Mapping[str, Any], message: str) -> str:
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return words.format(_plain(context[bound]))
    return _KINDS.get(kind, message)


def _found(value: object) -> str:
    """Return what stands there, as YAML has it."""
    if isinstance(value, dict):
        return f"a mapping of {', '.join(printable(str(key)) for key in list(value)[:4]) or 'nothing'}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return _plain(value)


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else printable(value)


def _hint(
    kind: str, context: Mapping[str, Any], key: str, found: object, known: Sequence[str], default: str | None
) -> str | None:
    if kind == "literal_error":
        names = [name.strip("' ") for part in str(context["expected"]).split(",") for name in part.split(" or ")]
        close = get_close_matches(str(found), names, n=1, cutoff=0.5)
        if close:
            return f"did you mean {close[0]!r}?"
    if kind == "string_type" and isinstance(found, (int, float)):
        return f'quote it: "{_plain(found)}"'
    if kind == "int_from_float" and isinstance(found, float) and found >= 1:
        return f"{int(found)} or {int(found) + 1}"
    if kind == "model_type":
        return f"its keys are {', '.join(known)}"
    name = next((part for part in reversed(key.split(".")) if not part.isdigit()), key)
    return None if default is None else f"{printable(name)}: {default}, which is the default"
