"""A page of results in one HTML file: no scripts, nothing from elsewhere, light and dark, as narrow as a telephone.

Every text is escaped where it enters; pictures are data URIs. What is wider than the page scrolls within it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unet_surgery.pages.chart import NUM_TONES, Curve, curves_svg, tone_class
from unet_surgery.pages.markup import markup
from unet_surgery.pages.scatter import Point, scatter_svg
from unet_surgery.pages.style import STYLE
from unet_surgery.sample.grid import png
from unet_surgery.sample.interval import wilson

__all__ = [
    "Accuracy",
    "Bar",
    "Bars",
    "Curve",
    "Curves",
    "Drawing",
    "Encoded",
    "Pictures",
    "Prose",
    "Scatter",
    "Section",
    "Share",
    "Table",
    "page",
]


@dataclass(frozen=True, slots=True)
class Prose:
    """Paragraphs of plain text."""

    heading: str
    paragraphs: Sequence[str]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under ``columns``; the first column names the row, the others are set as numbers.

    ``caption`` stands above the table; without one the heading is its caption, for those who hear the page. A
    ``dense`` table is one of details.
    """

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    caption: str = ""
    dense: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """A picture's file, of ``kind`` png or jpeg, and its size in pixels; ``smooth`` where it is not to show pixels."""

    data: bytes
    kind: Literal["png", "jpeg"]
    width: int
    height: int
    smooth: bool = False


