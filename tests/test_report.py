"""The report: each kind of input alone and together, what may stand side by side, what is refused, what is shown."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_grid import EVIL, Checker
from test_published import giga, plan_of

import unet_surgery as us
from unet_surgery.errors import DataError, OutputError, SurgeryError, UsageError
from unet_surgery.evaluate.metrics import METRICS
from unet_surgery.evaluate.pictures import Change
from unet_surgery.evaluate.published import MODELS, PROTOCOL, models_of_size
from unet_surgery.pages.page import Bar, Bars, Drawing, Scatter, Table, page
from unet_surgery.pages.scatter import Point, scatter_svg, standalone_scatter
from unet_surgery.recipe import load_recipe
from unet_surgery.results.compose import compose, distinct
from unet_surgery.results.formats import Generation, Images, Score
from unet_surgery.results.grids import picture_sections
from unet_surgery.results.protocol import (
    LOWER_IS_BETTER,
    NAMES,
    changed,
    drawn_as,
    identity,
    in_words,
    unlike_published,
)
from unet_surgery.results.read import Drawn, look
from unet_surgery.sample.presets import PRESETS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CAPTIONS = ["a red circle, left", 'a "blue" square', "grün, 東京"]
SHA = {"prompts": "ab" * 32, "weights": "67" * 32, "reference": "cd" * 32}


def draw(folder: Path, *, side: int = 32, captions: list[str] = CAPTIONS, **changes: Any) -> Path:
    """Write a folder as generate leaves it, of seeded noise."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(len(folder.name)).integers(0, 256, (len(captions), side, side, 3), dtype=np.uint8)
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(("file_name", "caption"))
    for index, caption in enumerate(captions):
        Image.fromarray(noise[index]).save(folder / f"{index:05}.png")
        rows.writerow((f"{index:05}.png", caption))
    (folder / "metadata.csv").write_text(text.getvalue(), "utf-8")
    (folder / "generation.json").write_text(json.dumps(generation(folder.name, side, len(captions), **changes)))
    return folder


def generation(name: str, side: int = 32, count: int = 3, **changes: Any) -> dict[str, Any]:
    return {
        "format": "unet-surgery-generation",
        "format_version": 1,
        "unet_surgery": "0.1.0",
        "model": {"name": name, "sha256": name, "parameters": changes.pop("parameters", 1000)},
        "prompts": {"name": "captions.csv", "sha256": SHA["prompts"], "count": count},
        "preset": None,
        "width": side,
        "height": side,
        "drawn_width": side,
        "drawn_height": side,
        "resize": None,
        "scheduler": {"class": "PNDMScheduler", "options": {"timestep_spacing": "leading"}},
        "steps": 25,
        "guidance": 7.5,
        "negative": "",
        "seed": 1234,
        "seeding": "keyed",
        "batch": 8,
        "versions": {"torch": "2.13.0"},
        "images": count,
        "seconds": 1.5,
        **changes,
    }


COCO = {"preset": "mscoco30k", "drawn_width": 512, "drawn_height": 512, "resize": "bicubic", "jpeg": 75}


def coco(name: str, parameters: int, **changes: Any) -> dict[str, Any]:
    """What generate says of a folder that was drawn as the published ones."""
    return generation(name, 256, 30_000, **{"parameters": parameters, **COCO, **changes})


def scores(path: Path, drawn: dict[str, Any] | None, values: dict[str, float], **changes: Any) -> Path:
    """Write the JSON of score; ``changes`` are of the protocol."""
    count = changes.pop("count", drawn["images"] if drawn else 3)
    found = [
        {
            "metric": metric,
            "value": value,
            "error": None,
            "protocol": {
                "implementation": f"as the library of {metric}",
                "weights": {"name": "weights", "sha256": SHA["weights"]},
                "reference": {
                    "name": "coco",
                    "sha256": SHA["reference"],
                    "count": 40_504,
                    "resolution": [256, 256],
                    "change": PROTOCOL.reference.change,
                },
                "resolution": [256, 256],
                "resize": "bilinear",
                "count": count,
                "versions": {},
                "more": "of a later version",
                **changes,
            },
        }
        for metric, value in values.items()
    ]
    name = drawn["model"]["name"] if drawn else path.stem
    side = drawn["width"] if drawn else 32
    images = {"folder": name, "count": count, "width": side, "height": side, "generation": drawn}
    data = {"format": "unet-surgery-scores", "format_version": 1, "unet_surgery": "0.1.0", "images": images}
    path.write_text(json.dumps({**data, "scores": found}))
    return path


