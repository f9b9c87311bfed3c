"""A page of results in one HTML file: no scripts, nothing from elsewhere, light and dark, as narrow as a telephone.

Every text is escaped where it enters; pictures are PNG data URIs.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unet_surgery.pages.chart import NUM_TONES, Curve, curves_svg, tone_class
from unet_surgery.pages.markup import markup
from unet_surgery.pages.style import STYLE
from unet_surgery.sample.grid import png
from unet_surgery.sample.interval import wilson

__all__ = ["Accuracy", "Curve", "Curves", "Pictures", "Prose", "Section", "Share", "Table", "page"]


@dataclass(frozen=True, slots=True)
class Prose:
    """Paragraphs of plain text."""

    heading: str
    paragraphs: Sequence[str]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under ``columns``; the first column names the row, the others are set as numbers."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Pictures:
    """``columns``: title → uint8 [n, H, W, 3], a row for each of n ``prompts``; ``marks``: title → right or not, n."""

    heading: str
    columns: Mapping[str, NDArray[np.uint8]]
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


Section = Prose | Table | Pictures | Curves | Accuracy


def page(sections: Sequence[Section], *, title: str, lead: str = "") -> str:
    """Return the whole page.

    Raises:
        ValueError: a section contradicts itself: rows of another length than its columns, or pictures than prompts.
    """
    body = [f"<h1>{markup(title)}</h1>", f'<p class="lead">{markup(lead)}</p>' if lead else ""]
    for section in sections:
        note = getattr(section, "note", "")
        body += ["<section>", f"<h2>{markup(section.heading)}</h2>", *_render(section)]
        body += [f'<p class="note">{markup(note)}</p>' if note else "", "</section>"]
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
            chart = curves_svg(section.curves, title=section.heading, x_label=section.x_label, log=section.log)
            return [_legend(section.curves), chart]
        case Accuracy():
            return _accuracy(section)


def _table(table: Table) -> list[str]:
    if any(len(row) != len(table.columns) for row in table.rows):
        raise ValueError(f"a row of table {table.heading!r} has not {len(table.columns)} cells")
    heads = "".join(f'<th scope="col">{markup(column)}</th>' for column in table.columns)
    rows = [
        f'<tr><th scope="row">{markup(row[0])}</th>' + "".join(f"<td>{markup(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    ]
    body = "\n".join(rows)
    return [f'<div class="wide"><table><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table></div>']


def _pictures(section: Pictures) -> list[str]:
    marks = section.marks or {}
    counts = [(title, len(rows)) for title, rows in section.columns.items()]
    for title, count in counts + [(title, len(rows)) for title, rows in marks.items()]:
        if count != len(section.prompts):
            raise ValueError(f"column {title!r} has {count} rows, and there are {len(section.prompts)} prompts")
    parts = [f'<div class="grid" style="--columns:{len(section.columns)}">', '<div class="prompt head"></div>']
    parts += [f'<div class="head">{markup(title)}</div>' for title in section.columns]
    for row, prompt in enumerate(section.prompts):
        parts.append(f'<div class="prompt">{markup(prompt) or "(no words)"}</div>')
        for title, pictures in section.columns.items():
            mark = _mark(marks[title][row]) if title in marks else ""
            words = markup(f"{title}: {prompt}")
            data = base64.b64encode(png(pictures[row])).decode("ascii")
            sides = f'width="{pictures.shape[2]}" height="{pictures.shape[1]}"'
            parts.append(
                f'<div class="cell"><img alt="{words}" {sides} src="data:image/png;base64,{data}">{mark}</div>'
            )
    return [*parts, "</div>"]


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
