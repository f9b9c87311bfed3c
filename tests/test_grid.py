"""What shows pictures: grids, charts, intervals, and the page of results."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from math import nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unet_surgery.errors import UsageError
from unet_surgery.pages.chart import Curve, curves_svg
from unet_surgery.pages.page import Accuracy, Curves, Pictures, Prose, Section, Share, Table, page
from unet_surgery.sample.grid import grid, png
from unet_surgery.sample.interval import wilson

PROMPTS = ["a red circle at the left", "a blue square", "words " * 40]
EVIL = '"><script>alert(1)</script>&amp;\u202e\x00'


def noise(seed: int, height: int = 8, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (len(PROMPTS), height, width, 3), dtype=np.uint8)


COLUMNS = {"teacher": noise(0), "student": noise(1)}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def find(page_pixels: np.ndarray, picture: np.ndarray) -> tuple[int, int]:
    """Return where ``picture`` stands, row and column of its first pixel; it must stand there once."""
    height, width = picture.shape[:2]
    candidates = np.argwhere((page_pixels == picture[0, 0]).all(-1))
    places = [(y, x) for y, x in candidates if np.array_equal(page_pixels[y : y + height, x : x + width], picture)]
    assert len(places) == 1
    return int(places[0][0]), int(places[0][1])


@pytest.mark.parametrize("zoom", [1, 3])
def test_every_picture_stands_in_its_row_and_column_pixel_for_pixel(zoom: int) -> None:
    shown = pixels(grid(COLUMNS, PROMPTS, zoom=zoom))
    places = np.array([[find(shown, p.repeat(zoom, 0).repeat(zoom, 1)) for p in ps] for ps in COLUMNS.values()])
    assert (places[0, :, 0] == places[1, :, 0]).all()
    assert (np.diff(places[0, :, 0]) > 8 * zoom).all()
    assert (places[1, :, 1] - places[0, :, 1] > 12 * zoom).all()


def test_bytes_are_the_same_and_words_change_them() -> None:
    assert grid(COLUMNS, PROMPTS) == grid(dict(COLUMNS), list(PROMPTS))
    assert grid(COLUMNS, PROMPTS) != grid(COLUMNS, ["another", *PROMPTS[1:]])
    assert grid(COLUMNS, PROMPTS) != grid({"teacher": COLUMNS["teacher"], "EMA": COLUMNS["student"]}, PROMPTS)
    assert np.array_equal(pixels(png(COLUMNS["teacher"][1])), COLUMNS["teacher"][1])


def test_small_pictures_are_enlarged_and_large_ones_left() -> None:
    small, large = noise(0, 32, 32), noise(0, 512, 512)
    find(pixels(grid({"a": small}, PROMPTS)), small[0].repeat(4, 0).repeat(4, 1))
    find(pixels(grid({"a": large}, PROMPTS)), large[0])


@pytest.mark.parametrize("text", ["", " ", "x" * 500, "grün 東京 \x00\u202e", "a\nb"], ids=range(5))
def test_any_words_fit(text: str) -> None:
    shown = pixels(grid({text: noise(0)}, [text] * 3, zoom=4))
    plain = pixels(grid({"a": noise(0)}, ["a"] * 3, zoom=4))
    assert shown.shape[1] == plain.shape[1]
    assert shown.shape[0] - plain.shape[0] in (0, 20, 40)  # titles of up to two lines
    assert (shown[:, -15:] == 255).all()
    assert (shown[:, :15] == 255).all()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "a column and a prompt"),
        ({"a": noise(0)[:2]}, "column a do not fit"),
        ({"a": noise(0), "b": noise(0, 9)}, "column b do not fit"),
        ({"a": noise(0).astype(np.float32)}, "column a do not fit"),
        ({"a": noise(0)[..., 0]}, "column a do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        grid(columns, PROMPTS)
    with pytest.raises(UsageError, match="zoom"):
        grid(COLUMNS, PROMPTS, zoom=0)


def test_wilson_against_published_values() -> None:
    """Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, total), interval in published.items():
        assert wilson(successes, total) == pytest.approx(interval, abs=6e-5)
    assert wilson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


@given(total=st.integers(1, 10_000), share=st.floats(0, 1))
def test_wilson_holds_the_share_and_mirrors(total: int, share: float) -> None:
    successes = round(total * share)
    low, high = wilson(successes, total)
    assert 0 <= low <= successes / total <= high <= 1
    assert wilson(total - successes, total) == pytest.approx((1 - high, 1 - low))