def bench(path: Path, rows: dict[str, tuple[int, float]], latent: int = 64) -> Path:
    """Write the JSON of bench; ``rows``: model → parameters, milliseconds."""
    found = [
        {
            "model": model,
            "parameters": parameters,
            "macs_conv_linear": 10**9,
            "macs_all": 2 * 10**9,
            "latent": [latent, latent],
            "dtype": "fp32",
            "batch": 1,
            "compile": False,
            "unet_ms": {"median": ms, "low": ms * 0.9, "high": ms * 1.2, "runs": 20},
            "picture_s": None,
            "peak_bytes": 10**8,
            "ratio_to_first": 1.0,
        }
        for model, (parameters, ms) in rows.items()
    ]
    machine = {"device": "cpu", "cpu": "Some CPU", "threads": 1, "torch": "2.13.0"}
    data = {"format": "unet-surgery-bench", "format_version": 1, "unet_surgery": "0.1.0", "machine": machine}
    path.write_text(json.dumps({**data, "rows": found}))
    return path


def metrics(folder: Path) -> Path:
    """Write a run's metrics, the last line half."""
    folder.mkdir(parents=True)
    lines = [
        {
            "step": 10 * k,
            "stage": "main",
            "loss": 2.0 / k,
            "task": 1.0 / k,
            "output_kd": 0.5 / k,
            "feature/up.0": 3.0 / k,
        }
        for k in range(1, 6)
    ]
    lines[2]["loss"] = None  # type: ignore[assignment]  # it was not finite
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60, "lo')
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One input of each kind."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "plan.json").write_text(us.plan("bk_tiny", "tiny-random").to_json())
    return {
        "student": us.prune("bk_tiny", "tiny-random", root / "student").folder,
        "plan": root / "plan.json",
        "run": metrics(root / "run"),
        "metrics": root / "run" / "metrics.jsonl",
        "drawn": draw(root / "teacher"),
        "generation": root / "teacher" / "generation.json",
        "scores": scores(root / "scores.json", coco("mine", 323_384_964), {"fid": 16.4, "is": 31.0, "clip": 0.27}),
        "bench": bench(root / "bench.json", {"mine": (323_384_964, 1100.0), "teacher": (859_520_964, 1800.0)}),
    }


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., tuple[str, Checker]]:
    """Return a function that makes a page: its text, and the page read."""
    numbers = itertools.count()

    def make(*paths: Path, **options: Any) -> tuple[str, Checker]:
        out = tmp_path / f"{next(numbers)}.html"
        us.report(paths, out, **options)
        text = out.read_text("utf-8")
        return text, Checker(text)

    return make


Make = Callable[..., tuple[str, Checker]]
HEADINGS = {
    "student": ["Architecture", "Sizes"],
    "plan": ["Architecture", "Sizes"],
    "run": ["Losses"],
    "metrics": ["Losses"],
    "drawn": ["Pictures"],
    "generation": ["Pictures"],
    "scores": ["Scores", "Quality against size", "Published results"],
    "bench": ["Speed"],
}


