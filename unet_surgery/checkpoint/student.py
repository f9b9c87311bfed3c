"""Writing a whole student folder, or nothing."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.card import PICTURE, CardFacts, write_card
from unet_surgery.checkpoint.components import INDEX, Component
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.layout import UNET_BASE, is_weights_file
from unet_surgery.checkpoint.licence import CARD, find_licence, is_licence_file
from unet_surgery.checkpoint.normalize import Content, Mending, mendings
from unet_surgery.checkpoint.reader import Weights
from unet_surgery.checkpoint.staging import Staging
from unet_surgery.checkpoint.target import check_apart, check_space
from unet_surgery.checkpoint.teacher import TeacherFolder
from unet_surgery.checkpoint.writer import DEFAULT_SHARD_BYTES, DTYPES, write_weights
from unet_surgery.errors import OutputError, SurgeryError, TeacherError, first_few
from unet_surgery.lower import PLAN_FORMAT, SurgeryPlan
from unet_surgery.picture import draw

__all__ = ["CONFIG", "PLAN", "RECIPE", "StudentOptions", "config_text", "write_student"]

log = logging.getLogger(__name__)

CONFIG, PLAN, RECIPE = "config.json", "plan.json", "recipe.yaml"
SLACK_SECONDS = 2.0  # of a copy's times, and of file systems that count in even seconds


@dataclass(frozen=True, slots=True)
class StudentOptions:
    """How to write: the U-Net alone or the pipeline, shards, hard links for copied components, replacing.

    ``normalize`` mends old-layout faults of copied components; ``license`` names the teacher's where its card does not;
    ``version`` is this package's, for the card.
    """

    version: str
    unet_only: bool = False
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    link: bool = False
    force: bool = False
    normalize: bool = False
    license: str | None = None


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
    pipeline = teacher.is_pipeline and not options.unet_only
    components = teacher.components() if pipeline else ()
    faults = mendings(components, teacher.variant, max_header_bytes=teacher.max_header_bytes)
    mended = faults if options.normalize else ()
    licence = find_licence(teacher.root, family=plan.family, given=options.license)
    files = dict(_component_files(components, mended))
    facts = CardFacts(options.version, pipeline, licence, _again(plan, teacher, options), _mended_names(mended))
    texts: dict[str, bytes] = {name: text.encode("utf-8") for name, text in licence.files.items()}
    texts |= {RECIPE: recipe_yaml.encode(), CARD: write_card(plan, facts).encode("utf-8")}
    texts |= {PICTURE: draw(plan).encode("utf-8"), PLAN: plan.to_json().encode()}  # the plan last: _check_untouched
    total = plan.student_bytes + sum(_size(content) for content in files.values() if not _links(content, options))
    check_apart(out, teacher.root, "teacher")
    with Staging(out, replace=_check_replaceable if options.force else None) as staging:
        check_space(staging.folder, total + sum(map(len, texts.values())))
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        root = staging.folder
        unet = root / "unet" if pipeline else root
        if pipeline:
            disk.make_folder(unet)
            _copy(teacher.root / INDEX, root / INDEX, _ignore)
        disk.write_file(unet / CONFIG, config_text(plan))
        write_weights(plan, weights, unet, max_shard_bytes=options.max_shard_bytes, on_bytes=on_bytes)
        for component in components:
            disk.make_folder(root / component.name)
        for name, content in files.items():
            _write_component_file(content, root / name, options, on_bytes)
        for name, data in texts.items():
            disk.write_file(root / name, data)
        weights.check_unchanged()
        for component in components:
            component.check_unchanged()
        staging.commit()
    if licence.id is None:
        log.warning("the teacher names no licence, so the card has none: name it with --license before you publish")
    for fault in faults if not options.normalize else ():
        log.warning("%s was copied with a fault: %s; --normalize mends it", fault.component, fault.fault)


def _mended_names(mended: Sequence[Mending]) -> tuple[str, ...]:
    return tuple(f"{mending.component}/{name}" for mending in mended for name in mending.files)


def _component_files(
    components: Sequence[Component], mended: Sequence[Mending]
) -> Iterator[tuple[str, Path | Content]]:
    """Yield path in the student → the teacher's file that is copied there, or what is written instead."""
    for component in components:
        for source, target in component.files.items():
            yield f"{component.name}/{target}", component.folder / source
    for mending in mended:
        for name, content in mending.files.items():
            yield f"{mending.component}/{name}", content


def _again(plan: SurgeryPlan, teacher: TeacherFolder, options: StudentOptions) -> tuple[str, ...]:
    """Return the options that make the same files again; a variant is only named where it was."""
    words: list[str] = []
    if teacher.variant is not None:
        words += ["--variant", teacher.variant]
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


def _size(content: Path | Content) -> int:
    if isinstance(content, Path):
        return content.stat().st_size
    return len(content.head) + (0 if content.source is None else content.source.stat().st_size - content.offset)


def _links(content: Path | Content, options: StudentOptions) -> bool:
    return options.link and isinstance(content, Path)


def _write_component_file(
    content: Path | Content, target: Path, options: StudentOptions, on_bytes: disk.OnBytes
) -> None:
    if isinstance(content, Content):
        _write_content(content, target, on_bytes)
    elif options.link:
        _link(content, target)
    else:
        _copy(content, target, on_bytes)


def _write_content(content: Content, target: Path, on_bytes: disk.OnBytes) -> None:
    fd = disk.create(target)
    try:
        disk.write(fd, content.head)
        on_bytes(len(content.head))
        if content.source is not None:
            with content.source.open("rb") as source:
                length = os.fstat(source.fileno()).st_size - content.offset
                disk.copy_range(source.fileno(), content.offset, length, fd, on_bytes)
        disk.fsync(fd)
    except EOFError:
        raise _ended(str(content.source)) from None
    finally:
        os.close(fd)


def _link(source: Path, target: Path) -> None:
    try:
        disk.hard_link(source, target)
    except OSError as error:
        raise OutputError(
            "the file cannot be hard-linked",
            where=str(source),
            found=error.strerror,
            hint="leave --link out to copy it (both must be on one file system to link)",
        ) from error


def _copy(source: Path, target: Path, on_bytes: disk.OnBytes) -> None:
    before = source.stat()
    try:
        disk.copy_file(source, target, on_bytes)
    except EOFError:
        raise _ended(str(source)) from None
    after = source.stat()
    if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
        raise TeacherError("the teacher changed while it was read", where=str(source), hint="run again")


def _ignore(_: int) -> None:
    """The index is too small to count."""


def _ended(where: str) -> TeacherError:
    return TeacherError("a file of the teacher ended while it was read", where=where, hint="run again")
