"""The verbs of the surgery itself: inspect, plan, prune, check.

A *teacher* is a folder (a diffusers pipeline or U-Net), a built-in name such as ``tiny-random``, or a Hub id
``org/name[/folder][@revision]``. A *recipe* is a built-in name, the path of a YAML file, or a :class:`Recipe`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from unet_surgery.checkpoint.bundled import FAMILY_TEACHERS, bundled_folder
from unet_surgery.checkpoint.check import CheckReport, check_student, read_plan, unet_folder
from unet_surgery.checkpoint.disk import Progress, counting, replace_file
from unet_surgery.checkpoint.header import MAX_HEADER_BYTES
from unet_surgery.checkpoint.match import check_dtypes, check_shapes
from unet_surgery.checkpoint.part_files import Made, part_files
from unet_surgery.checkpoint.reader import Weights
from unet_surgery.checkpoint.sizes import parse_size
from unet_surgery.checkpoint.student import StudentOptions, check_output, write_student
from unet_surgery.checkpoint.teacher import TeacherFolder, open_teacher
from unet_surgery.checkpoint.tensorfile import source_ranges
from unet_surgery.checkpoint.writer import DEFAULT_SHARD_BYTES, DTYPES, student_tensors
from unet_surgery.errors import (
    ConfigError,
    FamilyError,
    InexpressibleError,
    OutputError,
    SurgeryError,
    UsageError,
)
from unet_surgery.graph import Selection, UNetConfig, UNetGraph, build, family_of, parse_config
from unet_surgery.graph.family import describe
from unet_surgery.hub import ResolvedTeacher, Transfer, fetch_teacher, resolve_teacher
from unet_surgery.hub.open import open_resolved, opened_header
from unet_surgery.lower import (
    NodeReport,
    StoredWeights,
    SurgeryPlan,
    count,
    make_plan,
    report_nodes,
    shapes_of,
)
from unet_surgery.lower.counts import Counts
from unet_surgery.recipe import Recipe, builtin_text, load_recipe, nearest_for_family, nearest_for_selection, select
from unet_surgery.version import __version__

__all__ = [
    "ModelReport",
    "PruneResult",
    "check",
    "copy_recipe",
    "inspect_model",
    "named",
    "no_progress",
    "plan",
    "plan_families",
    "plan_whole",
    "prune",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What :func:`inspect_model` finds."""

    teacher_id: str
    family: str | None
    description: str
    latent_size: tuple[int, int]
    counts: Counts
    weights: StoredWeights | None
    unknown_keys: tuple[str, ...]
    nodes: tuple[NodeReport, ...]


@dataclass(frozen=True, slots=True)
class PruneResult:
    """A finished student: its folder, its plan, whether it is a pipeline or a U-Net alone, and what came over the wire.

    ``transfer`` is None for a teacher that is not of the Hub.
    """

    folder: Path
    plan: SurgeryPlan
    is_pipeline: bool
    transfer: Transfer | None = None


def no_progress(_done: int, _total: int) -> None:
    """Watch nothing."""


def inspect_model(
    teacher: str | Path,
    *,
    variant: str | None = None,
    config: str | Path | None = None,
    max_header: str | int = MAX_HEADER_BYTES,
) -> ModelReport:
    """Describe a teacher's U-Net from its config and, where there are weights, their header.

    A header larger than ``max_header`` (bytes, or text such as ``64MiB``) is refused, here and in all verbs.

    Raises:
        TeacherError: there is no U-Net there, or config and weights contradict each other.
        HubError: the teacher is on the Hub, which cannot be reached.
    """
    opened = open_resolved(resolve_teacher(named(teacher), variant=variant), max_header=max_header, config=config)
    _say_assumed(opened)
    config_of_it, graph = _graph(opened)
    stored = None
    with opened_header(opened) as weights:
        if weights is not None:
            _check_fit(graph, weights, opened)
            stored = weights.stored()
    return ModelReport(
        teacher_id=opened.teacher_id,
        family=family_of(graph),
        description=describe(graph),
        latent_size=graph.latent_size,
        counts=count(graph),
        weights=stored,
        unknown_keys=config_of_it.unknown_keys,
        nodes=report_nodes(config_of_it, graph),
    )


