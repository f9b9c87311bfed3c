"""``lower_config``: from the student's graph to the config.json that stock diffusers builds it from.

One canonical form, so that equal students have equal files: a key keeps the teacher's notation (a scalar where it
had a scalar and the levels still agree), lists nest only where the layers of a stage differ, keys are sorted as
diffusers sorts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unet_surgery.errors import InexpressibleError
from unet_surgery.graph import build, dump, parse_config
from unet_surgery.graph.config import CROSS_MID, DEFAULTS, RESNET_MID
from unet_surgery.graph.nodes import Stage, UNetGraph

__all__ = ["lower_config"]

DepthEntry = int | list[int]


def lower_config(teacher_config: Mapping[str, Any], student: UNetGraph) -> dict[str, Any]:
    """Return the config of ``student``, which :func:`remove` made of the graph of ``teacher_config``.

    The result is proved by building it again: the graph of the returned config equals ``student``.

    Raises:
        InexpressibleError: no config says what the graph is (two parts need different values of one key).
    """
    config = dict(teacher_config)
    levels = [stage.index for stage in student.down]
    config["block_out_channels"] = [stage.channels for stage in student.down]
    config["down_block_types"] = ["CrossAttnDownBlock2D" if s.has_attention else "DownBlock2D" for s in student.down]
    config["up_block_types"] = ["CrossAttnUpBlock2D" if s.has_attention else "UpBlock2D" for s in student.up]
    if student.mid is None:
        config["mid_block_type"] = None
    elif student.mid.attention is None:
        config["mid_block_type"] = RESNET_MID
    elif config.get("mid_block_type", CROSS_MID) != CROSS_MID:
        config["mid_block_type"] = CROSS_MID
    _set(config, "layers_per_block", [len(stage.layers) for stage in student.down])
    for key in ("attention_head_dim", "cross_attention_dim", "only_cross_attention"):
        value = config.get(key, DEFAULTS[key])
        if isinstance(value, (list, tuple)):
            config[key] = [value[i] for i in levels]
    _set_depths(config, student)
    result = {key: config[key] for key in sorted(config)}
    _prove(result, student)
    return result


def _set(config: dict[str, Any], key: str, values: list[Any]) -> None:
    """Write one value a level: as the scalar the teacher wrote if it still holds, else as a list."""
    teacher_value = config.get(key, DEFAULTS[key])
    if not isinstance(teacher_value, (list, tuple)) and all(v == values[0] for v in values):
        if key in config or values[0] != DEFAULTS[key]:
            config[key] = values[0]
    else:
        config[key] = values


def _set_depths(config: dict[str, Any], student: UNetGraph) -> None:
    """Write ``transformer_layers_per_block`` and, only where the two sides or layers differ, its reverse.

    A level without attention leaves its entry free. The last entry is also the mid's depth.
    """
    key, reverse_key = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    down = [_depth_entry(stage) for stage in student.down]
    up = [_depth_entry(stage) for stage in reversed(student.up)]
    mid = student.mid
    if mid is not None and mid.attention is not None and down[-1] is None:
        down[-1] = mid.attention.depth
    teacher_value = config.get(key, DEFAULTS[key])
    scalar = not isinstance(teacher_value, (list, tuple))
    fixed: list[DepthEntry] = [entry for entry in down + up if entry is not None]
    uniform = fixed[0] if fixed and all(entry == fixed[0] for entry in fixed) else None
    entries: list[DepthEntry] = []
    for stage, entry, mirror in zip(student.down, down, up, strict=True):
        if entry is not None:
            entries.append(entry)
        else:
            entries.append(mirror if isinstance(mirror, int) else _free_entry(teacher_value, stage, uniform))
    needs_reverse = any(isinstance(entry, list) for entry in entries) or any(
        mirror is not None and mirror != entry for entry, mirror in zip(entries, up, strict=True)
    )
    _set(config, key, entries)
    if scalar and needs_reverse:
        config[key] = entries
    if needs_reverse:
        config[reverse_key] = [
            _mirror_entry(entry) if mirror is None else mirror for entry, mirror in zip(entries, up, strict=True)
        ][::-1]
    elif config.get(reverse_key) is not None:
        config[reverse_key] = None


def _depth_entry(stage: Stage) -> DepthEntry | None:
    """Return a stage's depth, one number where its layers agree; None where it has no attention."""
    depths = [layer.attention.depth for layer in stage.layers if layer.attention is not None]
    if not depths:
        return None
    return depths[0] if all(depth == depths[0] for depth in depths) else depths


def _free_entry(teacher_value: Any, stage: Stage, uniform: DepthEntry | None) -> int:
    if isinstance(uniform, int) and not isinstance(teacher_value, (list, tuple)):
        return uniform
    entry = teacher_value[stage.index] if isinstance(teacher_value, (list, tuple)) else teacher_value
    return _mirror_entry(entry)


def _mirror_entry(entry: Any) -> int:
    if isinstance(entry, (list, tuple)):
        return int(entry[0]) if entry else 1
    return int(entry)


def _prove(config: Mapping[str, Any], student: UNetGraph) -> None:
    rebuilt = build(parse_config(config))
    if rebuilt == student:
        return
    have, want = dump(rebuilt, provenance=False).splitlines(), dump(student, provenance=False).splitlines()
    different = next(((h, w) for h, w in zip(have, want, strict=False) if h != w), (have[-1], want[-1]))
    raise InexpressibleError(
        "diffusers has no config for what the recipe leaves",
        expected=different[1].strip(),
        found=f"{different[0].strip()} is the nearest that a config can say",
        hint="two parts that share one config key would need different values; remove both or neither",
    )
