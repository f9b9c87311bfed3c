"""Charts: losses, and quality against size and time. Only numbers that came about in the same way share an axis.

Published points stand beside one's own where everything that is published of how they were made agrees; where
something differs they have a chart of their own, and the words below say what differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unet_surgery.evaluate.published import MODELS, PROTOCOL, PublishedModel
from unet_surgery.pages.chart import NUM_TONES, Curve
from unet_surgery.pages.page import Curves, Scatter
from unet_surgery.pages.scatter import Point
from unet_surgery.results.formats import Bench, BenchRow
from unet_surgery.results.protocol import LOWER_IS_BETTER, NAMES, in_words, unlike_published
from unet_surgery.results.read import Run
from unet_surgery.results.tables import ScoreGroup, ScoreRow, machine_words, score_text, setting_of

__all__ = ["loss_sections", "size_plots", "time_plots"]

SIZE_LABEL = "parameters of the U-Net, millions"
TIME_LABEL = "a forward of the U-Net, ms"


def loss_sections(runs: Sequence[Run], *, heading: str) -> list[Curves]:
    """Return each run's terms, and before them the runs' common term together where their data and noise agree."""
    sections = []
    for together in _alike(runs):
        for part in _parts(together):
            curves = [Curve(run.name, run.steps, run.terms["task"]) for run in part]
            note = "The term “task” alone, of runs with the same data and noise. The axis is logarithmic."
            caption = ", ".join(run.name for run in part)
            sections.append(Curves(heading, curves, log=True, note=note, caption=caption))
    for run in runs:
        names = list(run.terms)
        for i in range(0, len(names), NUM_TONES):
            curves = [Curve(name, run.steps, run.terms[name]) for name in names[i : i + NUM_TONES]]
            note = "The loss, and its terms before their weights. The axis is logarithmic."
            sections.append(Curves(heading, curves, log=True, note=note, caption=run.name))
    return sections


def _alike(runs: Sequence[Run]) -> list[list[Run]]:
    groups: list[tuple[Any, list[Run]]] = []
    for run in runs:
        if run.config is None or "task" not in run.terms:
            continue
        stages = run.config.get("stages")
        noise = [s.get("noise") for s in stages if isinstance(s, dict)] if isinstance(stages, list) else None
        settings = (run.config.get("data"), noise)
        group = next((members for other, members in groups if other == settings), None)
        if group is None:
            groups.append((settings, [run]))
        else:
            group.append(run)
    return [members for _, members in groups if len(members) > 1]


def _parts(runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
    for i in range(0, len(runs), NUM_TONES):
        yield runs[i : i + NUM_TONES]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A point of one's own, and what its values are in words."""

    point: Point
    x_text: str
    y_text: str


def size_plots(groups: Sequence[ScoreGroup], *, heading: str) -> list[Scatter]:
    """Return for each metric of each group its values against the U-Nets' sizes."""
    charts = []
    alone = dict.fromkeys(c.metric for group in groups for c in group.columns if _published(c.metric))
    for group in groups:
        for k, column in enumerate(group.columns):
            chart = _size_plot(groups, group, k, heading)
            if chart is not None:
                charts.append(chart)
                if any(point.kind == "published" for point in chart.points):
                    alone.pop(column.metric, None)
    note = f"Published, not measured here: {PROTOCOL.words()}. Source: {PROTOCOL.source}."
    return charts + [
        _scatter(heading, _published(metric), SIZE_LABEL, metric, f"published {NAMES[metric]}", [note])
        for metric in alone
    ]


def _size_plot(groups: Sequence[ScoreGroup], group: ScoreGroup, k: int, heading: str) -> Scatter | None:
    """Return the chart of the group's ``k``-th column; None where it would have one point, as the table says it."""
    column = group.columns[k]
    scored = [row for row in group.rows if k in row.cells]
    own = [_own(row, k, row.parameters / 1e6, _millions(row.parameters)) for row in scored if row.parameters]
    differs = _unlike(group, k)
    others = [] if differs else _published(column.metric)
    if not own or len(own) + len(others) < 2:
        return None
    notes = [_made(groups, group)]
    missing = [row.name for row in scored if not row.parameters]
    if missing:
        notes.append(f"Not shown, since their size is not recorded: {', '.join(missing)}.")
    notes += _about_published(column.metric, differs)
    return _scatter(heading, [*own, *others], SIZE_LABEL, column.metric, column.title, notes)