def headings(text: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", text)


@pytest.mark.parametrize("kind", HEADINGS)
def test_each_kind_of_input_alone(kind: str, inputs: dict[str, Path], made: Make) -> None:
    text, _ = made(inputs[kind])
    assert headings(text) == HEADINGS[kind]


def test_all_together_and_the_same_bytes(inputs: dict[str, Path], made: Make) -> None:
    text, read = made(*inputs.values())
    assert headings(text) == [
        "Architecture", "Sizes", "Losses", "Scores", "Pictures", "Quality against size", "Quality against time",
        "Speed", "Published results",
    ]  # fmt: skip
    # metrics.jsonl and its folder are one input
    assert "From 2 surgeries, 1 training run, 1 folder of pictures, 1 file of scores, 1 file of times." in text
    assert made(*inputs.values())[0] == text
    anchors = [link for link in read.links if link.startswith("#")]
    assert len(anchors) == 9
    assert all(f'id="{anchor[1:]}"' in text for anchor in anchors)


def test_what_the_page_says(inputs: dict[str, Path], made: Make) -> None:
    words = made(*inputs.values())[1].words
    plan = us.plan("bk_tiny", "tiny-random")
    assert f"{plan.student.params:,}" in words
    assert f"{plan.teacher.params:,}" in words
    for expected in ("16.4", "31", "0.27", "BK-SDM-Tiny", "17.12", "1100 (990 to 1320)", "Some CPU", *CAPTIONS):
        assert expected in words
    alts = re.findall(r'<img alt="([^"]*)"', made(inputs["drawn"])[0])
    assert alts[0] == "teacher: a red circle, left"


def test_nothing_is_loaded_from_elsewhere_and_no_script(inputs: dict[str, Path], made: Make) -> None:
    text, read = made(*inputs.values())
    assert not {"script", "link", "iframe", "object", "form"} & set(read.tags)
    assert all(re.match(r"data:image/(png|jpeg|svg\+xml);base64,|#section-\d+$", link) for link in read.links)
    assert not re.search(r"url\(|@import|https?://", re.sub(r'base64,[^"]*', "", text))


def test_no_text_of_an_input_becomes_markup(tmp_path: Path, made: Make) -> None:
    def pages(word: str, root: Path) -> tuple[str, Checker]:
        root.mkdir()
        folder = draw(root / "drawn", captions=[f"{word}\n{word}", "b", "c"])
        data = json.loads((folder / "generation.json").read_text())
        data["model"]["name"] = data["prompts"]["name"] = data["negative"] = data["scheduler"]["class"] = word
        (folder / "generation.json").write_text(json.dumps(data))
        scored = coco(word, 323_384_964, negative=word, seeding=word)
        other = coco(f"{word}2", 323_384_964, negative=word, seeding=word)
        named = scores(root / "a.json", scored, {"fid": 1.0, word: 2.0}, implementation=word)
        again = scores(root / "b.json", other, {"fid": 1.5, word: 2.5}, implementation=word)
        timed = bench(root / "t.json", {word: (323_384_964, 9.0)})
        data = json.loads(timed.read_text())
        data["machine"]["cpu"] = data["rows"][0]["dtype"] = word
        timed.write_text(json.dumps(data))
        plan = json.loads(us.plan("bk_tiny", "tiny-random").to_json())
        plan["teacher"]["id"] = plan["recipe"]["name"] = word
        (root / "p.json").write_text(json.dumps(plan))
        return made(root / "p.json", folder, named, again, timed, title=word)

    (evil, read), (plain, harmless) = pages(EVIL.replace("\x00", ""), tmp_path / "1"), pages("plain", tmp_path / "2")
    assert read.tags == harmless.tags
    assert "<script" not in evil
    assert "\u202e" not in evil
    svgs = [base64.b64decode(data).decode() for data in re.findall(r"svg\+xml;base64,([^\"]*)", evil)]
    assert len(svgs) == 1
    assert "<script" not in svgs[0]
    assert len(plain) > 1000


# -- what may be compared ----------------------------------------------------------------------------------------------


def tables(text: str) -> list[str]:
    """Return the score tables."""
    return re.findall(r"<table>.*?</table>", text.split(">Scores</h2>")[1].split("<h2", maxsplit=1)[0], re.DOTALL)


@pytest.mark.parametrize(
    "change",
    [{"steps": 8}, {"guidance": 2.0}, {"seed": 1}, {"negative": "ugly"}, {"drawn_width": 768}, {"jpeg": None},
     {"scheduler": {"class": "DDIMScheduler", "options": {}}}, {"stream": {"batch": 8, "device": "cpu"}},
     {"scheduler": {"class": "PNDMScheduler", "options": {"timestep_spacing": "leading", "use_beta_sigmas": True}}},
     {"scheduler": {"class": "PNDMScheduler", "options": {"timestep_spacing": "trailing"}}},
     {"prompts": {"name": "x", "sha256": "ef", "count": 3}}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_pictures_drawn_otherwise_have_a_table_and_axis_of_their_own(
    change: dict[str, Any], tmp_path: Path, made: Make
) -> None:
    first = scores(tmp_path / "a.json", coco("one", 859_520_964), {"kid": 1.0})
    same = scores(tmp_path / "b.json", coco("two", 323_384_964), {"kid": 2.0})
    other = scores(tmp_path / "c.json", coco("three", 323_384_964, **change), {"kid": 3.0})
    text, _ = made(first, same, other)
    found = tables(text)
    assert ["one" in found[0], "two" in found[0], "three" in found[0], "three" in found[1]] == [True, True, False, True]
    assert "Not to be compared with the first table" in text
    charts = re.findall(r'<svg class="chart".*?</svg>', text)
    assert len(charts) == 1  # of the two that are alike
    assert "three" not in charts[0]


@pytest.mark.parametrize(
    "change",
    [{"implementation": "another"}, {"weights": {"name": "w", "sha256": "00"}}, {"resize": None}, {"count": 5000},
     {"reference": {"name": "r", "sha256": "00", "count": 40_504}}, {"resolution": [512, 512]}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_scores_measured_otherwise_have_a_column_and_axis_of_their_own(
    change: dict[str, Any], tmp_path: Path, made: Make
) -> None:
    first = scores(tmp_path / "a.json", coco("one", 859_520_964), {"kid": 1.0})
    other = scores(tmp_path / "b.json", coco("two", 323_384_964), {"kid": 2.0}, **change)
    text, _ = made(first, other)
    assert 'class="chart"' not in text
    assert ("KID (2)" in text) or len(tables(text)) == 2


def test_options_that_are_the_models_or_not_used_make_no_difference() -> None:
    """A later diffusers writes more options, all of them off; a model brings its own noise schedule."""

    def settings(**more: Any) -> Any:
        options = {"timestep_spacing": "leading", **more}
        data = generation("x", scheduler={"class": "PNDMScheduler", "options": options})
        return drawn_as(Generation.model_validate(data))

    before = settings()
    same = settings(prediction_type="v_prediction", beta_end=0.012, use_beta_sigmas=False, use_flow_sigmas=None)
    assert identity(before) == identity(same)
    other = settings(final_sigmas_type="zero")
    assert changed(before, other) == "final_sigmas_type none → zero"
    assert "final_sigmas_type" not in in_words(other)


def test_the_published_protocol_is_the_presets() -> None:
    """One fact in one place: what --preset draws is what published numbers are compared with."""
    drawn = Images.model_validate(
        {"folder": "x", "count": 30_000, "width": 256, "height": 256, "generation": coco("x", 1)}
    )
    protocol = {"implementation": "x", "count": 30_000}
    found = Score.model_validate({"metric": "fid", "value": 1.0, "protocol": protocol})
    assert unlike_published(drawn, found) == []
    theirs = {"name": "x", "count": 40_504, "resolution": [256, 256], "change": Change(256, 75).words}
    for reference, unlike in (
        (theirs, []),
        (theirs | {"count": 5_000}, ["pictures of the reference 5,000 instead of 40,504"]),
        (theirs | {"change": None}, [f"reference prepared by what is not recorded instead of {theirs['change']}"]),
    ):
        found = Score.model_validate({"metric": "fid", "value": 1.0, "protocol": {**protocol, "reference": reference}})
        assert unlike_published(drawn, found) == unlike
    preset = PRESETS["mscoco30k"]
    assert PROTOCOL.preset is preset
    assert (PROTOCOL.scheduler, PROTOCOL.filter, PROTOCOL.side) == ("PNDMScheduler", "bicubic", preset.resize)


def test_every_metric_has_a_label_and_a_direction() -> None:
    assert set(NAMES) == set(METRICS)
    assert set(LOWER_IS_BETTER) == {name for m in METRICS.values() for name in (m.name, m.general)}
    assert {name for name, lower in LOWER_IS_BETTER.items() if lower} == {
        "fid", "kid", "frechet-distance", "kernel-distance"
    }  # fmt: skip


def test_a_name_or_a_machine_makes_no_difference(tmp_path: Path, made: Make) -> None:
    first = scores(tmp_path / "a.json", coco("one", 859_520_964), {"kid": 1.0})
    moved = coco("two", 323_384_964, device="other", versions={}, batch=1, seconds=9.0)
    moved["prompts"]["name"] = "elsewhere.csv"
    text, _ = made(first, scores(tmp_path / "b.json", moved, {"kid": 1.25}))
    assert len(tables(text)) == 1
    assert "[+0.25]" in text


def test_files_of_scores_of_one_model_meet_in_one_row(tmp_path: Path, made: Make) -> None:
    drawn = coco("one", 859_520_964)
    text, _ = made(scores(tmp_path / "a.json", drawn, {"kid": 1.0}), scores(tmp_path / "b.json", drawn, {"toy": 0.5}))
    (table,) = tables(text)
    assert table.count('<th scope="row">') == 1


def test_published_points_share_an_axis_only_with_their_own_protocol(tmp_path: Path, made: Make) -> None:
    alike = scores(tmp_path / "a.json", coco("mine", 323_384_964), {"fid": 16.4})
    (chart,) = re.findall(r'<svg class="chart".*?</svg>', made(alike)[0])
    assert chart.count('class="mark own"') == 1
    assert chart.count('class="mark others"') == sum(bool(model.scores) for model in MODELS) == 11
    changes: tuple[dict[str, Any], ...] = (
        {"steps": 8}, {"guidance": 7.0}, {"preset": None}, {"seed": 0}, {"jpeg": None}, {"jpeg": 90}, {"resize": None},
        {"resize": "lanczos"}, {"drawn_width": 768}, {"negative": "ugly"}, {"strength": 0.5}, {"init": "abc"},
        {"prompts": {"name": "mine", "sha256": "ab", "count": 5000}},
    )  # fmt: skip
    for change in changes:
        first = scores(tmp_path / "b.json", coco("mine", 323_384_964, **change), {"fid": 16.4})
        second = scores(tmp_path / "c.json", coco("teacher", 859_520_964, **change), {"fid": 13.4})
        text, _ = made(first, second)
        charts = re.findall(r'<svg class="chart".*?</svg>', text)
        kinds = [("mark own" in chart, "mark others" in chart) for chart in charts]
        assert kinds == [(True, False), (False, True)]
        name = next(iter(change))
        called = {"jpeg": "JPEG", "resize": "resized by", "drawn_width": "drawn at", "init": "drawn from"}
        assert f"{called.get(name, name)} " in text.split("these were made otherwise: ")[1].split("</p>")[0]


def test_what_was_not_recorded_is_not_taken_for_the_same(tmp_path: Path, made: Make) -> None:
    known, unknown = coco("one", 859_520_964), scores(tmp_path / "b.json", None, {"fid": 2.0})
    text, _ = made(scores(tmp_path / "a.json", known, {"fid": 1.0}), unknown)
    assert len(tables(text)) == 2
    assert "not recorded" in text


def test_a_score_in_two_files_is_one(tmp_path: Path, made: Make) -> None:
    files = [scores(tmp_path / f"{k}.json", coco("one", 859_520_964), {"kid": 1.5}) for k in range(2)]
    (table,) = tables(made(*files)[0])
    assert table.count("<tr>") == 2  # its head, and one row
    other = scores(tmp_path / "other.json", coco("one", 859_520_964), {"kid": 1.6})
    (table,) = tables(made(*files, other)[0])
    assert table.count("<tr>") == 3


def test_what_was_only_counted_has_no_empty_columns(tmp_path: Path, made: Make) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(us.bench(["sd-v1-random", "sd-v2-random"], run=False).to_json()))
    text, read = made(path)
    assert headings(text) == ["Parameters and MACs"]
    assert re.findall(r"<th[^>]*>([^<]*)</th>", text)[:3] == ["network", "parameters", "MACs, all"]
    assert "859,520,964" in read.words
    assert "ms" not in read.words.split()


def test_quality_against_time_joins_by_name_then_by_size(tmp_path: Path, made: Make) -> None:
    scored = [
        scores(tmp_path / f"{name}.json", coco(name, size), {"kid": value})
        for name, size, value in (("big", 2000, 1.0), ("pruned", 1000, 9.0), ("distilled", 1000, 2.0))
    ]
    timed = bench(tmp_path / "t.json", {"big": (2000, 20.0), "distilled": (1000, 12.5)})
    text, read = made(*scored, timed)
    assert "12.5, as distilled" in read.words  # the pruned one has the same network
    two = bench(tmp_path / "t2.json", {"big": (2000, 20.0), "a": (1000, 12.5), "b": (1000, 14.0)})
    text, _ = made(*scored, two)  # which of the two would be a guess
    assert "Quality against time" not in text


# -- pictures ----------------------------------------------------------------------------------------------------------


def shown(text: str) -> list[np.ndarray]:
    data = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]*)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(item))).convert("RGB")) for item in data]