class Checker(HTMLParser):
    """Reads a page: which tags it has, whether they close, its text, and what it would load."""

    VOID = ("meta", "img", "path", "rect", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def sections(text: str) -> list[Section]:
    marks = {f"student {text}": [True, False, True]}
    return [
        Prose(text, [text]),
        Table(text, [text, "MACs"], [[text, text]], note=text),
        Pictures(text, {"teacher": noise(0), f"student {text}": noise(1)}, [text, *PROMPTS[1:]], marks, note=text),
        Curves(text, [Curve(text, [0, 10, 20], [1.0, 0.5, 0.2])], x_label=text, log=True, note=text),
        Accuracy(text, {text: [Share(text, 471, 500), Share("none", 0, 0)]}, note=text),
    ]


def test_the_page_holds_all_of_it() -> None:
    text = page(sections("plain"), title="Title", lead="Lead")
    read = Checker(text)
    assert read.tags.count("img") == 6
    assert read.tags.count("section") == 5
    data = [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in read.links]
    assert np.array_equal(pixels(data[0]), noise(0)[0])
    assert np.array_equal(pixels(data[1]), noise(1)[0])
    for words in ("94.2 % (91.8–95.9; 471 of 500)", "– (0.0–100.0; 0 of 0)", "✓ right", "✗ wrong", "Title", "Lead"):
        assert words in read.words
    assert text == page(sections("plain"), title="Title", lead="Lead")
    assert "prefers-color-scheme: dark" in text


def test_no_text_becomes_markup_and_nothing_is_loaded() -> None:
    text = page(sections(EVIL), title=EVIL, lead=EVIL)
    read, plain = Checker(text), Checker(page(sections("plain"), title="Title", lead="Lead"))
    assert read.tags == plain.tags
    assert "script" not in read.tags
    assert all(link.startswith("data:image/png;base64,") for link in read.links)
    assert not re.search(r"https?:|url\(|@import", text.split("<main>")[0])
    assert not {"\u202e", "\x00"} & set(text)


@pytest.mark.parametrize(
    "section",
    [
        Table("t", ["a", "b"], [["1"]]),
        Pictures("p", {"a": noise(0)}, PROMPTS[:2]),
        Pictures("p", {"a": noise(0)}, PROMPTS, {"a": [True]}),
        Curves("c", [Curve("a", [1, 2], [1])]),
    ],
    ids=["row", "prompts", "marks", "curve"],
)
def test_sections_that_contradict_themselves(section: Section) -> None:
    with pytest.raises(ValueError, match=" "):
        page([section], title="Title")


def courses(svg: str) -> list[list[list[tuple[float, float]]]]:
    """Return each curve's segments as points."""
    found = []
    for course in re.findall(r'class="curve[^"]*" d="([^"]*)"', svg):
        segments = [segment.split(" L") for segment in course.split("M")[1:]]
        found.append([[tuple(map(float, point.split(","))) for point in segment] for segment in segments])
    return found


@given(
    values=st.lists(st.floats(-1e30, 1e30) | st.sampled_from([nan, 0.0, 1e-12]), min_size=1, max_size=30),
    log=st.booleans(),
    first=st.integers(0, 10**6),
)
def test_curves_stay_in_their_frame(values: list[float], log: bool, first: int) -> None:
    svg = curves_svg([Curve("a", range(first, first + len(values)), values)], title="t", x_label="step", log=log)
    shown = [value for value in values if value == value and (value > 0 or not log)]
    points = [point for line in courses(svg) for segment in line for point in segment]
    assert len(points) == len(shown)
    assert all(0 <= x <= 640 and 0 <= y <= 300 for x, y in points)
    heights = [y for _, y in points]
    by_value = [y for _, y in sorted(zip(shown, heights, strict=True))]
    assert all(a >= b - 0.11 for a, b in pairwise(by_value))  # greater is higher
    assert "nan" not in svg
    assert "inf" not in svg


def test_a_gap_breaks_the_line_and_long_curves_are_thinned() -> None:
    ((first, second),) = courses(
        curves_svg([Curve("a", range(5), [1, 2, nan, 3, 4])], title="t", x_label="step", log=False)
    )
    assert (len(first), len(second)) == (2, 2)
    (long,) = courses(curves_svg([Curve("a", range(50_000), [1.0] * 50_000)], title="t", x_label="step", log=False))
    assert 300 < len(long[0]) <= 600
