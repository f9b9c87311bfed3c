"""PEFT's config in the metadata of a LoRA: which modules it names, renamed as the tensors are.

diffusers stores it as JSON under ``lora_adapter_metadata`` and, where it is there, builds the adapter from it instead
of from the tensors. A name in it may be a whole module's or the end of several modules' names (``to_q``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unet_surgery.errors import TeacherError, printable
from unet_surgery.lower.adapters import Moves

__all__ = ["PEFT_CONFIG", "renamed_metadata"]

PEFT_CONFIG = "lora_adapter_metadata"
UNET = "unet."
PATTERNS = ("rank_pattern", "alpha_pattern")
SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""What narrows ``target_modules`` down, by names or numbers of the teacher's."""

_NUMBERED = re.compile(r"blocks?\b|(attentions|resnets|samplers)\b")


def renamed_metadata(metadata: Mapping[str, str], moves: Moves, acting: Sequence[str]) -> dict[str, str]:
    """Return ``metadata`` with the modules that PEFT's config names renamed; ``acting`` are the student's, adapted.

    Raises:
        TeacherError: the config is no JSON object, or picks modules by a pattern that cannot be renamed.
    """
    text = metadata.get(PEFT_CONFIG)
    if not text:
        return dict(metadata)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad("it is not JSON", printable(str(error))) from error
    if not isinstance(config, dict):
        raise _bad("it is not a JSON object", printable(config))
    prefix = UNET if any(key.startswith(UNET) for key in config) else ""
    own = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
    if "target_modules" not in own or (not prefix and any(key.startswith("text_encoder") for key in config)):
        return dict(metadata)
    changed = _targets(own, moves, acting)
    changed |= {key: _pattern(key, own[key], moves, acting) for key in PATTERNS if own.get(key)}
    config |= {prefix + key: value for key, value in changed.items()}
    return {**metadata, PEFT_CONFIG: json.dumps(config, indent=2)}  # in its order: the first pattern counts


def _targets(config: Mapping[str, Any], moves: Moves, acting: Sequence[str]) -> dict[str, Any]:
    """Return the keys that say which modules are adapted: names renamed where that says it, else all of them listed."""
    targets = config["target_modules"]
    narrowed = any(config.get(key) for key in SELECTING)
    if isinstance(targets, list) and all(isinstance(name, str) for name in targets) and not narrowed:
        renamed = [moves.kept.get(name, name) for name in targets if name not in moves.removed]
        ends = tuple(f".{name}" for name in renamed)
        matched = {name for name in moves.student if name in renamed or name.endswith(ends)}
        if matched == set(acting):
            return {"target_modules": renamed}
    return {"target_modules": sorted(acting)} | {key: None for key in SELECTING if config.get(key)}


def _pattern(key: str, pattern: object, moves: Moves, acting: Sequence[str]) -> dict[str, Any]:
    """Rename the modules that a rank or alpha of their own is given for; the ends of names (``to_q``) stay.

    Of the ends, one that no module of the student has any more goes too: PEFT warns of it.
    """
    if not isinstance(pattern, dict):
        raise _bad(f"its {key} is not an object", printable(pattern))
    result: dict[str, Any] = {}
    for name, value in pattern.items():
        plain = name.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if plain in moves.kept:
            new = moves.kept[plain]
            result["^" * name.startswith("^") + new + "$" * name.endswith("$")] = value
        elif plain in moves.removed or (_ends(plain, moves.shapes) and not _ends(plain, acting)):
            continue
        elif _NUMBERED.search(plain):
            raise _bad(f"its {key} picks modules by a pattern, which cannot be renamed", printable(name))
        else:
            result[name] = value
    return result


def _ends(end: str, modules: Iterable[str]) -> bool:
    return any(module == end or module.endswith(f".{end}") for module in modules)


def _bad(what: str, found: str) -> TeacherError:
    return TeacherError(
        f"the LoRA's metadata cannot be used: {what}",
        where=f"__metadata__, key {PEFT_CONFIG}",
        found=found,
        hint="save it again with diffusers' save_lora_weights",
    )