def test_columns_are_matched_by_the_prompts_place(tmp_path: Path, made: Make) -> None:
    teacher = draw(tmp_path / "teacher", parameters=2000)
    student = draw(tmp_path / "student1", parameters=1000)
    found = shown(made(student, teacher)[0])  # the larger network first
    files = [folder / f"{index:05}.png" for index in range(3) for folder in (teacher, student)]
    assert len(found) == 6
    assert all(np.array_equal(a, np.asarray(Image.open(b))) for a, b in zip(found, files, strict=True))
    assert len(shown(made(student, teacher, rows=2)[0])) == 4


def test_other_prompts_make_another_grid_and_other_settings_are_said(tmp_path: Path, made: Make) -> None:
    first, second = draw(tmp_path / "a"), draw(tmp_path / "bb", steps=8)
    other = draw(tmp_path / "ccc", captions=["x", "y"])
    assert headings(made(first, second)[0]) == ["Pictures"]
    assert "Not drawn as a: bb (steps 25 → 8)." in made(first, second)[0]
    assert headings(made(first, other)[0]) == ["Pictures 1: a", "Pictures 2: ccc"]


def test_pictures_beside_no_others_fill_the_line(tmp_path: Path, made: Make) -> None:
    text, read = made(draw(tmp_path / "alone"))
    assert len(shown(text)) == text.count("<figcaption") == 3
    assert 'class="grid"' not in text
    assert "alone" in read.words


