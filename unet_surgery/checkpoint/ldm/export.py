"""Writing a diffusers folder as one file in the original layout."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.components import WITHOUT_WEIGHTS, Component
from unet_surgery.checkpoint.header import MAX_HEADER_BYTES, encode_header
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.layout import component_weights
from unet_surgery.checkpoint.ldm.parts import write_part
from unet_surgery.checkpoint.ldm.runtimes import Verdict, verdicts
from unet_surgery.checkpoint.ldm.single_file import UNET_PREFIX, PartKind
from unet_surgery.checkpoint.match import check_dtypes, check_shapes
from unet_surgery.checkpoint.reader import Weights, open_weights
from unet_surgery.checkpoint.target import check_space, check_target, write_target
from unet_surgery.checkpoint.teacher import TeacherFolder, open_teacher
from unet_surgery.checkpoint.tensorfile import METADATA, OutTensor, in_file_order, write_tensors
from unet_surgery.checkpoint.writer import DTYPES
from unet_surgery.errors import ConfigError, OutputError, TeacherError, UsageError, printable
from unet_surgery.graph import UNetGraph, build, parse_config
from unet_surgery.lower import shapes_of
from unet_surgery.lower.original import NUMBERINGS, Numbering, unet_names

__all__ = ["ExportResult", "export"]

SUFFIX = ".safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
KINDS = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
"""Components that have a place in a single file, each of the one class that fits it."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """A finished file: which parts are in it, which were left out, and who takes it."""

    file: Path
    num_bytes: int
    numbering: Numbering
    parts: tuple[str, ...]
    left_out: tuple[str, ...]
    verdicts: tuple[Verdict, ...]


def export(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    to: str = "ldm",
    numbering: str = "dense",
    unet_only: bool = False,
    dtype: str | None = None,
    variant: str | None = None,
    force: bool = False,
    max_header_bytes: int = MAX_HEADER_BYTES,
    progress: disk.Progress = lambda _done, _total: None,
) -> ExportResult:
    """Write the pipeline or U-Net in ``folder`` to the one file ``out`` (default: ``./<folder's name>.safetensors``).

    ``to`` is ``ldm``, the original layout of Stable Diffusion, with blocks numbered ``dense`` or ``gapped``. The file
    is there whole when this returns, and not at all when it raises. Without ``dtype`` (``fp32``, ``fp16``, ``bf16``) no
    value changes. ``progress`` gets bytes done and in all.

    Raises:
        UsageError: the layout cannot say what this U-Net is, or an argument has a wrong value.
        TeacherError: the folder holds no U-Net, or a part of it is damaged.
        OutputError: ``out`` exists (without ``force``), is in ``folder``, has no room, or cannot be written.
    """
    if to != "ldm":
        raise UsageError(f"there is no layout {printable(to)!r}", expected="ldm")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"there is no dtype {printable(dtype)!r}", expected=", ".join(DTYPES))
    chosen = _numbering(numbering)
    root = Path(folder)
    target = Path(f"{os.path.basename(os.path.abspath(root))}{SUFFIX}" if out is None else out)
    _check_target(target, root, force=force)
    source = open_teacher(root, variant=variant, max_header_bytes=max_header_bytes)
    graph = _graph(source)
    judged = verdicts(graph, chosen, prediction_type=_prediction_type(source))
    components = () if unet_only else source.components()
    places = _places([c for c in components if c.kind == KINDS.get(c.name)], graph)
    with ExitStack() as stack:
        unet = stack.enter_context(source.open_weights())
        opened = {
            "unet": unet,
            **{c.name: stack.enter_context(_open(c, source)) for c in components if c.name in places},
        }
        _check_fit(graph, unet, source)
        tensors = _unet(unet, unet_names(graph, chosen))
        for name, (kind, prefix) in places.items():
            weights = opened[name]
            tensors += write_part(kind, {tensor: weights.locate(tensor) for tensor in weights}, prefix)
        if dtype is not None:
            tensors = [replace(tensor, dtype=DTYPES[dtype]) for tensor in tensors]
        num_bytes = _write(target, in_file_order(tensors), opened, components, force=force, progress=progress)
    left_out = tuple(c.name for c in components if c.name not in opened and _has_weights(c))
    return ExportResult(target, num_bytes, chosen, tuple(opened), left_out, judged)


def _numbering(text: str) -> Numbering:
    for numbering in NUMBERINGS:
        if text == numbering:
            return numbering
    raise UsageError(f"there is no numbering {printable(text)!r}", expected=" or ".join(NUMBERINGS))


# --- what is written --------------------------------------------------------------------------------------------------


def _graph(source: TeacherFolder) -> UNetGraph:
    try:
        return build(parse_config(source.config))
    except ConfigError as error:
        place = str(source.unet / "config.json")
        error.where = f"{place}, key {error.where}" if error.where else place
        raise


def _check_fit(graph: UNetGraph, weights: Weights, source: TeacherFolder) -> None:
    check_shapes(shapes_of(graph), weights.shapes(), where=str(source.unet))
    check_dtypes(weights.dtypes(), where=str(source.unet))


def _unet(weights: Weights, names: Mapping[str, str]) -> list[OutTensor]:
    located = {UNET_PREFIX + original: weights.locate(name) for name, original in names.items()}
    return [OutTensor(name, source.info.dtype, source.info.shape, (source,)) for name, source in located.items()]


def _places(components: Sequence[Component], graph: UNetGraph) -> dict[str, tuple[PartKind, str]]:
    """Return component → whose names it has in the file, and the prefix before them; some have no place there."""
    names = {component.name for component in components}
    places: dict[str, tuple[PartKind, str]] = {"vae": ("vae", "first_stage_model.")}
    if graph.stem.addition_embedding_dim is not None:
        places["text_encoder"] = ("clip", "conditioner.embedders.0.transformer.")
        number = 1 if "text_encoder" in names else 0  # the refiner has only the second
        places["text_encoder_2"] = ("open_clip", f"conditioner.embedders.{number}.model.")
    elif graph.stem.linear_projection:
        places["text_encoder"] = ("open_clip", "cond_stage_model.model.")
    else:
        places["text_encoder"] = ("clip", "cond_stage_model.transformer.")
    return {name: place for name, place in places.items() if name in names}


def _has_weights(component: Component) -> bool:
    return not component.kind.removesuffix("Fast").endswith(WITHOUT_WEIGHTS)


def _open(component: Component, source: TeacherFolder) -> Weights:
    chosen = component_weights(os.listdir(component.folder), source.variant)
    if chosen is None:
        raise TeacherError(
            "a component has no safetensors weights",
            where=str(component.folder),
            hint="convert it first: save_pretrained writes safetensors; or --unet-only",
        )
    return open_weights(component.folder, chosen, max_header_bytes=source.max_header_bytes)


def _prediction_type(source: TeacherFolder) -> str | None:
    """Return what the pipeline's scheduler takes the U-Net to predict; None where there is none to say so."""
    path = source.root / SCHEDULER
    if not source.is_pipeline or not path.is_file():
        return None
    value = read_object(path).get("prediction_type", "epsilon")
    return value if isinstance(value, str) else None


# --- writing it -------------------------------------------------------------------------------------------------------


def _check_target(target: Path, root: Path, *, force: bool) -> None:
    check_target(target, root, force=force)
    parent = Path(os.path.realpath(target.parent))
    if root.exists() and any(path.samefile(root) for path in (parent, *parent.parents)):
        raise OutputError("the output is inside the exported folder", where=str(target), hint="choose another --out")


def _write(
    target: Path,
    tensors: Sequence[OutTensor],
    opened: Mapping[str, Weights],
    components: Sequence[Component],
    *,
    force: bool,
    progress: disk.Progress,
) -> int:
    header = encode_header([(t.name, t.dtype, t.shape) for t in tensors], METADATA)
    total = len(header) + sum(tensor.num_bytes for tensor in tensors)
    check_space(target.parent, total)
    on_bytes = disk.counting(progress, total, len(header))

    def write(fd: int) -> None:
        write_tensors(fd, tensors, on_bytes)
        for weights in opened.values():
            weights.check_unchanged()
        for component in components:
            component.check_unchanged()

    write_target(target, write, force=force)
    return total