def time_plots(groups: Sequence[ScoreGroup], benches: Sequence[Bench], *, heading: str) -> list[Scatter]:
    """Return for each metric, machine and setting the values against the U-Nets' times.

    A published score stands at the time that was measured of a U-Net of exactly its size and native latent.
    """
    charts = []
    alone: set[tuple[str, str]] = set()
    for bench in benches:
        for setting in dict.fromkeys(map(setting_of, bench.rows)):
            rows = [row for row in bench.rows if setting_of(row) == setting and row.unet_ms is not None]
            where = f"{machine_words(bench)}; {setting}"
            for group in groups:
                for k, column in enumerate(group.columns):
                    own = _timed(group, k, rows)
                    if not own:
                        continue
                    differs = _unlike(group, k)
                    others = _published_timed(column.metric, rows)
                    notes = [f"{where}. {_made(groups, group)}", *_about_published(column.metric, differs)]
                    shown = own if differs else [*own, *others]
                    if len(shown) < 2:
                        continue
                    charts.append(_scatter(heading, shown, TIME_LABEL, column.metric, column.title, notes))
                    if differs and others and (column.metric, where) not in alone:
                        alone.add((column.metric, where))
                        said = f"Published scores ({PROTOCOL.words()}) at the times measured here of U-Nets of exactly "
                        title = f"published {NAMES[column.metric]}"
                        charts.append(
                            _scatter(heading, others, TIME_LABEL, column.metric, title, [f"{said}their size. {where}."])
                        )
    return charts


def _scatter(
    heading: str, placed: Sequence[_Placed], x_label: str, metric: str, title: str, notes: Sequence[str]
) -> Scatter:
    lower = LOWER_IS_BETTER.get(metric)
    better = "" if lower is None else ", lower is better" if lower else ", higher is better"
    points = [item.point for item in placed]
    x_texts, y_texts = [item.x_text for item in placed], [item.y_text for item in placed]
    return Scatter(heading, points, x_label, title + better, x_texts, y_texts, note="\n".join(notes))


def _own(row: ScoreRow, column: int, x: float, x_text: str) -> _Placed:
    score = row.cells[column]
    low, high = score.interval or (None, None)
    if score.error is not None and score.interval is None:
        low, high = score.value - score.error, score.value + score.error
    return _Placed(Point(row.name, x, score.value, "own", low, high), x_text, score_text(score))


def _published(metric: str) -> list[_Placed]:
    models = [model for model in MODELS if metric in model.scores]
    return [_of(model, metric, model.parameters / 1e6, _millions(model.parameters)) for model in models]


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f}" if parameters >= 10**8 else f"{parameters / 1e6:.4g}"


def _of(model: PublishedModel, metric: str, x: float, x_text: str) -> _Placed:
    value = model.scores[metric]
    return _Placed(Point(model.name, x, value, "published"), x_text, f"{value:.4g}")


def _published_timed(metric: str, rows: Sequence[BenchRow]) -> list[_Placed]:
    return [
        _of(model, metric, row.median, f"{row.median:.4g}, as {row.model}")
        for model in MODELS
        if metric in model.scores
        for row in rows
        if row.parameters == model.parameters and row.latent == [model.latent, model.latent]
    ]


def _timed(group: ScoreGroup, column: int, rows: Sequence[BenchRow]) -> list[_Placed]:
    placed = []
    for row in group.rows:
        found = _time_of(row, rows) if column in row.cells else None
        if found is not None:
            median = found.median
            whose = "" if found.model in _names_of(row) else f", as {found.model}"
            placed.append(_own(row, column, median, f"{median:.4g}{whose}"))
    return placed


def _time_of(row: ScoreRow, rows: Sequence[BenchRow]) -> BenchRow | None:
    """Return the times of a scored model: those of its name and size, else of the only network of its size."""
    size = row.parameters
    alike = [found for found in rows if found.parameters == size]
    named = [found for found in alike if found.model in _names_of(row)]
    chosen = named or alike
    return chosen[0] if len(chosen) == 1 else None


def _names_of(row: ScoreRow) -> set[str]:
    generation = row.images.generation
    return {row.name, row.images.folder, *([generation.model.name] if generation is not None else [])}


def _made(groups: Sequence[ScoreGroup], group: ScoreGroup) -> str:
    """Return where it is said how a chart's scores came about."""
    if len(groups) == 1:
        return "The scores of the table above."
    return f"The scores of table {groups.index(group) + 1}: {in_words(group.drawn)}."


def _unlike(group: ScoreGroup, column: int) -> list[str]:
    row = next(row for row in group.rows if column in row.cells)
    return unlike_published(row.images, row.cells[column])


def _about_published(metric: str, differs: Sequence[str]) -> list[str]:
    if not _published(metric):
        return []
    if not differs:
        return [f"Published points: {PROTOCOL.words()}. Source: {PROTOCOL.source}."]
    return [f"Published scores stand apart, for these were made otherwise: {', '.join(differs)}."]