def test_who_drew_is_called_as_the_model(tmp_path: Path, made: Make) -> None:
    student = generation("toy-bk_tiny")["model"]
    folders = [draw(tmp_path / "pictures", model=student), draw(tmp_path / "toy", parameters=2000)]
    told = {**coco("x", 10), "model": student}
    text, _ = made(*folders, scores(tmp_path / "a.json", told, {"kid": 1.0}))
    assert re.findall(r'<div class="head">([^<]*)</div>', text) == ["toy", "toy-bk_tiny (pictures)"]
    assert ">toy-bk_tiny</th>" in tables(text)[0]  # whose pictures are folder toy-bk_tiny


def test_equal_folder_names_stay_two_columns(tmp_path: Path, made: Make) -> None:
    one, two = draw(tmp_path / "1" / "im256"), draw(tmp_path / "2" / "im256")
    text, _ = made(one, two)
    assert len(shown(text)) == 6
    assert distinct([("a", 1, "m"), ("a", 2, "m"), ("a", 3, "m"), ("a", 1, "m")]) == ["a", "a (m)", "a (3)", "a"]


def test_pictures_shrink_until_they_fit_and_then_become_fewer(tmp_path: Path) -> None:
    found = look(draw(tmp_path / "large", side=300, captions=["x"] * 8), max_rows=8)
    assert isinstance(found, Drawn)

    def size(room: int) -> tuple[int, int, list[str]]:
        sections, left_out = picture_sections([found], ["large"], heading="Pictures", room=room)
        files = [file for section in sections for column in section.columns.values() for file in column]
        assert sum(len(file.data) for file in files) * 4 / 3 <= room
        return len(files), max((file.width for file in files), default=0), left_out

    assert size(10**7) == (8, 300, [])
    count, side, left_out = size(200_000)
    assert (count, left_out) == (8, [])
    assert 64 < side < 300
    for room in range(60_000, 260_000, 20_000):  # also where the guess from first rows is a little off
        size(room)
    count, side, left_out = size(12_000)
    assert 0 < count < 8
    assert "no room" in left_out[0]
    assert size(100)[0] == 0


