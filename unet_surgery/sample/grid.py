"""Pictures side by side, a column a model and a row a prompt: one PNG, the same bytes for the same input."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from unet_surgery.errors import UsageError, printable

__all__ = ["grid", "png"]

Pictures = NDArray[np.uint8]

SHOWN_SIDE = 128
"""The side that small pictures are enlarged to, where no zoom is given."""

MARGIN, GAP, TEXT_GAP = 20, 10, 16
TEXT_SIZE, LINE = 15, 20
CAPTION_WIDTH = 200
MAX_LINES = 6
PAPER, INK, MUTED, EDGE = (255, 255, 255), (27, 36, 45), (87, 98, 109), (221, 227, 233)


def grid(columns: Mapping[str, Pictures], prompts: Sequence[str], *, zoom: int | None = None) -> bytes:
    """Return a PNG of ``columns``, title → uint8 [n, H, W, 3], with ``prompts`` at the left of the n rows.

    Pictures are enlarged by the whole number ``zoom``, each pixel a square (None: until they are about 128 wide).

    Raises:
        UsageError: there are no pictures, or the columns do not have one picture of one size for each prompt.
    """
    height, width = _check(columns, prompts)
    zoom = max(1, SHOWN_SIDE // width) if zoom is None else zoom
    if zoom < 1:
        raise UsageError("zoom must be 1 or more", found=str(zoom))
    font = _font()
    tall, wide = height * zoom, width * zoom
    captions = [
        _wrapped(prompt if prompt.strip() else "(no words)", font, CAPTION_WIDTH, max(1, min(MAX_LINES, tall // LINE)))
        for prompt in prompts
    ]
    titles = [_wrapped(title, font, wide, 2) for title in columns]
    left = MARGIN + CAPTION_WIDTH + TEXT_GAP
    top = MARGIN + LINE * max(map(len, titles)) + GAP // 2
    row_tall = [max(tall, LINE * len(lines)) for lines in captions]
    page_wide = left + len(columns) * (wide + GAP) - GAP + MARGIN
    page = Image.new("RGB", (page_wide, top + sum(row_tall) + GAP * (len(prompts) - 1) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for k, lines in enumerate(titles):
        middle = left + k * (wide + GAP) + wide / 2
        _write(draw, lines, font, (middle, top - GAP // 2 - LINE * len(lines)), "ma", INK)
    y = top
    for row, lines in enumerate(captions):
        _write(draw, lines, font, (MARGIN, y + (row_tall[row] - LINE * len(lines)) / 2), "la", MUTED)
        for k, pictures in enumerate(columns.values()):
            x = left + k * (wide + GAP)
            picture = Image.fromarray(np.ascontiguousarray(pictures[row]))
            draw.rectangle((x - 1, y - 1, x + wide, y + tall), outline=EDGE)
            page.paste(picture.resize((wide, tall), Image.Resampling.NEAREST), (x, y))
        y += row_tall[row] + GAP
    return _encoded(page)


def png(picture: Pictures) -> bytes:
    """Return one picture, uint8 [H, W, 3], as a PNG."""
    return _encoded(Image.fromarray(np.ascontiguousarray(picture)))


def _check(columns: Mapping[str, Pictures], prompts: Sequence[str]) -> tuple[int, int]:
    """Return the pictures' height and width."""
    if not columns or not prompts:
        raise UsageError("a grid needs a column and a prompt at least")
    first = next(iter(columns.values()))
    for title, pictures in columns.items():
        is_good = pictures.dtype == np.uint8 and pictures.shape == (len(prompts), *first.shape[1:])
        if not is_good or pictures.ndim != 4 or pictures.shape[-1] != 3 or 0 in pictures.shape:
            raise UsageError(
                f"the pictures of column {printable(title)} do not fit the grid",
                expected=f"uint8 [{len(prompts)}, height, width, 3], of one size in all columns",
                found=f"{pictures.dtype} {list(pictures.shape)}",
            )
    return first.shape[1], first.shape[2]


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return the font that comes with Pillow: no machine's own, so that bytes are the same everywhere."""
    return ImageFont.load_default(TEXT_SIZE)


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[str]:
    """Break ``text`` into lines of ``width`` pixels at spaces, or within a word that is wider; … for what is cut."""
    lines = [""]
    for word in _plain(text).split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > max_lines:
            break
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[max_lines - 1 :] = [last.rstrip() + "…"]
    return lines


def _plain(text: str) -> str:
    """Return ``text`` in what Pillow's font can show, ASCII: letters without their accents, ? for what is foreign."""
    without_accents = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c.isspace() or " " <= c <= "~" else "?" for c in without_accents)


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    at: tuple[float, float],
    anchor: str,
    colour: tuple[int, int, int],
) -> None:
    x, y = at
    for k, line in enumerate(lines):
        draw.text((round(x), round(y + k * LINE)), line, fill=colour, font=font, anchor=anchor)


def _encoded(page: Image.Image) -> bytes:
    file = io.BytesIO()
    page.save(file, format="PNG", compress_level=6)
    return file.getvalue()
