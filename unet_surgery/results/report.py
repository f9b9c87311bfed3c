"""``report``: from paths to one HTML page, and its plots as PNG."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.staging import Staging
from unet_surgery.checkpoint.target import check_new_file, write_target
from unet_surgery.errors import MissingExtraError, OutputError, UsageError

__all__ = ["MAX_INPUTS", "MAX_ROWS", "ReportResult", "report"]

MAX_INPUTS, MAX_ROWS = 200, 50
PLOT_WIDTH = 1280


@dataclass(frozen=True, slots=True)
class ReportResult:
    """The page that was written, its size, its plots as PNG, and in words what it does not show."""

    page: Path
    num_bytes: int
    plots: Sequence[Path]
    left_out: Sequence[str]


def report(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    png: str | Path | None = None,
    title: str | None = None,
    rows: int = 8,
    force: bool = False,
) -> ReportResult:
    """Write one page of all that ``inputs`` say to the file ``out``, and its plots as PNG into the new folder ``png``.

    An input is a folder of prune, distill or generate, or a JSON file of score, bench or plan. ``rows`` is how many
    prompts a grid of pictures shows. The same inputs give the same bytes. ``force`` replaces an older page and plots.

    Raises:
        UsageError: an argument has no sense, or an input is nothing that a report shows.
        DataError, VerificationError: an input is damaged; names the file.
        MissingExtraError: Pillow, or for PNG a converter, is not installed.
        OutputError: there is something at ``out`` or ``png`` already, or it cannot be written.
    """
    out = Path(out)
    plots_folder = None if png is None else Path(png)
    _check(inputs, out, plots_folder, rows=rows, force=force)
    try:
        from unet_surgery.results.compose import compose, plot_svg
    except ImportError as error:
        raise MissingExtraError(
            "a report needs Pillow, which is not installed", hint="pip install 'unet-surgery[report]'"
        ) from error
    from unet_surgery.pages.page import Prose, page
    from unet_surgery.results.read import look

    once = {_place(path): path for path in inputs}
    composed = compose([look(path, max_rows=rows) for path in once.values()])
    sections = [*composed.sections]
    if composed.left_out:
        sections.append(Prose("Left out", [f"{text[:1].upper()}{text[1:]}." for text in composed.left_out]))
    text = page(sections, title=title or composed.title, lead=composed.lead, contents=True)
    data = text.encode()
    svgs = [(section.heading, svg) for section in sections if (svg := plot_svg(section)) is not None]
    plots = {} if plots_folder is None else _converted(svgs)
    if plots_folder is None:
        write_target(out, data, force=force)
        return ReportResult(out, len(data), [], composed.left_out)
    with Staging(plots_folder, replace=_refuse_others if force else None) as staging:
        for name, plot in plots.items():
            disk.write_file(staging.folder / name, plot)
        write_target(out, data, force=force)  # the plots' old folder stays if the page cannot be written
        staging.commit()
    return ReportResult(out, len(data), [plots_folder / name for name in plots], composed.left_out)


def _place(path: str | Path) -> str:
    """Return what two names of one input have in common; a folder may be named by the file that it is known by."""
    place = os.path.abspath(path)
    return os.path.dirname(place) if os.path.basename(place) in ("metrics.jsonl", "generation.json") else place


def _check(inputs: Sequence[str | Path], out: Path, png: Path | None, *, rows: int, force: bool) -> None:
    if not inputs:
        raise UsageError("nothing to report on", expected="a folder, or a JSON file, of another command")
    if len(inputs) > MAX_INPUTS:
        raise UsageError("too many inputs for a page", expected=f"at most {MAX_INPUTS}", found=str(len(inputs)))
    if not 1 <= rows <= MAX_ROWS:
        raise UsageError("rows is out of range", expected=f"1 to {MAX_ROWS}", found=str(rows))
    if out.suffix not in (".html", ".htm"):
        raise UsageError("the page is HTML", where=str(out), expected="a file .html")
    check_new_file(out, force=force)
    if png is not None:
        _check_plots(png, force=force)


def _check_plots(png: Path, *, force: bool) -> None:
    if not png.parent.is_dir():
        raise OutputError("the folder that should hold the plots does not exist", where=str(png.parent))
    if os.path.lexists(png) and not force:
        raise OutputError("the output exists", where=str(png), hint="choose another --png, or --force to replace it")
    if os.path.lexists(png):
        _refuse_others(png)


def _refuse_others(folder: Path) -> None:
    """Raise OutputError if ``folder`` is anything else than one of plots."""
    others = ["a file"] if not folder.is_dir() else [p.name for p in folder.iterdir() if not _PLOT.fullmatch(p.name)]
    if others:
        raise OutputError(
            "what is there was not written by unet-surgery report", where=str(folder), hint="choose another --png"
        )


_PLOT = re.compile(r"\d\d-[a-z0-9-]+\.png")


def _converted(svgs: Sequence[tuple[str, str]]) -> dict[str, bytes]:
    """Return file name → PNG, numbered in the page's order."""
    from unet_surgery.picture.png import to_png

    return {
        f"{number:02}-{re.sub(r'[^a-z0-9]+', '-', heading.lower()).strip('-') or 'plot'}.png": to_png(svg, PLOT_WIDTH)
        for number, (heading, svg) in enumerate(svgs, 1)
    }