@pytest.mark.extra
def test_thirty_grids_stay_below_ten_megabytes(tmp_path: Path) -> None:
    first = draw(tmp_path / "first", side=512, captions=[str(row) for row in range(8)])
    folders = []
    for k, name in itertools.product(range(30), ("teacher", "pruned", "distilled")):
        folders.append(tmp_path / f"{k:02}-{name}")
        shutil.copytree(first, folders[-1], copy_function=os.link)
        (folders[-1] / "generation.json").unlink()
        prompts = {"name": "captions.csv", "sha256": str(k), "count": 8}
        (folders[-1] / "generation.json").write_text(json.dumps(generation(name, 512, 8, prompts=prompts)))
    result = us.report(folders, tmp_path / "page.html")
    assert result.num_bytes < 10e6
    assert len(re.findall("<h2", result.page.read_text("utf-8"))) == 30


# -- what is refused ---------------------------------------------------------------------------------------------------


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def test_what_is_no_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "config.json").write_text('{"format": "other"}')
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    for name, kind in (("folder", UsageError), ("config.json", UsageError), ("text.json", DataError),
                       ("picture.png", DataError), ("nothing", UsageError)):  # fmt: skip
        with pytest.raises(kind) as caught:
            us.report([tmp_path / name], tmp_path / "out.html")
        assert name in str(caught.value.where)
        assert "unet-surgery generate" in str(caught.value)
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("scores", lambda d: d["scores"][0].pop("value"), "scores.0.value"),
        ("scores", lambda d: d["scores"][0].update(value="3"), "scores.0.value"),
        ("scores", lambda d: d["scores"][0].update(value=True), "scores.0.value"),
        ("scores", lambda d: d["scores"][0]["protocol"].pop("count"), "scores.0.protocol.count"),
        ("scores", lambda d: d["images"]["generation"].update(steps="x\x1b[2J"), "images.generation.steps"),
        ("scores", lambda d: d.update(format_version=2), "version"),
        ("bench", lambda d: d["rows"][1]["unet_ms"].update(median=0), "rows.1.unet_ms.median"),
        ("bench", lambda d: d["rows"][0].update(latent=[64]), "rows.0.latent"),
        ("bench", lambda d: d["rows"][0].update(parameters=-1), "rows.0.parameters"),
        ("drawn", lambda d: d.update(seed=1.5), "seed"),
        ("drawn", lambda d: d["scheduler"].pop("class"), "scheduler.class"),
    ],
)
def test_a_damaged_input_is_named_with_its_key(
    kind: str, change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    if kind == "drawn":
        shutil.copytree(inputs["drawn"], tmp_path / "drawn")
        path = edited(tmp_path / "drawn" / "generation.json", change)
    else:
        shutil.copy(inputs[kind], tmp_path / "x.json")
        path = edited(tmp_path / "x.json", change)
    with pytest.raises(DataError) as caught:
        us.report([path], tmp_path / "out.html")
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_pictures_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    folder = draw(tmp_path / "drawn")

    def refused(words: str) -> None:
        with pytest.raises(SurgeryError, match=words):
            us.report([folder], tmp_path / "out.html")

    whole = (folder / "00001.png").read_bytes()
    (folder / "00001.png").write_bytes(whole[:200])
    refused("00001.png")
    (folder / "00001.png").unlink()
    refused("00001.png")
    (folder / "metadata.csv").write_text("file_name,caption\n../../secret.png,x\n")
    refused("generate names it")
    (folder / "generation.json").unlink()
    (folder / ".unfinished").mkdir()
    refused("not all drawn")


@pytest.mark.parametrize("line", ['{"step": "1"}', '{"loss": 1}', '{"step": 1, "loss": "x"}', "no", '{"step": 1e400}'])
def test_damaged_metrics_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="metrics"):
        us.report([tmp_path], tmp_path / "out.html")


