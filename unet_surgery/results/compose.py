"""From what was read to the sections of a page, and the plots among them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from unet_surgery.lower import SurgeryPlan
from unet_surgery.pages.chart import standalone_svg
from unet_surgery.pages.page import Curves, Drawing, Scatter, Section
from unet_surgery.pages.scatter import standalone_scatter
from unet_surgery.picture.compose import lay_out
from unet_surgery.picture.svg import to_svg
from unet_surgery.results.formats import Generation
from unet_surgery.results.grids import picture_sections
from unet_surgery.results.plots import loss_sections, size_plots, time_plots
from unet_surgery.results.read import Benched, Drawn, Finding, Run, Scored, Surgery
from unet_surgery.results.tables import bench_sections, published_table, score_groups, score_sections, size_sections

__all__ = ["Composed", "compose", "plot_svg"]

MAX_DRAWINGS, MAX_CHARTS = 12, 40
ARCHITECTURE, SIZES, LOSSES = "Architecture", "Sizes", "Losses"
SCORES, PICTURES, SPEED = "Scores", "Pictures", "Speed"
BY_SIZE, BY_TIME, PUBLISHED = "Quality against size", "Quality against time", "Published results"
PUBLISHED_METRICS = ("fid", "is", "clip")


@dataclass(frozen=True, slots=True)
class Composed:
    """A page's sections, what it is of, and in words what was left out."""

    sections: Sequence[Section]
    title: str
    lead: str
    left_out: Sequence[str]


def compose(findings: Sequence[Finding]) -> Composed:
    """Return what to show of ``findings``, in their order."""
    runs = [found for found in findings if isinstance(found, Run)]
    drawn = [found for found in findings if isinstance(found, Drawn)]
    scored = [found for found in findings if isinstance(found, Scored)]
    benches = [found.bench for found in findings if isinstance(found, Benched) and found.bench.rows]
    plans = _plans(findings)
    groups = score_groups(scored, _model_names(scored))
    left_out: list[str] = []
    drawn.sort(key=lambda found: -(found.generation.model.parameters or 0))  # the teacher first
    pictures, too_many = picture_sections(drawn, _titles(drawn), heading=PICTURES)
    left_out += too_many
    by_size = _limited(size_plots(groups, heading=BY_SIZE), left_out)
    by_time = _limited(time_plots(groups, benches, heading=BY_TIME), left_out)
    sections: list[Section] = [
        *_drawings(plans, left_out),
        *(size_sections(plans, heading=SIZES) if plans else []),
        *_limited(loss_sections([run for run in runs if run.steps], heading=LOSSES), left_out),
        *score_sections(groups, heading=SCORES),
        *pictures,
        *by_size,
        *by_time,
        *bench_sections(benches, heading=SPEED),
    ]
    if any(column.metric in PUBLISHED_METRICS for group in groups for column in group.columns):
        sections.append(published_table(heading=PUBLISHED))
    first = next(iter(plans.values()), None)
    title = f"{first.recipe.get('name') or 'A surgery'} of {first.teacher_id}" if first else "Results"
    return Composed(sections, title, _lead(findings), left_out)


def plot_svg(section: Section) -> str | None:
    """Return a plot as an SVG file of its own; None for what is no plot."""
    match section:
        case Drawing():
            return section.svg
        case Curves():
            title = f"{section.heading} {section.caption}"
            return standalone_svg(section.curves, title=title, x_label=section.x_label, log=section.log)
        case Scatter():
            title = section.heading
            return standalone_scatter(section.points, title=title, x_label=section.x_label, y_label=section.y_label)
        case _:
            return None


def distinct(names: Iterable[tuple[str, Hashable, str]]) -> list[str]:
    """Return a name for each (name, what it is of, more of its name): the same name only for the same thing."""
    owners: dict[str, Hashable] = {}
    chosen = []
    for name, thing, more in names:
        candidates = [name, *([f"{name} ({more})"] if more else [])]
        while owners.setdefault(candidates[0], thing) != thing:
            candidates = candidates[1:] or [f"{name} ({len(owners) + 1})"]
        chosen.append(candidates[0])
    return chosen


def _titles(drawn: Sequence[Drawn]) -> list[str]:
    return distinct((_called(found.name, found.generation), found.root, "") for found in drawn)


def _called(folder: str, generation: Generation | None) -> str:
    """Return how a page calls who drew a folder's pictures: as bench and plan do, with the folder where it differs."""
    model = None if generation is None else generation.model.name
    return folder if model in (None, folder) else f"{model} ({folder})"


def _model_names(scored: Sequence[Scored]) -> list[str]:
    """Name each scored model, and its pictures' folder, so that several files of scores of one meet in one row."""
    named = []
    for found in scored:
        images = found.scores.images
        generation = images.generation
        thing: Hashable = (images.folder, None)
        if generation is not None:
            thing = (images.folder, generation.model.sha256 or generation.model.name)
        named.append((_called(images.folder, generation), thing, ""))
    return distinct(named)


def _plans(findings: Sequence[Finding]) -> dict[str, SurgeryPlan]:
    """Return name → plan, each plan once: a pruned student and its distilled one have the same."""
    names: dict[str, list[str]] = {}
    plans: dict[str, SurgeryPlan] = {}
    for found in findings:
        if isinstance(found, Surgery | Run) and found.plan is not None:
            key = found.plan.to_json()
            plans[key] = found.plan
            names.setdefault(key, [])
            if found.name not in names[key]:
                names[key].append(found.name)
    titles = distinct((", ".join(members), key, "") for key, members in names.items())
    return dict(zip(titles, plans.values(), strict=True))


def _drawings(plans: Mapping[str, SurgeryPlan], left_out: list[str]) -> list[Drawing]:
    if len(plans) > MAX_DRAWINGS:
        left_out.append(f"{len(plans) - MAX_DRAWINGS} pictures of architectures")
    drawings = []
    for name, plan in list(plans.items())[:MAX_DRAWINGS]:
        scene = lay_out(plan)
        drawings.append(Drawing(ARCHITECTURE, to_svg(scene), f"{scene.title}. {scene.words}", note=name))
    return drawings


def _limited(charts: Sequence[Section], left_out: list[str]) -> Sequence[Section]:
    if len(charts) > MAX_CHARTS:
        left_out.append(f"{len(charts) - MAX_CHARTS} charts of “{charts[0].heading}”")
    return charts[:MAX_CHARTS]


def _lead(findings: Sequence[Finding]) -> str:
    kinds = {
        Surgery: ("surgery", "surgeries"),
        Run: ("training run", "training runs"),
        Drawn: ("folder of pictures", "folders of pictures"),
        Scored: ("file of scores", "files of scores"),
        Benched: ("file of times", "files of times"),
    }
    counts = {kind: sum(isinstance(found, kind) for found in findings) for kind in kinds}
    parts = [f"{count} {kinds[kind][count > 1]}" for kind, count in counts.items() if count]
    return f"From {', '.join(parts)}."
