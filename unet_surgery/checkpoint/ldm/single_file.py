"""A single-file checkpoint in the original layout: where its U-Net is, and which other parts it has.

A U-Net stands behind ``model.diffusion_model.``, behind ``diffusion_model.``, or bare. ``model_ema.`` holds a running
average of its weights, as its trainer keeps it (LitEma): the same names without their dots.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from unet_surgery.checkpoint.foreign import recognise_names
from unet_surgery.checkpoint.ldm.infer import Inferred, infer_config
from unet_surgery.checkpoint.reader import Located, Weights
from unet_surgery.errors import TeacherError, first_few

__all__ = ["UNET_PREFIX", "PartKind", "PartSource", "SingleFile", "read_single_file"]

UNET_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."
EMA_MODEL = "diffusion_model"
UNET_PREFIXES = (UNET_PREFIX, "diffusion_model.", "")
BLOCKS = "input_blocks."
BARE_HEADS = (BLOCKS, "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")

PartKind = Literal["vae", "clip", "open_clip"]

PART_PREFIXES: Mapping[str, tuple[str, PartKind]] = MappingProxyType(
    {
        "first_stage_model.": ("vae", "vae"),
        "cond_stage_model.transformer.": ("text_encoder", "clip"),  # SD v1
        "cond_stage_model.model.": ("text_encoder", "open_clip"),  # SD v2
        "conditioner.embedders.0.transformer.": ("text_encoder", "clip"),  # SDXL
        "conditioner.embedders.1.model.": ("text_encoder_2", "open_clip"),
        "conditioner.embedders.0.model.": ("text_encoder_2", "open_clip"),  # SDXL's refiner
    }
)
"""Prefix → (diffusers' name of the component, whose names it has)."""


@dataclass(frozen=True, slots=True)
class PartSource:
    """A part of a pipeline besides the U-Net as a single file has it: original names, without ``prefix``."""

    kind: PartKind
    prefix: str
    tensors: Mapping[str, Located]


@dataclass(frozen=True, slots=True)
class SingleFile:
    """What a single file holds.

    ``unet`` maps diffusers' names to where the tensors lie, ``parts`` the components' names to theirs. ``is_ema`` says
    that the U-Net is the averaged one, ``has_ema`` that there is one.
    """

    unet: Mapping[str, Located]
    inferred: Inferred
    parts: Mapping[str, PartSource]
    has_ema: bool
    is_ema: bool


def read_single_file(weights: Weights, *, ema: bool = False, where: str) -> SingleFile:
    """Find the U-Net and the other parts in ``weights``, which errors call ``where``.

    The plain U-Net is taken, unless ``ema`` asks for the averaged one or there is no other.

    Raises:
        TeacherError: there is no U-Net, there are two, it is not in the original layout, or it is not whole.
    """
    averaged = _averaged(weights)
    prefixes = [prefix for prefix in UNET_PREFIXES if any(name.startswith(prefix + BLOCKS) for name in weights)]
    _check_names(list(weights), prefixes, averaged, ema=ema, where=where)
    is_ema = ema or not prefixes
    tensors = averaged if is_ema else _below(weights, prefixes[0])
    inferred = infer_config({name: located.info.shape for name, located in tensors.items()}, where=where)
    return SingleFile(
        unet={name: tensors[ldm] for name, ldm in inferred.names.items()},
        inferred=inferred,
        parts=_parts(weights),
        has_ema=bool(averaged),
        is_ema=is_ema,
    )


def _below(weights: Weights, prefix: str) -> dict[str, Located]:
    """Return the tensors behind ``prefix`` by what follows it; of a bare U-Net, those of its own top modules."""
    heads = prefix or BARE_HEADS
    return {name.removeprefix(prefix): weights.locate(name) for name in weights if name.startswith(heads)}


def _parts(weights: Weights) -> dict[str, PartSource]:
    parts = {}
    for prefix, (component, kind) in PART_PREFIXES.items():
        tensors = _below(weights, prefix)
        if tensors:
            parts[component] = PartSource(kind, prefix, tensors)
    return parts


def _check_names(
    names: Collection[str], prefixes: list[str], averaged: Mapping[str, Located], *, ema: bool, where: str
) -> None:
    if not prefixes and not averaged:
        raise TeacherError(
            "there is no U-Net in the original layout in this file",
            where=where,
            expected="tensors named model.diffusion_model.input_blocks.…",
            found=_what_else(names),
        )
    if len(prefixes) > 1:
        raise TeacherError(
            f"there are {len(prefixes)} U-Nets in this file",
            where=where,
            expected="one",
            found=", ".join(f"{prefix}{BLOCKS}…" for prefix in prefixes),
            hint="take the file from before they were put together",
        )
    if ema and not averaged:
        raise TeacherError(
            "there are no averaged weights in this file",
            where=where,
            expected=f"tensors named {EMA_PREFIX}…",
            hint="leave out --variant ema",
        )
    own = (*UNET_PREFIXES[:-1], *BARE_HEADS, *PART_PREFIXES, EMA_PREFIX, "cond_stage_model.", "conditioner.")
    others = [name for name in names if not name.startswith(own)]
    what = recognise_names(others)
    if what is not None:
        raise TeacherError("there is more than a pipeline in this file", where=where, found=what)


def _what_else(names: Collection[str]) -> str:
    if any(name.startswith("down_blocks.") for name in names):
        return "a diffusers model without its config.json: put both into one folder, and give that"
    if any(name.startswith(tuple(PART_PREFIXES)) for name in names):
        components = sorted({c for prefix, (c, _) in PART_PREFIXES.items() if any(n.startswith(prefix) for n in names)})
        if not any(name.startswith(UNET_PREFIXES[:-1]) for name in names):
            return f"a checkpoint of {' and '.join(components)} alone"
    listed = f"{len(names)} tensors: {first_few(sorted(names))}" if names else "no tensors"
    return recognise_names(names) or listed


# --- averaged weights -------------------------------------------------------------------------------------------------

_WORDS = (
    "input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out",
    "in_layers", "emb_layers", "out_layers", "skip_connection", "op", "conv",
    "norm", "norm1", "norm2", "norm3", "proj_in", "proj_out", "transformer_blocks", "attn1", "attn2",
    "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "weight", "bias",
)  # fmt: skip
_TOKEN = re.compile("|".join(sorted(_WORDS, key=len, reverse=True)) + "|[0-9]+")
_TWO_NUMBERS = ("input_blocks", "output_blocks", "label_emb")
"""Behind these stand two numbers, of which the second has one digit."""


def _averaged(weights: Weights) -> dict[str, Located]:
    """Return the averaged U-Net by its names with their dots; a name that is not the grammar's stays what it is."""
    start = EMA_PREFIX + EMA_MODEL
    names = [name for name in weights if name.startswith(start)]
    return {_dotted(name.removeprefix(start)) or name: weights.locate(name) for name in names}


def _dotted(flat: str) -> str | None:
    """Put the dots back into a name: ``input_blocks100in_layers0bias`` is ``input_blocks.10.0.in_layers.0.bias``."""
    tokens = _TOKEN.findall(flat)
    if "".join(tokens) != flat:
        return None
    for i, token in enumerate(tokens):
        if i and tokens[i - 1] in _TWO_NUMBERS and token.isdigit() and len(token) > 1:
            tokens[i] = f"{token[:-1]}.{token[-1]}"
    return ".".join(tokens)
