"""Tables of sizes, scores and times: what is not comparable stands in separate tables, or in columns of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unet_surgery.evaluate.published import MODELS, PROTOCOL, models_of_size
from unet_surgery.lower import Counts, SurgeryPlan, quantity
from unet_surgery.pages.page import Bar, Bars, Table
from unet_surgery.results.formats import Bench, BenchRow, Images, Score
from unet_surgery.results.protocol import NAMES, Setting, changed, drawn_as, identity, in_words, measured_as
from unet_surgery.results.read import Scored

__all__ = [
    "ScoreColumn",
    "ScoreGroup",
    "ScoreRow",
    "bench_sections",
    "published_table",
    "score_groups",
    "score_sections",
    "size_sections",
]

NOTHING = "–"


# -- sizes -------------------------------------------------------------------------------------------------------------


def size_sections(plans: Mapping[str, SurgeryPlan], *, heading: str) -> list[Table | Bars]:
    """Return the sizes of teachers and students, each teacher once, as a table and as bars."""
    sizes: dict[str, tuple[Counts, Counts]] = {}
    for name, plan in plans.items():
        teacher = f"{plan.teacher_id} (teacher)"
        if sizes.get(teacher, (plan.teacher,))[0] != plan.teacher:
            teacher = f"{plan.teacher_id} (teacher of {name})"
        sizes[teacher] = (plan.teacher, plan.teacher)
        sizes[name if name not in sizes else f"{name} (student)"] = (plan.student, plan.teacher)
    rows: list[tuple[str, ...]] = [
        (
            name,
            f"{counts.params:,}",
            _share(counts.params, whole.params),
            _amount(counts.macs),
            _amount(counts.macs_all),
            _share(counts.macs_all, whole.macs_all),
            f"{counts.tensors}",
            ", ".join(model.name for model in models_of_size(counts.params)) or NOTHING,
        )
        for name, (counts, whole) in sizes.items()
    ]
    columns = [
        "network", "parameters", "of the teacher's", "MACs, conv + linear", "MACs, all", "of the teacher's", "tensors",
        "published nets of this size",
    ]  # fmt: skip
    if all(row[-1] == NOTHING for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    note = (
        "Of the U-Nets. MACs are of one forward at batch 1 and the native latent; “conv + linear” is what the BK-SDM "
        "paper counts, “all” adds the products of attention."
    )
    bars = [
        Bar(name, counts.params, f"{quantity(counts.params)} ({_share(counts.params, whole.params)})")
        for name, (counts, whole) in sizes.items()
    ]
    return [Bars(heading, bars, note="Parameters."), Table(heading, columns, rows, note=note)]


def _amount(number: int) -> str:
    """Return a quantity that is not broken before its unit."""
    return quantity(number).replace(" ", "\u00a0")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else NOTHING


# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScoreColumn:
    """A metric, measured in one way."""

    metric: str
    measured: Mapping[str, Setting]
    title: str


@dataclass(slots=True)
class ScoreRow:
    """A model's scores in a group: column's place → score."""

    name: str
    images: Images
    cells: dict[int, Score] = field(default_factory=dict)

    @property
    def parameters(self) -> int | None:
        """The size of the U-Net that drew, where it is recorded."""
        generation = self.images.generation
        return None if generation is None else generation.model.parameters


@dataclass(slots=True)
class ScoreGroup:
    """Models whose pictures were drawn in the same way."""

    drawn: Mapping[str, Setting]
    columns: list[ScoreColumn] = field(default_factory=list)
    rows: list[ScoreRow] = field(default_factory=list)


def score_groups(scored: Sequence[Scored], names: Sequence[str]) -> list[ScoreGroup]:
    """Put scores together that may be compared; ``names`` are those of the models, one for each of ``scored``."""
    groups: dict[frozenset[tuple[str, str]], ScoreGroup] = {}
    for found, name in zip(scored, names, strict=True):
        images = found.scores.images
        drawn = drawn_as(images)
        group = groups.setdefault(identity(drawn), ScoreGroup(drawn))
        cells = {_column(group, score): score for score in found.scores.scores}
        row = next((row for row in group.rows if row.name == name and _agree(row.cells, cells)), None)
        if row is None:
            row = ScoreRow(name, images)
            group.rows.append(row)
        row.cells.update(cells)
    for group in groups.values():
        group.rows.sort(key=lambda row: -(row.parameters or 0))  # the teacher first, whatever order a shell gives
    return [group for group in groups.values() if group.columns]


def _agree(some: Mapping[int, Score], others: Mapping[int, Score]) -> bool:
    """Tell whether no column has two scores: the same one in two files is one."""
    return all(some[k].value == others[k].value for k in some.keys() & others.keys())


def _column(group: ScoreGroup, score: Score) -> int:
    """Return the place of the column for ``score``; the same metric measured in another way has one of its own."""
    measured = measured_as(score)
    same = [column for column in group.columns if column.metric == score.metric]
    for column in same:
        if identity(column.measured) == identity(measured):
            return group.columns.index(column)
    name = NAMES.get(score.metric, score.metric)
    group.columns.append(ScoreColumn(score.metric, measured, f"{name} ({len(same) + 1})" if same else name))
    return len(group.columns) - 1


def score_sections(groups: Sequence[ScoreGroup], *, heading: str) -> list[Table]:
    """Return a table for each group; the words below say how its numbers came about."""
    tables = []
    for number, group in enumerate(groups):
        rows = [
            (row.name, *(_cell(row.cells.get(k), group, k, is_first=row is group.rows[0]) for k in range(len(titles))))
            for titles in [group.columns]
            for row in group.rows
        ]
        notes = []
        if number:
            notes.append(f"Not to be compared with the first table: {changed(groups[0].drawn, group.drawn)}.")
        if len(group.rows) > 1:
            notes.append(f"In square brackets: the difference from {group.rows[0].name}.")
        notes += [f"{column.title}: {in_words(column.measured, ('pictures',))}." for column in group.columns]
        caption = f"Table {number + 1}. {in_words(group.drawn)}" if len(groups) > 1 else in_words(group.drawn)
        columns = ("network", *(column.title for column in group.columns))
        tables.append(Table(heading, columns, rows, note="\n".join(notes), caption=caption))
    return tables


def score_text(score: Score) -> str:
    """Return a value with its ±, or its interval."""
    if score.metric == "toy":
        ends = "" if score.interval is None else f" ({100 * score.interval[0]:.1f} to {100 * score.interval[1]:.1f})"
        return f"{100 * score.value:.1f}\u00a0%{ends}"
    if score.interval is not None:
        return f"{score.value:.4g} ({score.interval[0]:.4g} to {score.interval[1]:.4g})"
    return f"{score.value:.4g}" + (f" ± {score.error:.2g}" if score.error is not None else "")


def _cell(score: Score | None, group: ScoreGroup, column: int, *, is_first: bool) -> str:
    if score is None:
        return NOTHING
    base = group.rows[0].cells.get(column)
    if base is None or is_first:
        return score_text(score)
    change = score.value - base.value
    return (
        f"{score_text(score)} [{100 * change:+.1f}]"
        if score.metric == "toy"
        else f"{score_text(score)} [{change:+.3g}]"
    )


def published_table(*, heading: str) -> Table:
    """Return what the authors of block-removed U-Nets report."""
    rows = [
        (
            model.name,
            _amount(model.parameters),
            NOTHING if model.gmacs is None else f"{model.gmacs:,.1f}\u00a0G",
            f"{model.gmacs_all:,.1f}\u00a0G",
            *(f"{model.scores[name]:.4g}" for name in ("fid", "is", "clip")),
        )
        for model in MODELS
        if model.scores
    ]
    caption = f"Published, not measured here: {PROTOCOL.words()}. Source: {PROTOCOL.source}."
    columns = ("network", "parameters", "MACs, conv + linear", "MACs, all", "FID", "IS", f"CLIP ({PROTOCOL.clip})")
    return Table(heading, columns, rows, caption=caption)


# -- times -------------------------------------------------------------------------------------------------------------


def setting_of(row: BenchRow) -> str:
    """Return in words what a time depends on beside the model."""
    size = f"latent {row.latent[1]}×{row.latent[0]}"
    if row.dtype is None or row.batch is None:
        return f"{size}, counted only"
    return f"{size}, {row.dtype}, batch {row.batch}" + (", compiled" if row.compile else "")


def machine_words(bench: Bench) -> str:
    machine = bench.machine
    parts = [machine.device]
    parts += [machine.cpu] if machine.cpu and machine.cpu != machine.device else []
    parts += [f"{machine.threads} threads" if machine.threads != 1 else "1 thread"] if machine.threads else []
    return ", ".join([*parts, *([f"torch {machine.torch}"] if machine.torch else [])])


COUNTS = "Parameters and MACs"


def bench_sections(benches: Sequence[Bench], *, heading: str) -> list[Table | Bars]:
    """Return for each machine and setting the times of its models, as bars and as a table."""
    sections: list[Table | Bars] = []
    for bench in benches:
        settings = dict.fromkeys(map(setting_of, bench.rows))
        for setting in settings:
            rows = [row for row in bench.rows if setting_of(row) == setting]
            caption = f"{machine_words(bench)}; {setting}"
            timed = [row for row in rows if row.unet_ms is not None]
            sections += [_times(timed, heading, caption)] if timed else []
            sections.append(_bench_table(rows, heading if timed else COUNTS, "" if timed else caption))
    return sections


def _times(rows: Sequence[BenchRow], heading: str, caption: str) -> Bars:
    bars = [
        Bar(row.model, span.median, f"{span.median:.4g} ms", span.low, span.high)
        for row in rows
        if (span := row.unet_ms) is not None
    ]
    return Bars(heading, bars, note="One forward of the U-Net: the median, and how the runs spread.", caption=caption)


def _bench_table(rows: Sequence[BenchRow], heading: str, caption: str) -> Table:
    """Return what is known of each row; a column that nothing was measured for is left out."""
    cells = [
        {
            "network": row.model,
            "parameters": f"{row.parameters:,}",
            "MACs, all": NOTHING if row.macs_all is None else _amount(row.macs_all),
            "a forward, ms": _forward(row),
            "a picture, s": _median(row.picture_s),
            "peak memory": NOTHING if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}\u00a0MB",
            "ratio to the first": _ratio(row),
        }
        for row in rows
    ]
    columns = [name for name in cells[0] if any(cell[name] != NOTHING for cell in cells)]
    doubtful = any(row.ratio_is_clear is False for row in rows)
    note = "A ratio with a question mark is lost in the noise of its measurement." if doubtful else ""
    return Table(heading, columns, [[cell[name] for name in columns] for cell in cells], note=note, caption=caption)


def _forward(row: BenchRow) -> str:
    span = row.unet_ms
    return row.failed or NOTHING if span is None else f"{span.median:.4g} ({span.low:.4g} to {span.high:.4g})"


def _ratio(row: BenchRow) -> str:
    if row.ratio_to_first is None:
        return NOTHING
    return f"{row.ratio_to_first:.3g}" + ("?" if row.ratio_is_clear is False else "")


def _median(picture: Mapping[str, object] | None) -> str:
    value = None if picture is None else picture.get("median")
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else NOTHING
