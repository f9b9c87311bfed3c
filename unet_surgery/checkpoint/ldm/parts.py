"""VAEs and text encoders between the original layout and diffusers' components: other names, the same values.

No value changes. Convolutions of one pixel and linear layers are the same bytes; queries, keys and values lie one
behind the other in the original's one tensor; a projection is written transposed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Literal

from unet_surgery.checkpoint.header import TensorInfo
from unet_surgery.checkpoint.ldm.part_names import (
    OPEN_CLIP,
    VAE,
    VAE_ATTENTION,
    VAE_ATTENTION_BEFORE,
    num_up_stages,
    translate,
)
from unet_surgery.checkpoint.ldm.single_file import PartKind, PartSource
from unet_surgery.checkpoint.reader import Located
from unet_surgery.checkpoint.tensorfile import OutTensor, Transposed, in_file_order
from unet_surgery.errors import TeacherError, first_few

__all__ = ["read_part", "write_part"]

Tensors = Mapping[str, Located]
Direction = Literal["diffusers", "original"]

TEXT_MODEL = "text_model."
POSITION_IDS = "embeddings.position_ids"
PROJECTION, ORIGINAL_PROJECTION = "text_projection.weight", "text_projection"
QKV = ("q_proj", "k_proj", "v_proj")
SD2_PREFIX = "cond_stage_model."
SD2_LAYERS = 24
"""Of Stable Diffusion 2's text encoder; the last is never used, and diffusers does not keep it."""

# Tensors of the original that no forward here uses: a training loss, buffers, what CLIP's own training needed.
UNUSED: Mapping[PartKind, tuple[str, ...]] = {
    "vae": ("loss.", "model_ema."),
    "clip": ("logit_scale", PROJECTION),
    "open_clip": ("logit_scale", "attn_mask", "visual."),
}


def read_part(source: PartSource) -> list[OutTensor]:
    """Return what a diffusers component's file holds, made of a part of a single file; in the order of writing.

    Text encoders get the names that begin with ``text_model.``, as every version of transformers reads them.

    Raises:
        TeacherError: a tensor is unknown, missing or misshaped.
    """
    tensors = {name: t for name, t in source.tensors.items() if not name.startswith(UNUSED[source.kind])}
    if source.kind == "vae":
        made, known = _vae(tensors, "diffusers")
    elif source.kind == "clip":
        made, known = _clip(tensors)
    else:
        made, known = _read_open_clip(tensors, is_sd2=source.prefix.startswith(SD2_PREFIX))
    _check_made(tensors, made, known, source.kind)
    return in_file_order(made)


def write_part(kind: PartKind, weights: Tensors, prefix: str) -> list[OutTensor]:
    """Return a component's tensors as a single file has them behind ``prefix``.

    Accepts text encoders with and without ``text_model.``, and VAEs with the attention names of diffusers before 0.18.

    Raises:
        TeacherError: a tensor is unknown, missing or misshaped.
    """
    if kind == "vae":
        made, known = _vae(weights, "original")
    elif kind == "clip":
        made, known = _clip(weights)
    else:
        made, known = _write_open_clip(weights)
    _check_made(weights, made, known, kind)
    return [OutTensor(prefix + t.name, t.dtype, t.shape, t.content) for t in made]


def _check_made(tensors: Tensors, made: list[OutTensor], known: set[str], kind: PartKind) -> None:
    what, expected = ("VAE", "an AutoencoderKL") if kind == "vae" else ("text encoder", "a CLIP text model")
    unknown = [name for name in tensors if name not in known]
    twice = [name for name, count in Counter(tensor.name for tensor in made).items() if count > 1]
    if not made or unknown or twice:
        raise TeacherError(
            f"the {what} has tensors that are not known" if unknown else f"this is no {what}, or two in one",
            where=str(next(iter(tensors.values())).file.path) if tensors else None,
            expected=expected,
            found=f"{len(unknown or twice)} of {len(tensors)}: {first_few(unknown or twice)}",
            hint="--unet-only leaves it out",
        )


def _copied(name: str, source: Located, shape: tuple[int, ...] | None = None) -> OutTensor:
    return OutTensor(name, source.info.dtype, source.info.shape if shape is None else shape, (source,))


Made = tuple[list[OutTensor], set[str]]
"""What was made, and the names of what it was made of (or what is left out)."""


def _vae(tensors: Tensors, to: Direction) -> Made:
    num_up = num_up_stages(tensors)
    made, known = [], set()
    for name, source in tensors.items():
        shape = source.info.shape
        other = translate(name, VAE, to, num_up=num_up)
        if other is None:
            other = translate(name, VAE_ATTENTION, to)
            if other is None and to == "original":
                other = translate(name, VAE_ATTENTION_BEFORE, to)
            if other is not None and other.endswith(".weight"):
                shape = _as_convolution(name, source) if to == "original" else _as_linear(name, source)
        if other is not None:
            made.append(_copied(other, source, shape))
            known.add(name)
    return made, known


def _as_convolution(name: str, source: Located) -> tuple[int, ...]:
    return (*_as_linear(name, source), 1, 1)


