"""From a teacher's adapter to its student's: every tensor renamed by where its module went, or dropped with it.

An adapter (LoRA, LoHa, LoKr, DoRA) changes modules that it names. A student's modules are the teacher's under other
names, so its change of them is the same change; no value is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unet_surgery.errors import TeacherError, first_few, printable
from unet_surgery.graph.nodes import UNetGraph
from unet_surgery.lower.adapterkeys import AdapterKey, KeyReader, check_pair, is_text_encoder, recognise_adapter
from unet_surgery.lower.modules import modules
from unet_surgery.lower.weights import Shape

__all__ = ["Moves", "Transplant", "make_transplant", "module_moves"]


@dataclass(frozen=True, slots=True)
class Moves:
    """Where each of the teacher's modules is in the student, or what removed it; and its weight's shape.

    ``student`` are all modules of the student that have a weight, those that no longer act included.
    """

    kept: Mapping[str, str]
    removed: Mapping[str, str]
    shapes: Mapping[str, Shape]
    student: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Transplant:
    """What becomes of an adapter: old name → new name of what is kept, and what was dropped because of which selector.

    ``modules`` are the student's modules it acts on, ``dropped`` the teacher's that the student lacks;
    ``num_text_tensors`` act on text encoders and stay.
    """

    names: Mapping[str, str]
    modules: tuple[str, ...]
    dropped: Mapping[str, tuple[str, ...]]
    num_dropped_tensors: int
    num_text_tensors: int


def module_moves(
    teacher: UNetGraph, student: UNetGraph, unused: Mapping[str, tuple[str, ...]], removed: Mapping[str, str]
) -> Moves:
    """Return where the modules of ``teacher`` went; ``unused`` and ``removed`` are the plan's, for who removed them.

    An attention that was bypassed counts as removed: what is left of it adds nothing, and must not begin to.
    """
    shapes = {name: t.shape for p in modules(teacher) for t in p.module.tensors if (name := _module(p.path, t.name))}
    placed = list(modules(student))
    bypassed = {p.source for p in placed if p.zeroed}
    own = {name: (p.source, t.name) for p in placed for t in p.module.tensors if (name := _module(p.path, t.name))}
    kept = {
        _module(source, tensor): name
        for name, (source, tensor) in own.items()
        if not any(source.startswith(path) for path in bypassed)
    }
    selectors = {tensor.rpartition(".")[0]: selector for selector, names in unused.items() for tensor in names}
    for path in bypassed:
        attention = path.rstrip(".")
        selectors |= {name: removed[attention] for name in shapes if name.startswith(path)}
    gone = {name: selectors.get(name, "(none)") for name in shapes if name not in kept}
    return Moves(kept, gone, shapes, tuple(own))


def make_transplant(teacher: UNetGraph, moves: Moves, tensors: Mapping[str, Shape]) -> Transplant:
    """Decide what becomes of an adapter's ``tensors`` (name → shape), in their order.

    Raises:
        TeacherError: they are no adapter for ``teacher`` (names the first ones), or nothing of it is left.
    """
    reader = KeyReader(teacher, moves.shapes)
    text = [name for name in tensors if is_text_encoder(name)]
    keys = {name: reader.read(name) for name in tensors if not is_text_encoder(name)}
    unknown = [name for name, key in keys.items() if key is None]
    if unknown:
        raise _foreign(unknown)
    known = {name: key for name, key in keys.items() if key is not None}
    if not known:
        raise TeacherError(
            "the LoRA has no part for the U-Net",
            found=f"{len(text)} tensors for text encoders",
            hint="it fits the student's pipeline as it is: surgery changes no text encoder",
        )
    _check_fit(known, tensors, moves)
    names: dict[str, str] = {}
    dropped: dict[str, dict[str, None]] = {}
    for name in tensors:
        key = known.get(name)
        if key is None:
            names[name] = name
        elif key.module in moves.kept:
            names[name] = key.named_for(moves.kept[key.module])
        else:
            dropped.setdefault(moves.removed[key.module], {})[key.module] = None
    acting = {key.module for key in known.values() if key.module in moves.kept}
    if not acting:
        raise TeacherError(
            "nothing of the LoRA is left: the student has none of the modules it acts on",
            found=f"removed by {first_few(sorted(dropped))}",
        )
    _check_unique(names)
    return Transplant(
        names=names,
        modules=tuple(student for module, student in moves.kept.items() if module in acting),
        dropped={selector: tuple(gone) for selector, gone in dropped.items()},
        num_dropped_tensors=len(tensors) - len(names),
        num_text_tensors=len(text),
    )


def _module(path: str, tensor: str) -> str:
    """Return the name of the module whose weight a tensor is; nothing for a bias."""
    module, _, leaf = (path + tensor).rpartition(".")
    return module if leaf == "weight" else ""


def _check_fit(keys: Mapping[str, AdapterKey], tensors: Mapping[str, Shape], moves: Moves) -> None:
    by_module: dict[str, dict[str, Shape]] = {}
    for name, key in keys.items():
        by_module.setdefault(key.module, {})[key.role] = tensors[name]
    for module, roles in by_module.items():
        check_pair(roles, moves.shapes[module], module)


def _check_unique(names: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for old, new in names.items():
        if new in seen:
            raise TeacherError(
                "two tensors of the LoRA are for the same module, in two ways of naming it",
                where=printable(old),
                found=f"also {printable(seen[new])}",
            )
        seen[new] = old


def _foreign(names: list[str]) -> TeacherError:
    return TeacherError(
        "this is no adapter for a Stable Diffusion U-Net",
        expected="a LoRA as diffusers, PEFT or kohya write it: unet.….lora_A.weight, lora_unet_….lora_down.weight, …",
        found=recognise_adapter(names) or f"{len(names)} other tensors: {first_few(names)}",
    )
