"""The verbs: inspect, plan, prune, check. Thin compositions of the packages below, without torch.

A *teacher* is a folder (a diffusers pipeline or U-Net), a built-in name such as ``tiny-random``, or a Hub id
``org/name[@revision]``. A *recipe* is a built-in name, the path of a YAML file, or a :class:`Recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unet_surgery.checkpoint.bundled import FAMILY_TEACHERS, bundled_folder
from unet_surgery.checkpoint.check import CheckReport, check_student
from unet_surgery.checkpoint.disk import Progress, replace_file
from unet_surgery.checkpoint.header import MAX_HEADER_BYTES
from unet_surgery.checkpoint.match import check_dtypes, check_shapes
from unet_surgery.checkpoint.reader import Weights
from unet_surgery.checkpoint.student import StudentOptions, write_student
from unet_surgery.checkpoint.teacher import TeacherFolder, is_hub_id, open_teacher
from unet_surgery.checkpoint.writer import DEFAULT_SHARD_BYTES, DTYPES
from unet_surgery.errors import (
    ConfigError,
    FamilyError,
    InexpressibleError,
    OutputError,
    SurgeryError,
    TeacherError,
    UsageError,
    printable,
)
from unet_surgery.graph import Selection, UNetConfig, UNetGraph, build, family_of, parse_config
from unet_surgery.graph.family import describe
from unet_surgery.hub import ResolvedTeacher, resolve_teacher
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
    "parse_size",
    "plan",
    "plan_families",
    "plan_whole",
    "prune",
]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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
    """A finished student: its folder, its plan, and whether it is a pipeline or a U-Net alone."""

    folder: Path
    plan: SurgeryPlan
    is_pipeline: bool


def no_progress(_done: int, _total: int) -> None:
    """Watch nothing."""


def inspect_model(
    teacher: str | Path, *, variant: str | None = None, max_header: str | int = MAX_HEADER_BYTES
) -> ModelReport:
    """Describe a teacher's U-Net from its config and, where there are weights, their header.

    A header larger than ``max_header`` (bytes, or text such as ``64MiB``) is refused, here and in all verbs.

    Raises:
        TeacherError: there is no U-Net there, or config and weights contradict each other.
        HubError: the teacher is on the Hub, which cannot be reached.
    """
    found = resolve_teacher(str(teacher), weights=False, variant=variant, progress=no_progress)
    opened = _open(found, max_header=max_header)
    config, graph = _graph(opened)
    stored = None
    if opened.weights is not None:
        with opened.open_weights() as weights:
            _check_fit(graph, weights, opened)
            stored = weights.stored()
    return ModelReport(
        teacher_id=opened.teacher_id,
        family=family_of(graph),
        description=describe(graph),
        latent_size=graph.latent_size,
        counts=count(graph),
        weights=stored,
        unknown_keys=config.unknown_keys,
        nodes=report_nodes(config, graph),
    )


def plan(
    recipe: str | Path | Recipe,
    teacher: str | Path | None = None,
    *,
    variant: str | None = None,
    dtype: str | None = None,
    teacher_id: str | None = None,
    max_header: str | int = MAX_HEADER_BYTES,
) -> SurgeryPlan:
    """Decide the surgery of ``recipe`` on ``teacher`` (default: the recipe's own) without writing anything.

    Reads the config and the weights' header; a folder with config.json alone is enough.

    Raises:
        RecipeError: the recipe is wrong, for another family, or asks for what stock diffusers cannot express.
        TeacherError, HubError: as :func:`inspect_model`.
    """
    chosen = _recipe(recipe)
    found = resolve_teacher(_teacher_of(chosen, teacher), weights=False, variant=variant, progress=no_progress)
    opened = _open(found, teacher_id, max_header=max_header)
    if opened.weights is None:
        return _plan(chosen, opened, None, dtype)
    with opened.open_weights() as weights:
        return _plan(chosen, opened, weights, dtype)


def plan_whole(teacher: str | Path, *, variant: str | None = None) -> SurgeryPlan:
    """Return the plan that removes nothing: ``teacher`` as it is, from its config alone.

    Raises:
        TeacherError, HubError: as :func:`inspect_model`.
    """
    found = resolve_teacher(_named(teacher), weights=False, variant=variant, progress=no_progress)
    opened = _open(found, config_only=True)
    config, graph = _graph(opened)
    return make_plan(config, Selection({}), recipe={}, teacher_id=opened.teacher_id, teacher=graph)


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
    progress: Progress = no_progress,
) -> PruneResult:
    """Write the student of ``recipe`` and ``teacher`` to ``out`` (default: ``./<teacher>-<recipe>``).

    The folder is there whole when this returns, and not at all when it raises. Without ``dtype`` (``fp32``, ``fp16``,
    ``bf16``) every kept weight is the teacher's, bit for bit. A U-Net folder, or ``unet_only``, gives a U-Net folder; a
    pipeline gives a pipeline. ``link`` hard-links the copied components, ``normalize`` mends what older libraries
    cannot read of them. ``license`` names the teacher's licence where its card does not. ``progress`` gets bytes done
    and in all.

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
    named = _teacher_of(chosen, teacher)
    _refuse_early(chosen, named, variant, dtype, teacher_id)
    found = resolve_teacher(named, weights=True, variant=variant, unet_only=unet_only, progress=progress)
    opened = _open(found, teacher_id, max_header=max_header)
    target = Path(f"{found.name}-{chosen.name}" if out is None else out)
    with opened.open_weights() as weights:
        decided = _plan(chosen, opened, weights, dtype)
        write_student(decided, opened, weights, chosen.to_yaml(), target, options, progress)
    return PruneResult(target, decided, opened.is_pipeline and not unet_only)


def check(
    folder: str | Path,
    teacher: str | Path | None = None,
    *,
    variant: str | None = None,
    max_header: str | int = MAX_HEADER_BYTES,
    progress: Progress = no_progress,
) -> CheckReport:
    """Check a student folder against its plan and, with ``teacher``, every copied byte against the teacher's.

    Raises:
        VerificationError: something differs; names the tensors.
        TeacherError, HubError: ``teacher`` cannot be read, or is another one.
    """
    opened = None
    if teacher is not None:
        found = resolve_teacher(str(teacher), weights=True, variant=variant, progress=progress)
        opened = _open(found, max_header=max_header)
    return check_student(Path(folder), opened, progress, max_header_bytes=parse_size(max_header))


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


def parse_size(text: str | int) -> int:
    """Return a size in bytes from an integer or text such as ``500MB``, ``5GB`` (decimal) or ``2GiB`` (binary).

    Raises:
        UsageError: the text is not a size, or not positive.
    """
    if isinstance(text, int):
        size = text
    else:
        number = text.strip().upper().rstrip("KMGTIB")
        unit = text.strip().upper()[len(number) :]
        try:
            size = int(float(number) * _UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            size = 0
    if size <= 0:
        raise UsageError("this is not a size", expected="a number with a unit, such as 5GB or 500MB", found=repr(text))
    return size


def _recipe(recipe: str | Path | Recipe) -> Recipe:
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe)
    if recipe.extends:
        raise SurgeryError("a Recipe made in Python must list all it removes", hint="load_recipe follows extends")
    return recipe


def _teacher_of(recipe: Recipe, teacher: str | Path | None) -> str:
    if teacher is not None:
        return _named(teacher)
    if recipe.teacher is None:
        raise FamilyError(f"the recipe {recipe.name!r} names no teacher", hint="give one with --teacher")
    return recipe.teacher


def _named(teacher: str | Path) -> str:
    if not str(teacher):
        raise UsageError("the teacher is empty text", hint="give a folder, a Hub id or a built-in name")
    return str(teacher)


def _open(
    found: ResolvedTeacher,
    teacher_id: str | None = None,
    *,
    config_only: bool = False,
    max_header: str | int = MAX_HEADER_BYTES,
) -> TeacherFolder:
    if teacher_id is not None and not is_hub_id(teacher_id):
        raise UsageError("the teacher's id is not a Hub id", expected="org/name", found=printable(teacher_id))
    try:
        return open_teacher(
            found.folder,
            variant=found.variant,
            exact=found.exact,
            config_only=config_only,
            teacher_id=teacher_id or found.teacher_id,
            max_header_bytes=parse_size(max_header),
        )
    except OSError as error:
        raise TeacherError(
            "the teacher cannot be read", where=str(error.filename or found.folder), found=error.strerror
        ) from error


def _graph(teacher: TeacherFolder) -> tuple[UNetConfig, UNetGraph]:
    try:
        config = parse_config(teacher.config)
    except ConfigError as error:
        place = f"{teacher.unet / 'config.json'}"
        error.where = f"{place}, key {error.where}" if error.where else place
        raise
    return config, build(config)


def _check_fit(graph: UNetGraph, weights: Weights, teacher: TeacherFolder) -> None:
    check_shapes(shapes_of(graph), weights.shapes(), where=str(teacher.unet))
    check_dtypes(weights.dtypes(), where=str(teacher.unet))


def _refuse_early(recipe: Recipe, teacher: str, variant: str | None, dtype: str | None, teacher_id: str | None) -> None:
    """Find what is wrong with the recipe before gigabytes are made or fetched; the real plan reads the header too."""
    found = resolve_teacher(teacher, weights=False, variant=variant, progress=no_progress)
    _plan(recipe, _open(found, teacher_id, config_only=True), None, dtype)


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