def test_what_is_there_stays(tmp_path: Path, inputs: dict[str, Path]) -> None:
    out = tmp_path / "out.html"
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        us.report([inputs["bench"]], out)
    assert out.read_text() == "mine"
    us.report([inputs["bench"]], out, force=True)
    assert "Some CPU" in out.read_text()
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not written by"):
        us.report([inputs["bench"]], out, png=tmp_path / "plots", force=True)
    for bad in ({"rows": 0}, {"rows": 51}):
        with pytest.raises(UsageError):
            us.report([inputs["bench"]], tmp_path / "new.html", **bad)
    with pytest.raises(UsageError, match="nothing to report"):
        us.report([], tmp_path / "new.html")
    with pytest.raises(UsageError, match="HTML"):
        us.report([inputs["bench"]], tmp_path / "new.pdf")


# -- plots -------------------------------------------------------------------------------------------------------------


def test_plots_as_png(tmp_path: Path, inputs: dict[str, Path]) -> None:
    scored = scores(tmp_path / "fid.json", coco("mine", 323_384_964), {"fid": 16.4})
    paths = [inputs["student"], inputs["run"], scored]
    result = us.report(paths, tmp_path / "out.html", png=tmp_path / "plots")
    names = [path.name for path in result.plots]
    assert names == ["01-architecture.png", "02-losses.png", "03-quality-against-size.png"]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "plots").iterdir())
    for path in result.plots:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[1] == 1280
        assert len(np.unique(pixels @ np.array([1, 256, 65_536]))) > 20  # there is something on it
    again = us.report([scored], tmp_path / "out.html", png=tmp_path / "plots", force=True)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["01-quality-against-size.png"]
    assert again.plots[0].name == "01-quality-against-size.png"