@dataclass(frozen=True, slots=True)
class Pictures:
    """``columns``: title → uint8 [n, H, W, 3] or n files, one for each of n ``prompts``.

    ``marks``: title → right or not, n.
    """

    heading: str
    columns: Mapping[str, NDArray[np.uint8] | Sequence[Encoded]]
    prompts: Sequence[str]
    marks: Mapping[str, Sequence[bool]] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Curves:
    """Lines over training steps, such as the losses of two runs."""

    heading: str
    curves: Sequence[Curve]
    x_label: str = "step"
    log: bool = False
    note: str = ""
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Share:
    """``successes`` of ``total`` that ``name`` got right."""

    name: str
    successes: int
    total: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Groups of shares, heading → its bars, each with its 95 % Wilson interval; the same names in the same order."""

    heading: str
    groups: Mapping[str, Sequence[Share]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A whole SVG document of our own making, and what it shows in ``words`` for those who do not see it."""

    heading: str
    svg: str
    words: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Scatter:
    """Points in a plane, and below them the table of their values; ``x_texts`` and ``y_texts`` are the values said."""

    heading: str
    points: Sequence[Point]
    x_label: str
    y_label: str
    x_texts: Sequence[str]
    y_texts: Sequence[str]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of length ``value`` ≥ 0, what is ``said`` beside it, and the ends of its spread where it has one."""

    name: str
    value: float
    said: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """Lengths to compare, from nought."""

    heading: str
    bars: Sequence[Bar]
    note: str = ""
    caption: str = ""


Section = Prose | Table | Pictures | Curves | Accuracy | Drawing | Scatter | Bars


def page(sections: Sequence[Section], *, title: str, lead: str = "", contents: bool = False) -> str:
    """Return the whole page, with a list of its headings where ``contents`` are wanted.

    A section whose heading is that of the section before it goes on under it.

    Raises:
        ValueError: a section contradicts itself: rows of another length than its columns, or pictures than prompts.
    """
    body = [f"<h1>{markup(title)}</h1>", f'<p class="lead">{markup(lead)}</p>' if lead else ""]
    body += [_contents(sections) if contents else ""]
    before = None
    for number, section in enumerate(sections, 1):
        note = getattr(section, "note", "")
        heading = f'<h2 id="section-{number}">{markup(section.heading)}</h2>' if section.heading != before else ""
        body += ["<section>", heading, *_render(section)]
        body += [f'<p class="note">{markup(note)}</p>' if note else "", "</section>"]
        before = section.heading
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{markup(title)}</title>\n<style>\n{STYLE}</style></head>\n<body><main>"
    )
    return "\n".join([head, *filter(None, body), "</main></body></html>\n"])


def _render(section: Section) -> list[str]:
    match section:
        case Prose():
            return [f"<p>{markup(paragraph)}</p>" for paragraph in section.paragraphs]
        case Table():
            return _table(section)
        case Pictures():
            return _pictures(section)
        case Curves():
            title = f"{section.heading}: {section.caption}" if section.caption else section.heading
            chart = curves_svg(section.curves, title=title, x_label=section.x_label, log=section.log)
            return [_subheading(section.caption), _legend(section.curves), chart]
        case Accuracy():
            return _accuracy(section)
        case Drawing():
            data = base64.b64encode(section.svg.encode()).decode("ascii")
            picture = f'<img class="drawing" alt="{markup(section.words)}" src="data:image/svg+xml;base64,{data}">'
            return [_scrolling([picture], section.heading)]
        case Scatter():
            return _scatter(section)
        case Bars():
            return [_subheading(section.caption), *_bars(section)]


def _subheading(text: str) -> str:
    return f"<h3>{markup(text)}</h3>" if text else ""


def _contents(sections: Sequence[Section]) -> str:
    firsts: dict[str, int] = {}
    for number, section in enumerate(sections, 1):
        firsts.setdefault(section.heading, number)
    items = "".join(f'<li><a href="#section-{number}">{markup(text)}</a></li>' for text, number in firsts.items())
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _scrolling(parts: Sequence[str], name: str) -> str:
    """Put what may be wider than a telephone where it can be scrolled, by keys too."""
    body = "\n".join(parts)
    return f'<div class="wide" role="region" tabindex="0" aria-label="{markup(name)}">{body}</div>'


def _table(table: Table) -> list[str]:
    if any(len(row) != len(table.columns) for row in table.rows):
        raise ValueError(f"a row of table {table.heading!r} has not {len(table.columns)} cells")
    heads = "".join(f'<th scope="col">{markup(column)}</th>' for column in table.columns)
    rows = [
        f'<tr><th scope="row">{markup(row[0])}</th>' + "".join(f"<td>{markup(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    ]
    body = "\n".join(rows)
    caption = f"<caption>{markup(table.caption)}</caption>"
    if not table.caption:
        caption = f'<caption class="unseen">{markup(table.heading)}</caption>'
    start = '<table class="dense">' if table.dense else "<table>"
    whole = f"{start}{caption}<thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>"
    return [_scrolling([whole], table.caption or table.heading)]


def _pictures(section: Pictures) -> list[str]:
    marks = section.marks or {}
    counts = [(title, len(rows)) for title, rows in section.columns.items()]
    for title, count in counts + [(title, len(rows)) for title, rows in marks.items()]:
        if count != len(section.prompts):
            raise ValueError(f"column {title!r} has {count} rows, and there are {len(section.prompts)} prompts")
    if len(section.columns) == 1 and not marks:
        return _gallery(section)
    parts = [f'<div class="grid" style="--columns:{len(section.columns)}">', '<div class="prompt head"></div>']
    parts += [f'<div class="head">{markup(title)}</div>' for title in section.columns]
    for row, prompt in enumerate(section.prompts):
        parts.append(f'<div class="prompt">{markup(prompt) or "(no words)"}</div>')
        for title, pictures in section.columns.items():
            mark = _mark(marks[title][row]) if title in marks else ""
            parts.append(f'<div class="cell">{_image(pictures[row], f"{title}: {prompt}")}{mark}</div>')
    return [_scrolling([*parts, "</div>"], section.heading)]


def _gallery(section: Pictures) -> list[str]:
    """Return the one column's pictures, each over its prompt, as many in a line as there is room for."""
    ((title, pictures),) = section.columns.items()
    cells = [
        f'<figure class="cell">{_image(picture, f"{title}: {prompt}")}'
        f'<figcaption class="prompt">{markup(prompt) or "(no words)"}</figcaption></figure>'
        for picture, prompt in zip(pictures, section.prompts, strict=True)
    ]
    return [f'<p class="head">{markup(title)}</p>', '<div class="gallery">', *cells, "</div>"]


