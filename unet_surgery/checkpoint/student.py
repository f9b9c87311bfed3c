"""Writing a whole student folder, or nothing."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.card import PICTURE, CardFacts, write_card
from unet_surgery.checkpoint.components import INDEX
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.layout import UNET_BASE, is_weights_file
from unet_surgery.checkpoint.licence import CARD, find_licence, is_licence_file
from unet_surgery.checkpoint.part_files import PartFiles, part_files, size_of, write_part_file
from unet_surgery.checkpoint.reader import Weights
from unet_surgery.checkpoint.staging import Staging
from unet_surgery.checkpoint.target import check_apart, check_space
from unet_surgery.checkpoint.teacher import TeacherFolder
from unet_surgery.checkpoint.writer import DEFAULT_SHARD_BYTES, DTYPES, write_weights
from unet_surgery.errors import OutputError, SurgeryError, first_few
from unet_surgery.lower import PLAN_FORMAT, SurgeryPlan
from unet_surgery.picture import draw

__all__ = ["CONFIG", "PLAN", "RECIPE", "TRAINING", "StudentOptions", "check_output", "config_text", "write_student"]

log = logging.getLogger(__name__)

CONFIG, PLAN, RECIPE = "config.json", "plan.json", "recipe.yaml"
TRAINING = "training.json"  # of a student that was trained: its weights are its own
SLACK_SECONDS = 2.0  # of a copy's times, and of file systems that count in even seconds


@dataclass(frozen=True, slots=True)
class StudentOptions:
    """How to write: the U-Net alone or the pipeline, shards, hard links for copied components, replacing.

    ``normalize`` mends old-layout faults of copied components; ``license`` names the teacher's where its card does not;
    ``version`` is this package's, for the card, which also says if the teacher's bytes were not ``compared`` with the
    Hub's hash of them.
    """

    version: str
    unet_only: bool = False
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    link: bool = False
    force: bool = False
    normalize: bool = False
    license: str | None = None
    compared: bool = True


def write_student(
    plan: SurgeryPlan,
    teacher: TeacherFolder,
    weights: Weights,
    recipe_yaml: str,
    out: Path,
    options: StudentOptions,
    progress: disk.Progress,
) -> None:
    """Write the student of ``plan`` to ``out``: it is there whole when this returns, and not at all when it raises.

    Raises:
        OutputError: ``out`` exists, is the teacher or inside it, has no room, or cannot be written.
        TeacherError: the teacher is damaged or changed meanwhile.
        UsageError: ``options.license`` contradicts the teacher's card.
    """
    parts = PartFiles() if options.unet_only else part_files(teacher, weights)
    pipeline = INDEX in parts.files
    mended = parts.mended if options.normalize else {}
    files = {**parts.files, **mended}
    licence = find_licence(teacher.cards, family=plan.family, given=options.license)
    facts = CardFacts(
        options.version,
        pipeline,
        licence,
        _again(plan, teacher, options),
        tuple(mended),
        address=teacher.address,
        base=None if teacher.base is None else teacher.base.name,
        own_parts=parts.own,
        assumed=teacher.assumed,
        compared=options.compared,
    )
    texts: dict[str, bytes] = {name: text.encode("utf-8") for name, text in licence.files.items()}
    texts |= {RECIPE: recipe_yaml.encode(), CARD: write_card(plan, facts).encode("utf-8")}
    texts |= {PICTURE: draw(plan).encode("utf-8"), PLAN: plan.to_json().encode()}  # the plan last: _check_untouched
    written = [file for file in files.values() if not (options.link and isinstance(file, Path))]
    total = plan.student_bytes + sum(map(size_of, written))
    _check_apart(out, teacher)
    with Staging(out, replace=_check_replaceable if options.force else None) as staging:
        check_space(staging.folder.parent, total + sum(map(len, texts.values())))
        on_bytes = disk.counting(progress, total)
        root = staging.folder
        unet = root / "unet" if pipeline else root
        if pipeline:
            disk.make_folder(unet)
        disk.write_file(unet / CONFIG, config_text(plan))
        write_weights(plan, weights, unet, max_shard_bytes=options.max_shard_bytes, on_bytes=on_bytes)
        for component in parts.components:
            disk.make_folder(root / component.name)
        for name, file in files.items():
            write_part_file(file, root / name, link=options.link and name != INDEX, on_bytes=on_bytes)
        for name, data in texts.items():
            disk.write_file(root / name, data)
        weights.check_unchanged()
        parts.check_unchanged()
        staging.commit()
    if licence.id is None:
        log.warning("the teacher names no licence, so the card has none: name it with --license before you publish")
    for fault in parts.faults if not options.normalize else ():
        log.warning("%s was copied with a fault: %s; --normalize mends it", fault.component, fault.fault)


def check_output(out: Path, teacher: TeacherFolder, options: StudentOptions, num_bytes: int) -> None:
    """Refuse an output that cannot be, before anything is fetched for it: see :func:`write_student`.

    Raises:
        OutputError: ``out`` exists, is the teacher or inside it, or has no room for ``num_bytes``.
    """
    _check_apart(out, teacher)
    Staging(out, replace=_check_replaceable if options.force else None).refuse_early()
    check_space(out.absolute().parent, num_bytes)


def _again(plan: SurgeryPlan, teacher: TeacherFolder, options: StudentOptions) -> tuple[str, ...]:
    """Return the options that make the same files again; a variant is only named where it was."""
    words: list[str] = []
    if teacher.variant is not None:
        words += ["--variant", teacher.variant]
    if teacher.base is not None and not options.unet_only:
        words += ["--base", teacher.base.name]
    if teacher.config_from is not None:
        words += ["--config", teacher.config_from]
    if plan.dtype is not None:
        words += ["--dtype", next(name for name, dtype in DTYPES.items() if dtype == plan.dtype)]
    if options.unet_only:
        words.append("--unet-only")
    if options.max_shard_bytes != DEFAULT_SHARD_BYTES:
        words += ["--max-shard-size", str(options.max_shard_bytes)]
    if options.normalize:
        words.append("--normalize")
    if options.license is not None:
        words += ["--license", options.license]
    return tuple(words)


def config_text(plan: SurgeryPlan) -> bytes:
    """Return the student's config.json, as diffusers writes it."""
    return (json.dumps(plan.student_config, indent=2, sort_keys=True) + "\n").encode()