def test_a_page_that_cannot_be_written_leaves_the_plots(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plots = tmp_path / "out.html", tmp_path / "plots"
    us.report([inputs["run"]], out, png=plots)
    before = {path.name: path.read_bytes() for path in [out, *plots.iterdir()]}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unet_surgery.checkpoint.disk.replace_file", full)
    with pytest.raises(OutputError, match="cannot be written"):
        us.report([inputs["student"]], out, png=plots, force=True)
    assert {path.name: path.read_bytes() for path in [out, *plots.iterdir()]} == before


numbers = st.floats(-1e9, 1e9).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(numbers, numbers, st.sampled_from(["own", "published"])), min_size=1, max_size=20))
def test_points_and_names_stay_in_their_frame_and_keep_their_order(values: list[tuple[float, float, Any]]) -> None:
    points = [Point(f"network {k}", x, y, kind, y - 1, y + 1) for k, (x, y, kind) in enumerate(values)]
    svg = scatter_svg(points, title="t", x_label="x", y_label="y")
    places = {int(n): (float(x), float(y)) for x, y, n in re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="middle">(\d+)</text></g>', svg)}  # fmt: skip
    assert sorted(places) == list(range(1, len(points) + 1))
    assert all(64 <= x <= 624 and 30 <= y <= 320 for x, y in places.values())
    for axis, sign in ((0, 1), (1, -1)):
        ordered = [places[k + 1][axis] for k in sorted(range(len(points)), key=lambda k: sign * values[k][axis])]
        assert all(a <= b + 0.11 for a, b in itertools.pairwise(ordered))
    assert "nan" not in svg


def test_names_do_not_cover_each_other() -> None:
    points = [Point(f"a longer name {k}", k % 4, k // 4) for k in range(16)]
    svg = scatter_svg(points, title="t", x_label="x", y_label="y")
    boxes = [(float(x), float(y)) for x, y in re.findall(r'class="name" x="([\d.-]+)" y="([\d.-]+)"', svg)]
    assert len(boxes) > 8
    assert all(abs(a[1] - b[1]) >= 12 or abs(a[0] - b[0]) > 80 for a, b in itertools.combinations(boxes, 2))
    assert "published" in standalone_scatter([Point("a", 1, 1, "published")], title="t", x_label="x", y_label="y")


def test_sections_of_the_report_escape_and_check() -> None:
    sections = [
        Table("T", ["a", EVIL], [[EVIL, "1"]], caption=EVIL),
        Scatter("S", [Point(EVIL, 1, 2, "published", 1, 3)], EVIL, EVIL, [EVIL], [EVIL]),
        Bars("B", [Bar(EVIL, 1, EVIL, 0.5, 1.5), Bar("none", 0, "")], caption=EVIL),
        Drawing("D", "<svg></svg>", EVIL),
    ]
    text = page(sections, title="T", contents=True)
    assert "script" not in Checker(text).tags
    assert "<script" not in text
    with pytest.raises(ValueError, match="as many"):
        page([Scatter("S", [Point("a", 1, 2)], "x", "y", [], [])], title="T")
    with pytest.raises(ValueError, match="no points"):
        scatter_svg([], title="t", x_label="x", y_label="y")


# -- published ---------------------------------------------------------------------------------------------------------

BASES = {"SD v1.4": "sd1", "SD v2.1-base": "sd2", "SD v2.1 (768)": "sd2-768", "SDXL base": "sdxl"}


@pytest.mark.parametrize("model", [m for m in MODELS if m.recipe], ids=lambda m: m.name)
def test_published_sizes_are_what_the_recipes_make(model: Any) -> None:
    plan = plan_of(load_recipe(model.recipe), BASES[model.base])
    assert (plan.student.params, plan.student.tensors) == (model.parameters, model.tensors)
    assert giga(plan.student.macs_all) == model.gmacs_all
    assert model.gmacs is None or giga(plan.student.macs) == model.gmacs
    base = next(m for m in MODELS if m.name == model.base)
    assert (plan.teacher.params, plan.teacher.tensors) == (base.parameters, base.tensors)
    assert (giga(plan.teacher.macs), giga(plan.teacher.macs_all)) == (base.gmacs, base.gmacs_all)
    assert plan.teacher_config["sample_size"] == base.latent == model.latent


def test_published_scores_are_whole() -> None:
    assert len({model.name for model in MODELS}) == len(MODELS) == 22
    assert all(set(model.scores) in (set(), {"fid", "is", "clip"}) for model in MODELS)
    assert {model.name for model in models_of_size(482_346_884)} == {"BK-SDM-Small", "BK-SDM-Small-2M"}
    assert (PROTOCOL.count, PROTOCOL.side, PROTOCOL.preset.steps, PROTOCOL.preset.guidance) == (30_000, 256, 25, 7.5)
    assert compose([]).sections == []


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.mark.extra
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it(width: int, tmp_path: Path, inputs: dict[str, Path]) -> None:
    """No errors, no requests, all sections and pictures visible, nothing wider than the window. A script measures."""
    out = tmp_path / "page.html"
    wide = [draw(tmp_path / f"model-{k}-with-a-long-name", parameters=k + 1) for k in range(7)]
    us.report([*inputs.values(), *wide], out)
    measure = (
        "<script>addEventListener('load', () => { const broken = [...document.images].filter(i => !i.naturalWidth);"
        "const hidden = [...document.querySelectorAll('section')].filter(s => s.getBoundingClientRect().height < 20);"
        "parent.postMessage(JSON.stringify({width: innerWidth, scroll: document.documentElement.scrollWidth,"
        "broken: broken.length, hidden: hidden.length, images: document.images.length, requests: performance"
        ".getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length}), '*'); })</script></body>"
    )
    (tmp_path / "inner.html").write_text(out.read_text("utf-8").replace("</body>", measure), "utf-8")
    probe = tmp_path / "probe.html"  # a window is never narrower than 500, a frame is
    probe.write_text(
        "<!doctype html><script>addEventListener('message', e => { const o = document.createElement('output');"
        "o.id = 'measured'; o.textContent = e.data; document.body.append(o); })</script>"
        f'<body><iframe src="inner.html" width="{width}" height="900" style="border: 0"></iframe></body>'
    )
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1300,900", "--hide-scrollbars", "--virtual-time-budget=5000", probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'<output id="measured">([^<]*)</output>', done.stdout)
    assert match is not None
    found = json.loads(match[1])
    assert found["width"] == width
    assert found["scroll"] <= found["width"]
    assert (found["broken"], found["hidden"], found["requests"]) == (0, 0, 0)
    assert found["images"] == len(re.findall("<img", out.read_text("utf-8"))) > 20
    assert "CONSOLE" not in done.stderr