def _image(picture: NDArray[np.uint8] | Encoded, words: str) -> str:
    file = _encoded(picture)
    data = base64.b64encode(file.data).decode("ascii")
    sides = f'width="{file.width}" height="{file.height}"' + (' class="smooth"' if file.smooth else "")
    return f'<img alt="{markup(words)}" {sides} src="data:image/{file.kind};base64,{data}">'


def _encoded(picture: NDArray[np.uint8] | Encoded) -> Encoded:
    if isinstance(picture, Encoded):
        return picture
    return Encoded(png(picture), "png", picture.shape[1], picture.shape[0])


def _mark(right: bool) -> str:
    return '<span class="mark right">✓ right</span>' if right else '<span class="mark wrong">✗ wrong</span>'


def _legend(curves: Sequence[Curve]) -> str:
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 28 8" aria-hidden="true"><path class="curve {tone_class(curve, k)}" '
        f'd="M0,4H28"/></svg>{markup(curve.name)}</li>'
        for k, curve in enumerate(curves)
    )
    return f'<ul class="legend">{items}</ul>'


def _accuracy(section: Accuracy) -> list[str]:
    parts = ['<div class="bars">']
    for group, shares in section.groups.items():
        parts.append(f'<h3 class="group">{markup(group)}</h3>')
        for k, share in enumerate(shares):
            low, high = wilson(share.successes, share.total)
            mean = share.successes / share.total if share.total else 0.0
            said = f"{100 * mean:.1f} %" if share.total else "–"
            bounds = f"{100 * low:.1f}–{100 * high:.1f}"
            parts.append(
                f'<div class="name">{markup(share.name)}</div>'
                f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
                f'<rect class="track" width="100" height="10"/>'
                f'<rect class="fill-{k % NUM_TONES}" width="{100 * mean:.2f}" height="10"/>'
                f'<path class="whisker" d="M{100 * low:.2f},5H{100 * high:.2f}'
                f'M{100 * low:.2f},2V8M{100 * high:.2f},2V8"/></svg>'
                f'<div class="value">{said} <span>({bounds}; {share.successes:,} of {share.total:,})</span></div>'
            )
    return [*parts, "</div>"]


def _scatter(section: Scatter) -> list[str]:
    title = f"{section.heading}: {section.y_label} against {section.x_label}"
    kinds = {point.kind for point in section.points}
    mixed = "published" in kinds
    chart = scatter_svg(section.points, title=title, x_label=section.x_label, y_label=section.y_label)
    if not len(section.points) == len(section.x_texts) == len(section.y_texts):
        raise ValueError(f"the texts of {section.heading!r} are not as many as its points")
    rows = [
        (f"{k}. {point.name}", *(["measured" if point.kind == "own" else "published"] if mixed else []), x_text, y_text)
        for k, (point, x_text, y_text) in enumerate(
            zip(section.points, section.x_texts, section.y_texts, strict=True), 1
        )
    ]
    columns = ("network", *(["from"] if mixed else []), section.x_label, section.y_label.partition(",")[0])
    legend = '<ul class="legend">'
    if "own" in kinds:
        legend += '<li><span class="dot own" aria-hidden="true">●</span> measured</li>'
    if "published" in kinds:
        legend += '<li><span class="dot others" aria-hidden="true">◇</span> published</li>'
    return [f"{legend}</ul>", chart, *_table(Table(title, columns, rows, dense=True))]


def _bars(section: Bars) -> list[str]:
    longest = max((bar.high or bar.value for bar in section.bars), default=0) or 1.0
    parts = ['<div class="bars">']
    for bar in section.bars:
        length = 100 * bar.value / longest
        whisker = ""
        if bar.low is not None and bar.high is not None:
            low, high = 100 * bar.low / longest, 100 * bar.high / longest
            whisker = f'<path class="whisker" d="M{low:.2f},5H{high:.2f}M{low:.2f},2V8M{high:.2f},2V8"/>'
        parts.append(
            f'<div class="name">{markup(bar.name)}</div>'
            f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="track" width="100" height="10"/>'
            f'<rect class="fill-0" width="{length:.2f}" height="10"/>{whisker}</svg>'
            f'<div class="value">{markup(bar.said)}</div>'
        )
    return [*parts, "</div>"]
