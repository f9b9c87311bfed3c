"""Writing a whole student folder, or nothing."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.card import write_card
from unet_surgery.checkpoint.components import INDEX
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.layout import is_weights_file
from unet_surgery.checkpoint.reader import Weights
from unet_surgery.checkpoint.staging import Staging
from unet_surgery.checkpoint.teacher import TeacherFolder
from unet_surgery.checkpoint.writer import DEFAULT_SHARD_BYTES, write_weights
from unet_surgery.errors import OutputError, SurgeryError, TeacherError, first_few
from unet_surgery.lower import PLAN_FORMAT, SurgeryPlan

__all__ = ["CONFIG", "PLAN", "RECIPE", "StudentOptions", "config_text", "write_student"]

CONFIG, PLAN, RECIPE, CARD = "config.json", "plan.json", "recipe.yaml", "README.md"
SPARE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class StudentOptions:
    """How to write: the U-Net alone or the pipeline, shards, hard links for copied components, replacing."""

    unet_only: bool = False
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    link: bool = False
    force: bool = False


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
    """
    pipeline = teacher.is_pipeline and not options.unet_only
    components = teacher.components() if pipeline else ()
    sizes = {} if options.link else {c.folder / f: (c.folder / f).stat().st_size for c in components for f in c.files}
    total = plan.student_bytes + sum(sizes.values())
    _check_apart(out, teacher)
    with Staging(out, replace=_check_replaceable if options.force else None) as staging:
        _check_space(staging.folder, total)
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        root = staging.folder
        unet = root / "unet" if pipeline else root
        if pipeline:
            disk.make_folder(unet)
            disk.copy_file(teacher.root / INDEX, root / INDEX)
        disk.write_file(unet / CONFIG, config_text(plan))
        write_weights(plan, weights, unet, max_shard_bytes=options.max_shard_bytes, on_bytes=on_bytes)
        for component in components:
            disk.make_folder(root / component.name)
            for source, target in component.files.items():
                _copy_component_file(component.folder / source, root / component.name / target, options.link, on_bytes)
        disk.write_file(root / RECIPE, recipe_yaml.encode())
        disk.write_file(root / PLAN, plan.to_json().encode())
        disk.write_file(root / CARD, write_card(plan, pipeline=pipeline).encode())
        weights.check_unchanged()
        staging.commit()


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
    own = {CONFIG, PLAN, RECIPE, CARD, INDEX, "unet"}
    if INDEX in names:
        own |= read_object(folder / INDEX).keys()
    added = sorted(name for name in names - own if not is_weights_file(name))
    if added:
        raise OutputError(
            "--force would delete files that prune did not write",
            where=str(folder),
            found=first_few(added),
            hint="move them away, or choose another --out",
        )


def _copy_component_file(source: Path, target: Path, link: bool, on_bytes: disk.OnBytes) -> None:
    if link:
        try:
            disk.hard_link(source, target)
        except OSError as error:
            raise OutputError(
                "the file cannot be hard-linked",
                where=str(source),
                found=error.strerror,
                hint="leave --link out to copy it (both must be on one file system to link)",
            ) from error
        return
    try:
        disk.copy_file(source, target, on_bytes)
    except EOFError:
        raise TeacherError("a file of the teacher ended while it was read", where=str(source)) from None


def _check_apart(out: Path, teacher: TeacherFolder) -> None:
    """The output must not be the teacher, inside it, or around it: by device and inode, not by name."""
    real, root = Path(os.path.realpath(out)), Path(os.path.realpath(teacher.root))
    here = [p for p in (real, *real.parents) if p.exists()]
    inside = any(p.samefile(root) for p in here)
    around = real.exists() and any(p.samefile(real) for p in root.parents)
    if inside or around:
        raise OutputError(
            "the output is the teacher's folder, inside it or around it", where=str(out), hint="choose another --out"
        )


def _check_space(folder: Path, num_bytes: int) -> None:
    free = disk.free_bytes(folder)
    if free < num_bytes + SPARE_BYTES:
        raise OutputError(
            "there is not enough room on the disk",
            where=str(folder.parent),
            expected=f"{num_bytes / 1e9:.2f} GB",
            found=f"{free / 1e9:.2f} GB free",
            hint="free some, or write to another disk with --out",
        )