def _check_replaceable(folder: Path) -> None:
    """``force`` replaces an empty folder or a student with nothing added to it: nothing of the user's may be lost."""
    names = {path.name for path in folder.iterdir()}
    if not names:
        return
    try:
        is_student = read_object(folder / PLAN).get("format") == PLAN_FORMAT
    except SurgeryError:
        is_student = False
    if not is_student:
        raise OutputError(
            "--force replaces students only, and this folder is not one",
            where=str(folder),
            expected=f"a {PLAN} that unet-surgery wrote",
            hint="move it away yourself, or choose another --out",
        )
    own = {CONFIG, PLAN, RECIPE, CARD, PICTURE, INDEX, "unet"}
    if INDEX in names:
        own |= read_object(folder / INDEX).keys()
    added = sorted(name for name in names - own if not _is_own(folder, name))
    unet = folder / "unet"
    if unet.is_dir():
        added += sorted(f"unet/{name}" for name in os.listdir(unet) if name != CONFIG and not _is_own(folder, name))
    if added:
        raise OutputError(
            "--force would delete files that prune did not write",
            where=str(folder),
            found=first_few(added),
            hint="move them away, or choose another --out",
        )
    _check_untouched(folder)


def _check_untouched(folder: Path) -> None:
    """A student that was trained in place, or whose card was edited, is the user's: plan.json is written last."""
    written = (folder / PLAN).stat().st_mtime
    changed = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.stat().st_mtime > written + SLACK_SECONDS
    ]
    if changed:
        raise OutputError(
            "--force would delete files that were changed since prune wrote them",
            where=str(folder),
            found=first_few(changed),
            hint="move it away, or choose another --out",
        )


def _is_own(folder: Path, name: str) -> bool:
    """True for weights under the names that prune gives them, and for licence texts that the card links to."""
    if is_weights_file(name) and name.startswith(UNET_BASE):
        return True
    try:
        card = (folder / CARD).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return is_licence_file(name) and f"]({name.replace(' ', '%20')})" in card


def _check_apart(out: Path, teacher: TeacherFolder) -> None:
    check_apart(out, teacher.root, "teacher")
    if teacher.base is not None:
        check_apart(out, teacher.base.root, "base")
