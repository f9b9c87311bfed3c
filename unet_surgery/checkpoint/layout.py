"""Which files of a diffusers folder hold what: pure functions over file names.

A component's weights are ``BASE.safetensors`` or, sharded, ``BASE.safetensors.index.json`` and its shards; a variant
(``fp16``, ``non_ema``) puts its name into both. BASE is ``diffusion_pytorch_model`` for diffusers' models and ``model``
for transformers'.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from unet_surgery.errors import TeacherError, first_few

__all__ = [
    "UNET_BASE",
    "WeightsChoice",
    "choose_weights",
    "component_files",
    "component_weights",
    "is_weights_file",
    "shard_files",
]

UNET_BASE = "diffusion_pytorch_model"
BASES = (UNET_BASE, "model")

_BASE = "|".join(BASES)
_SINGLE = re.compile(rf"(?P<base>{_BASE})(?:\.(?P<variant>[A-Za-z0-9_]+))?\.safetensors")
_INDEX = re.compile(rf"(?P<base>{_BASE})\.safetensors\.index(?:\.(?P<variant>[A-Za-z0-9_]+))?\.json")
_PICKLE = re.compile(r"(?:diffusion_)?(?:pytorch_)?model(?:\.(?P<variant>[A-Za-z0-9_]+))?\.bin")
_SHARDED_PICKLE = re.compile(r"(?:diffusion_)?pytorch_model(?:-\d+-of-\d+\.bin|\.bin\.index\.json)")
_WEIGHTS = re.compile(
    r".*\.(safetensors|safetensors\.index(\.\w+)?\.json|bin|bin\.index\.json|pt|pth|ckpt|pkl|msgpack|h5|onnx|onnx_data|gguf|pb|xml)"
)


@dataclass(frozen=True, slots=True)
class WeightsChoice:
    """The weights of a component: a single file or an index, of one variant (None: the plain ones)."""

    file: str
    sharded: bool
    variant: str | None


def choose_weights(
    names: Collection[str], variant: str | None, *, where: str, base: str = UNET_BASE, exact: bool = False
) -> WeightsChoice:
    """Choose among the file ``names`` of one folder.

    Without ``variant`` the plain weights are taken, or the only variant there is; with ``exact``, nothing but what
    was asked for.

    Raises:
        TeacherError: none fit, or several could be meant; lists what there is.
    """
    choices = _safetensors_choices(names, base)
    if variant in choices:
        return choices[variant]
    if variant is None and len(choices) == 1 and not exact:
        return next(iter(choices.values()))
    if choices:
        options = ", ".join(f"--variant {v}" if v else "plain weights" for v in sorted(choices, key=lambda v: v or ""))
        raise TeacherError(
            f"there are no weights of variant {variant!r}" if variant else "there are several variants of the weights",
            where=where,
            found=options,
            hint="leave --variant out" if None in choices else "choose one of these",
        )
    # an index before its shards
    pickles = sorted(n for n in names if n.endswith(".bin.index.json"))
    pickles += sorted(n for n in names if n.endswith((".bin", ".ckpt", ".pt", ".pth")))
    convert = f"unet-surgery convert {shlex.quote(f'{where}/{pickles[0]}')}" if pickles else ""
    raise TeacherError(
        "there are no safetensors weights",
        where=where,
        expected=f"{base}.safetensors or its index and shards",
        found=f"{pickles[0]}, a pickle, which is never opened" if pickles else _listing(names),
        hint=f"{convert} makes safetensors of it" if pickles else None,
    )


def component_files(names: Sequence[str], variant: str | None) -> dict[str, str]:
    """Return source name → target name of the files of a component that a pipeline needs.

    One set of weights is kept: safetensors before pickle, ``variant`` before the plain ones if it is there. A chosen
    file or index loses its variant's name, so that the pipeline loads without one; shards keep theirs, which the
    index gives.
    """
    kept = {name: name for name in names if not is_weights_file(name)}
    chosen = component_weights(names, variant)
    if chosen is not None:
        base = chosen.file.partition(".")[0]
        plain = f"{base}.safetensors.index.json" if chosen.sharded else f"{base}.safetensors"
        return dict(sorted({**kept, **{n: n for n in shard_files(names, chosen)}, chosen.file: plain}.items()))
    pickles = {match["variant"]: name for name in sorted(names) if (match := _PICKLE.fullmatch(name))}
    chosen_pickle = pickles.get(variant) or pickles.get(None) or next(iter(pickles.values()), None)
    if chosen_pickle is not None:
        kept[chosen_pickle] = re.sub(r"\.[A-Za-z0-9_]+\.bin$", ".bin", chosen_pickle)
    else:
        kept |= {name: name for name in names if _SHARDED_PICKLE.fullmatch(name)}
    return dict(sorted(kept.items()))


def component_weights(names: Collection[str], variant: str | None) -> WeightsChoice | None:
    """Return the safetensors weights of a component: ``variant`` if it is there, else the plain ones, else any."""
    for base in BASES:
        choices = _safetensors_choices(names, base)
        chosen = choices.get(variant) or choices.get(None) or next(iter(choices.values()), None)
        if chosen is not None:
            return chosen
    return None


def shard_files(names: Collection[str], choice: WeightsChoice) -> list[str]:
    """Return the shards of a chosen index, by the two ways in which a variant is written; none for a single file."""
    if not choice.sharded:
        return []
    tag = f"\\.{choice.variant}" if choice.variant else ""
    base = choice.file.partition(".")[0]
    shard = re.compile(rf"{base}(?:{tag}-\d+-of-\d+|-\d+-of-\d+{tag})\.safetensors")
    return sorted(name for name in names if shard.fullmatch(name))


def is_weights_file(name: str) -> bool:
    """True if the file holds weights in any known format, or is the index of such files."""
    return _WEIGHTS.fullmatch(name) is not None


def _safetensors_choices(names: Collection[str], base: str) -> dict[str | None, WeightsChoice]:
    choices: dict[str | None, WeightsChoice] = {}
    for name in sorted(names):
        for pattern, sharded in ((_INDEX, True), (_SINGLE, False)):
            match = pattern.fullmatch(name)
            if match and match["base"] == base:
                choices[match["variant"]] = WeightsChoice(name, sharded, match["variant"])
    return choices


def _listing(names: Collection[str]) -> str:
    return first_few(sorted(names)) or "an empty folder"