def plan(
    recipe: str | Path | Recipe,
    teacher: str | Path | None = None,
    *,
    variant: str | None = None,
    dtype: str | None = None,
    teacher_id: str | None = None,
    config: str | Path | None = None,
    max_header: str | int = MAX_HEADER_BYTES,
) -> SurgeryPlan:
    """Decide the surgery of ``recipe`` on ``teacher`` (default: the recipe's own) without writing anything.

    Reads the config and the weights' header; a folder with config.json alone is enough. Of a single file the config is
    inferred; ``config`` (a config.json, or a model whose U-Net has it) is taken instead.

    Raises:
        RecipeError: the recipe is wrong, for another family, or asks for what stock diffusers cannot express.
        TeacherError, HubError: as :func:`inspect_model`.
    """
    chosen = _recipe(recipe)
    found = resolve_teacher(_teacher_of(chosen, teacher), variant=variant)
    opened = open_resolved(found, teacher_id, max_header=max_header, config=config)
    _say_assumed(opened)
    with opened_header(opened) as weights:
        return _plan(chosen, opened, weights, dtype)


def plan_whole(teacher: str | Path, *, variant: str | None = None) -> SurgeryPlan:
    """Return the plan that removes nothing: ``teacher`` as it is, from its config alone.

    Raises:
        TeacherError, HubError: as :func:`inspect_model`.
    """
    opened = open_resolved(resolve_teacher(named(teacher), variant=variant), config_only=True)
    config, graph = _graph(opened)
    return make_plan(
        config,
        Selection({}),
        recipe={},
        teacher_id=opened.teacher_id,
        teacher_commit=opened.commit,
        teacher_variant=opened.variant,
        teacher=graph,
    )


def prune(
    recipe: str | Path | Recipe,
    teacher: str | Path | None = None,
    out: str | Path | None = None,
    *,
    variant: str | None = None,
    dtype: str | None = None,
    unet_only: bool = False,
    max_shard_size: str | int = DEFAULT_SHARD_BYTES,
    link: bool = False,
    force: bool = False,
    normalize: bool = False,
    license: str | None = None,  # noqa: A002  # the Hub's word, as in every card
    teacher_id: str | None = None,
    max_header: str | int = MAX_HEADER_BYTES,
    full: bool = False,
    base: str | Path | None = None,
    config: str | Path | None = None,
    progress: Progress = no_progress,
) -> PruneResult:
    """Write the student of ``recipe`` and ``teacher`` to ``out`` (default: ``./<teacher>-<recipe>``).

    The folder is there whole when this returns, and not at all when it raises. Without ``dtype`` (``fp32``, ``fp16``,
    ``bf16``) every kept weight is the teacher's, bit for bit. A U-Net folder, or ``unet_only``, gives a U-Net folder; a
    pipeline gives a pipeline. ``link`` hard-links the copied components, ``normalize`` mends what older libraries
    cannot read of them. ``license`` names the teacher's licence where its card does not. ``progress`` gets bytes done
    and in all.

    Where the teacher is a U-Net alone or a single file, ``base`` is a pipeline whose other parts the student gets;
    weights of these that a single file holds itself come from the file. ``config`` as in :func:`plan`.

    Of a teacher on the Hub only the bytes that the student keeps are fetched, unless the Hub cache holds the file or
    ``full`` asks for the whole of it, which is then compared with its checksum.

    Raises:
        RecipeError, TeacherError, HubError: as :func:`plan`.
        OutputError: ``out`` exists (without ``force``), has no room, or cannot be written.
    """
    chosen = _recipe(recipe)
    if out is not None and not str(out).strip():
        raise UsageError("the output is empty text", hint="give a folder that does not exist yet")
    options = StudentOptions(
        version=__version__,
        unet_only=unet_only,
        max_shard_bytes=parse_size(max_shard_size),
        link=link,
        force=force,
        normalize=normalize,
        license=license,
    )
    found = resolve_teacher(_teacher_of(chosen, teacher), variant=variant)
    others = None if base is None else resolve_teacher(named(base), variant=None if found.file else variant)
    # What is wrong with recipe, config or header is found before gigabytes are made or fetched.
    offered = None if others is None else open_resolved(others, config_only=True)
    early = open_resolved(
        found, teacher_id, max_header=max_header, config_only=found.remote is None, config=config, offered=offered
    )
    if offered is not None:
        early.with_base(offered)
    _say_assumed(early)
    with opened_header(early) as weights:
        decided = _plan(chosen, early, weights, dtype)
    target = Path(f"{found.name}-{chosen.name}" if out is None else out)
    if found.hub is not None:
        check_output(target, early, options, decided.student_bytes)
    found = fetch_teacher(found, unet_only=unet_only, full=full, progress=progress)
    opened = open_resolved(found, teacher_id, max_header=max_header, config=config, offered=offered)
    if others is not None and not unet_only:
        opened = opened.with_base(_parts_of(others, progress))
    transfer = _fetch_kept(found, opened, decided, progress)
    options = replace(options, compared=transfer is None or not transfer.by_range)
    with opened.open_weights() as weights:
        decided = _plan(chosen, opened, weights, dtype)
        if found.remote is not None:
            found.remote.require(_kept(opened, weights, decided))
        write_student(decided, opened, weights, chosen.to_yaml(), target, options, progress)
    return PruneResult(target, decided, opened.pipeline is not None and not unet_only, transfer)