def _as_linear(name: str, source: Located) -> tuple[int, ...]:
    """Return the shape of a matrix, which may be stored as a convolution of one pixel in one or two dimensions."""
    shape = source.info.shape
    if not 2 <= len(shape) <= 4 or prod(shape[2:]) != 1:
        raise _misshaped(name, source, "[outputs, inputs], or a convolution of one pixel")
    return shape[:2]


def _misshaped(name: str, source: Located, expected: str) -> TeacherError:
    return TeacherError(
        "a tensor has an impossible shape",
        where=f"{source.file.path}, tensor {name}",
        expected=expected,
        found=str(list(source.info.shape)),
    )


def _clip(tensors: Tensors) -> Made:
    """CLIP's names are diffusers' own; positions are counted, not stored."""
    names = _with_text_model(tensors)
    made = [_copied(other, tensors[name]) for name, other in names.items() if other is not None]
    return made, set(names)


def _with_text_model(tensors: Tensors) -> dict[str, str | None]:
    """Return name → the same with ``text_model.``, or None for what is not kept; unknown ones are not there."""
    names: dict[str, str | None] = {}
    for name in tensors:
        inner = name.removeprefix(TEXT_MODEL)
        if inner == POSITION_IDS:
            names[name] = None
        elif inner.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
            names[name] = TEXT_MODEL + inner
        elif name == PROJECTION:
            names[name] = name
    return names


def _read_open_clip(tensors: Tensors, *, is_sd2: bool) -> Made:
    made, known = [], set()
    unused = f"transformer.resblocks.{SD2_LAYERS - 1}." if is_sd2 else None
    for name, source in tensors.items():
        if (unused and name.startswith(unused)) or (is_sd2 and name == ORIGINAL_PROJECTION):
            known.add(name)
            continue
        other = translate(name, OPEN_CLIP, "diffusers")
        if other is not None:
            made.append(_copied(other, source))
        elif name == ORIGINAL_PROJECTION:
            made.append(_transposed(PROJECTION, source))
        elif name.endswith((".attn.in_proj_weight", ".attn.in_proj_bias")):
            made += _split(name, source)
        else:
            continue
        known.add(name)
    return made, known


def _split(name: str, source: Located) -> Iterator[OutTensor]:
    """Yield queries, keys and values: thirds of one tensor, each a range of its bytes."""
    block, _, leaf = name.rpartition(".attn.in_proj_")
    path = translate(f"{block}.attn.out_proj.weight", OPEN_CLIP, "diffusers")
    shape = source.info.shape
    if path is None or not shape or shape[0] % 3:
        raise _misshaped(name, source, "three matrices of one size, one below the other")
    third = source.info.num_bytes // 3
    for k, part in enumerate(QKV):
        info = TensorInfo(source.info.dtype, (shape[0] // 3, *shape[1:]), source.info.offset + k * third, third)
        located = Located(source.file, info, name)
        yield _copied(path.replace("out_proj.weight", f"{part}.{leaf}"), located)


def _transposed(name: str, source: Located) -> OutTensor:
    shape = source.info.shape
    if len(shape) != 2:
        raise _misshaped(name, source, "a matrix")
    return OutTensor(name, source.info.dtype, shape[::-1], Transposed(source))


def _write_open_clip(tensors: Tensors) -> Made:
    names = _with_text_model(tensors)
    by_name = {other: tensors[name] for name, other in names.items() if other is not None}
    made: list[OutTensor] = []
    known = {name for name, other in names.items() if other is None}
    for name, other in names.items():
        if other is None:
            continue
        original = translate(other, OPEN_CLIP, "original")
        if original is not None:
            made.append(_copied(original, by_name[other]))
        elif other == PROJECTION:
            made.append(_transposed(ORIGINAL_PROJECTION, by_name[other]))
        elif ".self_attn.q_proj." in other:
            made.append(_joined(other, by_name))
        elif not any(other.replace(f".{part}.", f".{QKV[0]}.") in by_name for part in QKV[1:] if f".{part}." in other):
            continue
        known.add(name)
    return made, known


def _joined(queries: str, tensors: Tensors) -> OutTensor:
    """Return the one tensor of queries, keys and values."""
    names = [queries.replace(QKV[0], part) for part in QKV]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise TeacherError(
            "the text encoder lacks a tensor", where=str(tensors[queries].file.path), expected=first_few(missing)
        )
    parts = tuple(tensors[name] for name in names)
    first = parts[0].info
    for name, part in zip(names, parts, strict=True):
        if not first.shape or part.info.shape != first.shape:
            raise _misshaped(name, part, f"{list(first.shape)}, as {queries} has")
    path, _, leaf = queries.rpartition(f"{QKV[0]}.")
    original = translate(f"{path}out_proj.weight", OPEN_CLIP, "original")
    if original is None or leaf not in ("weight", "bias"):
        raise _misshaped(queries, parts[0], "a weight or a bias of a layer")
    name = original.replace("out_proj.weight", f"in_proj_{leaf}")
    return OutTensor(name, first.dtype, (3 * first.shape[0], *first.shape[1:]), parts)