def check(
    folder: str | Path,
    teacher: str | Path | None = None,
    *,
    base: str | Path | None = None,
    variant: str | None = None,
    max_header: str | int = MAX_HEADER_BYTES,
    progress: Progress = no_progress,
) -> CheckReport:
    """Check a student folder against its plan and, with ``teacher``, every copied byte against the teacher's.

    ``base`` is the pipeline that its other parts came from, where the teacher is a U-Net alone; ``variant`` is the
    plan's by default. Of a teacher on the Hub the same parts are compared that prune fetches.

    Raises:
        VerificationError: something differs; names the tensors.
        TeacherError, HubError: ``teacher`` cannot be read, or is another one.
    """
    opened, by_range = None, False
    if teacher is None and base is not None:
        raise UsageError("a base without a teacher compares nothing", hint="give --teacher as well")
    if teacher is not None:
        student = Path(folder)
        decided, alone = read_plan(student), unet_folder(student) == student
        variant = decided.teacher_variant if variant is None else variant
        found = resolve_teacher(named(teacher), variant=variant)
        found = fetch_teacher(found, unet_only=alone, progress=progress)
        opened = open_resolved(found, max_header=max_header)
        if base is not None and not alone:
            others = resolve_teacher(named(base), variant=None if found.file else variant)
            opened = opened.with_base(_parts_of(others, progress))
        _fetch_kept(found, opened, decided, progress)
        by_range = found.remote is not None
    report = check_student(Path(folder), opened, progress, max_header_bytes=parse_size(max_header))
    return replace(report, by_range=by_range)


def plan_families(recipe: Recipe) -> dict[str, SurgeryPlan]:
    """Return family → the plan of ``recipe`` on that family's full-size U-Net, for every family it serves.

    A recipe that names no families is tried on all of them.

    Raises:
        RecipeError: it fails on a family that it names, or on every one there is.
    """
    plans: dict[str, SurgeryPlan] = {}
    failure: SurgeryError | None = None
    for family, name in FAMILY_TEACHERS.items():
        if recipe.families is not None and family not in recipe.families:
            continue
        try:
            plans[family] = _plan(recipe, open_teacher(bundled_folder(name), teacher_id=name), None, None)
        except SurgeryError as error:
            if recipe.families is not None:
                raise
            failure = failure or error
    if not plans and failure is not None:
        raise failure
    return plans


def copy_recipe(name: str, file: Path) -> None:
    """Write the YAML of a recipe, as it is written, to the new file ``file``.

    Raises:
        RecipeError: there is no such recipe.
        OutputError: the file exists or cannot be written.
    """
    text = builtin_text(name)
    try:
        replace_file(file, text.encode())
    except FileExistsError:
        raise OutputError("the file exists", where=str(file), hint="choose another name") from None
    except OSError as error:
        raise OutputError("the file cannot be written", where=str(file), found=error.strerror) from error


def _recipe(recipe: str | Path | Recipe) -> Recipe:
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe)
    if recipe.extends:
        raise SurgeryError("a Recipe made in Python must list all it removes", hint="load_recipe follows extends")
    return recipe


def _teacher_of(recipe: Recipe, teacher: str | Path | None) -> str:
    if teacher is not None:
        return named(teacher)
    if recipe.teacher is None:
        raise FamilyError(f"the recipe {recipe.name!r} names no teacher", hint="give one with --teacher")
    return recipe.teacher


def named(teacher: str | Path) -> str:
    """Return what the user wrote for a model; UsageError if that is nothing."""
    if not str(teacher):
        raise UsageError("the teacher is empty text", hint="give a folder, a Hub id or a built-in name")
    return str(teacher)


def _say_assumed(teacher: TeacherFolder) -> None:
    if teacher.assumed:
        # a path of this machine may be shown here, though not in a card
        if teacher.config_where is not None:
            log.warning("the config of %s is taken from %s", teacher.unet.name, teacher.config_where)
            return
        lines = "".join(f"\n  {line}" for line in teacher.assumed)
        log.warning("what the weights of %s do not say was taken as follows:%s", teacher.unet.name, lines)


def _graph(teacher: TeacherFolder) -> tuple[UNetConfig, UNetGraph]:
    try:
        config = parse_config(teacher.config)
    except ConfigError as error:
        place = str(teacher.unet / "config.json") if teacher.single is None else f"the config of {teacher.unet}"
        error.where = f"{place}, key {error.where}" if error.where else place
        raise
    return config, build(config)


def _check_fit(graph: UNetGraph, weights: Weights, teacher: TeacherFolder) -> None:
    check_shapes(shapes_of(graph), weights.shapes(), where=str(teacher.unet))
    check_dtypes(weights.dtypes(), where=str(teacher.unet))


def _parts_of(base: ResolvedTeacher, progress: Progress) -> TeacherFolder:
    return open_resolved(fetch_teacher(base, parts_only=True, progress=progress), config_only=True)


def _kept(teacher: TeacherFolder, weights: Weights, plan: SurgeryPlan) -> dict[str, list[tuple[int, int]]]:
    """Return what of a remote teacher's files the student of ``plan`` is made of: file → ranges."""
    if any(source is not None and source not in weights for source in plan.weights.values()):
        return {}  # another teacher's: who compares the two says so
    tensors = student_tensors(plan, weights)
    if teacher.single is not None:
        files = part_files(teacher, weights).files.values()
        tensors += [tensor for file in files if isinstance(file, Made) for tensor in file.tensors]
    return source_ranges(tensors)


def _fetch_kept(
    found: ResolvedTeacher, teacher: TeacherFolder, plan: SurgeryPlan, progress: Progress
) -> Transfer | None:
    """Fetch what the student of ``plan`` keeps of weights on the Hub; return what came over the wire in this run."""
    if found.remote is None:
        return found.transfer
    with teacher.open_weights() as weights:
        wanted = _kept(teacher, weights, plan)
    on_bytes = counting(progress, found.remote.missing(wanted))
    before = 0 if found.transfer is None else found.transfer.file_bytes
    return Transfer(before, found.remote.fetch(wanted, on_bytes), found.remote.num_bytes, by_range=True)


def _plan(recipe: Recipe, teacher: TeacherFolder, weights: Weights | None, dtype: str | None) -> SurgeryPlan:
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"there is no dtype {dtype!r}", expected=", ".join(DTYPES))
    config, graph = _graph(teacher)
    if weights is not None:
        _check_fit(graph, weights, teacher)
    family = family_of(graph)
    if recipe.families is not None and family not in recipe.families:
        nearest = nearest_for_family(recipe, family)
        raise FamilyError(
            f"the recipe {recipe.name!r} is not for this teacher",
            where=recipe.families_origin,
            expected="a U-Net of " + " or ".join(recipe.families),
            found=describe(graph),
            hint=f"the nearest recipe for it is {nearest!r}" if nearest else "write a recipe without families: for it",
        )
    selection = select(recipe, graph)
    try:
        return make_plan(
            config,
            selection,
            recipe=recipe.to_data(),
            teacher_id=teacher.teacher_id,
            teacher_commit=teacher.commit,
            teacher_variant=teacher.variant,
            allow_skip_change=recipe.allow_skip_change,
            weights=None if weights is None else weights.stored(),
            tensor_bytes=None if weights is None else weights.tensor_bytes(),
            dtype=None if dtype is None else DTYPES[dtype],
            teacher=graph,
        )
    except InexpressibleError as error:
        raise _located(error, recipe, graph, selection) from None


def _located(error: InexpressibleError, recipe: Recipe, graph: UNetGraph, selection: Selection) -> InexpressibleError:
    """Add the recipe's line and the nearest recipe that can be expressed."""
    culprit = next(
        (
            selector
            for path in error.about
            for node, selector in selection.nodes.items()
            if node == path or node.startswith(f"{path}.")
        ),
        None,
    )
    error.at(
        recipe.families_origin.rsplit(":", 2)[0] if culprit is None else recipe.origin(recipe.remove.index(culprit))
    )
    nearest = nearest_for_selection(graph, selection)
    if nearest is not None:
        error.hint = f"{error.hint}; or use {nearest!r}, the nearest built-in recipe" if error.hint else nearest
    return error
