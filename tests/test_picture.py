"""The architecture picture: it shows the plan, nothing overlaps, everybody can read it, and its file is whole."""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from configs import CONFIGS, FULL_SIZE
from hypothesis import given, settings
from test_cli import HEAVY, loaded, main_with, tool
from test_laws import examples, expressible, removals

import unet_surgery
from unet_surgery.checkpoint import disk
from unet_surgery.cli.draw import draw as command
from unet_surgery.errors import (
    MissingExtraError,
    OutputBusyError,
    OutputError,
    SurgeryError,
    UsageError,
    VerificationError,
)
from unet_surgery.graph import Selection, UNetGraph, build, parse_config, remove, resolve
from unet_surgery.lower import SurgeryPlan, make_plan, quantity, skip_sources
from unet_surgery.picture import draw
from unet_surgery.picture import png as png_module
from unet_surgery.picture.compose import lay_out
from unet_surgery.picture.palette import DARK, LIGHT, Palette, Tone
from unet_surgery.picture.png import to_png
from unet_surgery.picture.scene import Rect, Scene
from unet_surgery.recipe import builtin_names, load_recipe, select

SVG = "{http://www.w3.org/2000/svg}"


def planned(
    config: dict[str, Any], selectors: tuple[str, ...] = (), name: str = "", teacher: str = "a/b"
) -> SurgeryPlan:
    parsed = parse_config(config)
    selection = resolve(build(parsed), selectors) if selectors else Selection({})
    recipe = {"name": name} if name else {}
    return make_plan(parsed, selection, recipe=recipe, teacher_id=teacher, allow_skip_change=True)


def of_recipe(name: str, family: str) -> SurgeryPlan:
    recipe, config = load_recipe(name), parse_config(FULL_SIZE[family])
    return make_plan(config, select(recipe, build(config)), recipe=recipe.to_data(), teacher_id="a/b")


CROSS = {"down_block_types": ["CrossAttnDownBlock2D"] * 8, "up_block_types": ["CrossAttnUpBlock2D"] * 8}
LARGEST = {**CONFIGS["sd1"], **CROSS, "block_out_channels": [8, 8, 8, 8, 16, 16, 16, 16], "layers_per_block": 16}
ODD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "largest": (LARGEST, ("down.*.layers.4-9", "up.*.layers.4-9")),
    "one level": ({**CONFIGS["two-levels"], "block_out_channels": [8], "down_block_types": ["DownBlock2D"],
                   "up_block_types": ["UpBlock2D"]}, ()),
    "no layers": ({**CONFIGS["sd1"], "layers_per_block": [0, 0, 1, 0], "block_out_channels": [8] * 4}, ()),
    "deepest attentions": ({**CONFIGS["sd1"], "transformer_layers_per_block": [1, 64, 1, 8]},
                           ("down.1.attentions.0.transformer_blocks.8-", "mid.attentions.0.transformer_blocks.*")),
    "inner level": ({**CONFIGS["sd1"], "block_out_channels": [16] * 4}, ("down.1", "up.2")),
    "mid under a shorter U": (CONFIGS["resnet-mid"], ("down.3", "up.0")),
    "bypassed": (CONFIGS["nested"], ("down.1.attentions.0", "up.1.attentions.1", "mid.attentions.0")),
    "half a mid": (CONFIGS["sd1"], ("mid.attentions.0", "mid.resnets.1")),
    "widest": ({**CONFIGS["two-levels"], "block_out_channels": [16384, 16384], "norm_num_groups": 32}, ("mid",)),
}  # fmt: skip


def _cases() -> Iterator[Any]:
    for name in builtin_names():
        for family in load_recipe(name).families or ():
            yield pytest.param(lambda n=name, f=family: of_recipe(n, f), id=f"{name}-{family}")
    for size, configs in (("small", CONFIGS), ("full", FULL_SIZE)):
        for name, config in configs.items():
            yield pytest.param(lambda c=config: planned(c), id=f"{size}-{name}")
    for name, (config, selectors) in ODD.items():
        yield pytest.param(lambda c=config, s=selectors: planned(c, s, "mine" if s else ""), id=name)


CASES = list(_cases())
every_plan = pytest.mark.parametrize("make", CASES)


def test_the_cases_are_all_there() -> None:
    assert len(CASES) == 12 + len(CONFIGS) + len(FULL_SIZE) + len(ODD)


def graphs(plan: SurgeryPlan) -> tuple[UNetGraph, UNetGraph]:
    teacher = build(parse_config(plan.teacher_config))
    return teacher, remove(teacher, plan.removed)


def modules_of(graph: UNetGraph) -> set[str]:
    """The path of every resnet, attention and sampler."""
    paths = {"conv_in", "conv_out"}
    for stage in graph.stages:
        for layer in stage.layers:
            paths |= {layer.resnet.source} | ({layer.attention.source} if layer.attention else set())
        paths |= {stage.sampler.source} if stage.sampler else set()
    if graph.mid:
        paths |= {resnet.source for resnet in graph.mid.resnets}
        paths |= {graph.mid.attention.source} if graph.mid.attention else set()
    return paths


# --- what is drawn is the plan --------------------------------------------------------------------------------------


@every_plan
def test_every_node_is_drawn_once_and_ghosted_where_it_is_removed(make: Any) -> None:
    """The oracle is the weight map: a module none of whose tensors is copied is gone."""
    plan = make()
    root = ET.fromstring(draw(plan))
    drawn = [(g.get("data-path"), g.get("data-fate"), g) for g in root.iter(f"{SVG}g") if g.get("data-path")]
    copied = [source for source in plan.weights.values() if source is not None]
    bypassed = {b.attention for b in plan.bypassed}
    expected = {
        path: "bypassed" if path in bypassed else "kept" if any(s.startswith(f"{path}.") for s in copied) else "removed"
        for path in modules_of(graphs(plan)[0])
    }
    assert Counter(path for path, _, _ in drawn) == Counter(expected.keys())
    assert {path: fate for path, fate, _ in drawn} == expected
    for path, fate, group in drawn:
        shape = group[1]
        assert group[0].text.startswith(f"{path}: ")
        assert fate in shape.get("class").split()
    if not plan.removed:
        assert "removed" not in set(expected.values())


@every_plan
def test_every_skip_of_teacher_and_student_is_drawn_once(make: Any) -> None:
    plan = make()
    lines = [p for p in ET.fromstring(draw(plan)).iter(f"{SVG}path") if p.get("data-to")]
    skips = [
        (p.get("class").split()[1], p.get("data-from"), p.get("data-to")) for p in lines if "skip" in p.get("class")
    ]
    teacher, student = ({to: source for to, (source, _) in skip_sources(graph).items()} for graph in graphs(plan))
    whole = [(to, source) for kind, source, to in skips if kind != "moved"]
    assert sorted(whole) == sorted(teacher.items())
    left = {to for kind, _, to in skips if kind != "removed"}
    assert left == set(student)
    moved = {to: source for kind, source, to in skips if kind == "moved"}
    layers = {to: (re.sub("attentions", "resnets", a), re.sub("attentions", "resnets", student[to]))
              for to, a in teacher.items() if to in student}  # fmt: skip
    assert moved == {to: student[to] for to, (before, after) in layers.items() if before != after}
    assert set(moved) <= {skip.layer for skip in plan.changed_skips}


def test_the_skips_of_bk_tiny() -> None:
    """As in the paper's figure: the middle up layer goes, and the last one takes its skip from the only down layer."""
    lines = [line for line in lay_out(of_recipe("bk_tiny", "sd1")).lines if line.target]
    moved = {line.source: line.target for line in lines if line.kind == "moved"}
    assert moved == {
        "down_blocks.0.attentions.0": "up_blocks.3.resnets.0",
        "down_blocks.1.attentions.0": "up_blocks.2.resnets.0",
        "down_blocks.2.attentions.0": "up_blocks.1.resnets.0",
    }
    kept = {line.source for line in lines if line.kind == "kept"}
    assert kept == {"conv_in", "down_blocks.0.downsamplers.0", "down_blocks.1.downsamplers.0"}


@every_plan
def test_every_stage_says_its_selector_width_and_parameters(make: Any) -> None:
    plan = make()
    scene = lay_out(plan)
    teacher = graphs(plan)[0]
    stages = {stage.selector: stage.channels for stage in teacher.stages}
    stages |= {"mid": teacher.mid.channels} if teacher.mid else {}
    cards = {card.name: card for card in scene.cards}
    assert len(scene.cards) == len(cards)
    assert cards.keys() == stages.keys()
    parts = {part.name: part for part in plan.parts}
    for name, card in cards.items():
        said = [text.content for text in card.labels]
        part = parts.get(name)
        before, after = (part.teacher.params, part.student.params) if part else (0, 0)
        assert said[:2] == [name, f"{stages[name]} channels"]
        assert said[2] == (quantity(before) if before == after else f"{quantity(before)} → {quantity(after)}")
        assert (card.fate == "removed") == (name.replace(".", "_blocks.") in plan.removed or
                                            (name == "mid" and _mid_is_gone(plan)))  # fmt: skip


def _mid_is_gone(plan: SurgeryPlan) -> bool:
    return not any((source or "").startswith("mid_block.") for source in plan.weights.values())


def test_transformer_blocks_are_counted_and_shown() -> None:
    boxes = {box.path: box for box in lay_out(of_recipe("ssd_1b", "sdxl")).boxes}
    cut = boxes["down_blocks.2.attentions.0"]
    assert [text.content for text in cut.labels] == ["attention", "10 → 4"]
    assert cut.cells == (True,) * 4 + (False,) * 6
    assert boxes["up_blocks.0.attentions.2"].labels[1].content == "×10"
    assert boxes["up_blocks.1.attentions.1"].cells == (True, False)
    assert "transformer blocks)" in cut.tooltip
    assert boxes["mid_block.attentions.0"].cells == ()  # removed whole


def test_the_header_has_the_plans_sizes() -> None:
    texts = " | ".join(text.content for text in lay_out(of_recipe("bk_tiny", "sd1")).texts)
    for said in ("bk_tiny", "of a/b", "859.5 M → 323.4 M", "−62.4%", "338.6 G → 205.0 G", "−39.5%", "2.075 M",
                 "4 levels, native latent 64 × 64", "4 → 320 channels"):  # fmt: skip
        assert said in texts
    alone = lay_out(planned(FULL_SIZE["sd1"]))
    said = [text.content for text in alone.texts]
    assert said[0] == "a/b"
    assert "859.5 M" in said
    assert not [text for text in said if "→" in text and "channels" not in text]
    assert alone.gauges == ()


def test_the_legend_names_what_there_is() -> None:
    def legend(plan: SurgeryPlan) -> list[str]:
        scene = lay_out(plan)
        lowest = max(box.rect.y for box in scene.boxes if not box.path)
        return [text.content for text in scene.texts if text.y >= lowest]

    assert legend(planned(FULL_SIZE["sd1"])) == ["resnet", "attention", "sampler", "skip"]
    tiny = ["resnet", "attention", "sampler", "skip", "skip with a new source", "removed"]
    assert legend(of_recipe("bk_tiny", "sd1")) == tiny
    assert legend(planned(*ODD["bypassed"], "mine")) == [
        "resnet", "attention (×: transformer blocks)", "sampler", "skip", "bypassed"]  # fmt: skip


def test_the_picture_says_in_words_what_it_shows() -> None:
    root = ET.fromstring(draw(of_recipe("koala_700m", "sdxl")))
    assert root.get("role") == "img"
    assert [child.tag for child in root[:2]] == [f"{SVG}title", f"{SVG}desc"]
    assert root[0].text == "koala_700m of a/b: 2.567 G → 782.8 M parameters"
    assert "9 skip connections" in root[1].text
    assert "3 skips stay, 3 come from another layer" in root[1].text
    assert "down.*.layers.1, up.*.layers.1, mid" in root[1].text


def test_a_plan_that_was_edited_is_refused() -> None:
    plan = of_recipe("bk_base", "sd1")
    for edited in (
        replace(plan, removed={**plan.removed, "mid_block": "mid"}),
        replace(plan, teacher=replace(plan.teacher, params=10**400)),
        replace(plan, parts=plan.parts[1:]),
    ):
        with pytest.raises(VerificationError, match="sizes"):
            draw(edited)


# --- where it is drawn ----------------------------------------------------------------------------------------------


def assert_tidy(scene: Scene) -> None:
    """Nothing overlaps, and all lies in the page; texts by their estimated widths."""
    page = Rect(0, 0, scene.width, scene.height)
    for box in scene.boxes:
        assert page.holds(box.rect), box
        for label in box.labels:
            assert box.rect.holds(label.extent), label
        assert_apart([("label", label.extent) for label in box.labels])
    for card in scene.cards:
        assert page.holds(card.rect), card
        assert all(card.rect.holds(label.extent) for label in card.labels), card
        inside = [box for box in scene.boxes if box.rect.overlaps(card.rect)]
        assert all(card.rect.holds(box.rect) for box in inside), card
    texts = [*scene.texts, *(label for card in scene.cards for label in card.labels)]
    assert all(page.holds(text.extent) for text in texts)
    assert_apart([("card", card.rect) for card in scene.cards])
    assert_apart([*((text.content, text.extent) for text in texts), *((box.path, box.rect) for box in scene.boxes),
                  *(("gauge", gauge.rect) for gauge in scene.gauges)])  # fmt: skip
    for line in scene.lines:
        for x, y in line.points:
            assert 0 <= x <= scene.width, line
            assert 0 <= y <= scene.height, line


def assert_apart(rects: list[tuple[str, Rect]]) -> None:
    rects = sorted(rects, key=lambda item: item[1].y)
    for k, (name, rect) in enumerate(rects):
        for other_name, other in rects[k + 1 :]:
            if other.y >= rect.bottom:
                break
            assert not rect.overlaps(other), (name, other_name)


@every_plan
def test_nothing_overlaps_or_leaves_the_page(make: Any) -> None:
    assert_tidy(lay_out(make()))


@given(removals())
@settings(max_examples=examples(60))
def test_nothing_overlaps_after_any_removal(drawn: tuple[str, tuple[str, ...]]) -> None:
    name, selectors = drawn
    plan = expressible(name, selectors, allow=True)
    if plan is not None:
        scene = lay_out(plan)
        assert_tidy(scene)
        assert Counter(box.path for box in scene.boxes if box.path) == Counter(modules_of(graphs(plan)[0]))
        ET.fromstring(draw(plan))


@every_plan
def test_a_teachers_skips_are_level_and_its_stages_go_down_and_up(make: Any) -> None:
    plan = make()
    scene = lay_out(plan)
    for line in scene.lines:
        if line.target and line.kind in ("kept", "removed"):
            assert len({y for _, y in line.points}) == 1, line
            assert line.points[0][0] < line.points[-1][0]
    tops = {card.name: card.rect for card in scene.cards}
    num_levels = sum(name.startswith("down") for name in tops)
    down = [tops[f"down.{i}"].y for i in range(num_levels)]
    up = [tops[f"up.{i}"].y for i in range(num_levels)]
    assert down == sorted(down)
    assert up == sorted(up, reverse=True)
    assert all(tops[f"down.{i}"].right < tops[f"up.{k}"].x for i in range(num_levels) for k in range(num_levels))


@every_plan
def test_the_flow_visits_what_the_student_keeps(make: Any) -> None:
    """From conv_in down, through the mid where it is kept, and up to conv_out, past what is removed."""
    plan = make()
    scene = lay_out(plan)
    visited = {end for line in scene.lines if line.kind == "flow" for end in (line.source, line.target) if end}
    kept = {card.name for card in scene.cards if card.fate == "kept" and card.name != "mid"}
    kept |= {box.path for box in scene.boxes if box.shape in ("down", "up") and box.fate == "kept" and box.path}
    assert visited == kept | {"conv_in", "conv_out"}
    turns = [line for line in scene.lines if line.kind == "flow" and not line.target]
    assert len(turns) == (2 if any(card.name == "mid" and card.fate == "kept" for card in scene.cards) else 1)


# --- who can read it ------------------------------------------------------------------------------------------------


def contrast(a: str, b: str) -> float:
    """WCAG 2's contrast ratio of two colours ``#rrggbb``."""

    def luminance(colour: str) -> float:
        channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(palette: Palette) -> None:
    assert contrast("#000000", "#ffffff") == 21
    grounds = (palette.page, palette.card)
    texts = [(text, ground) for text in (palette.text, palette.muted) for ground in grounds]
    strokes = [
        (stroke, ground) for stroke in (palette.ghost, palette.skip, palette.moved, palette.flow) for ground in grounds
    ]
    tones = [tone for f in fields(palette) if isinstance(tone := getattr(palette, f.name), Tone)]
    assert len(tones) == 4
    for tone in tones:
        texts.append((tone.text, tone.fill))
        strokes += [(tone.stroke, ground) for ground in (*grounds, tone.fill)]
    assert {pair: round(contrast(*pair), 2) for pair in texts if contrast(*pair) < 4.5} == {}
    assert {pair: round(contrast(*pair), 2) for pair in strokes if contrast(*pair) < 3} == {}


def test_both_palettes_are_in_the_stylesheet_and_every_class_has_a_rule() -> None:
    text = (
        draw(planned(*ODD["bypassed"], "mine")) + draw(of_recipe("ssd_1b", "sdxl")) + draw(of_recipe("bk_tiny", "sd1"))
    )
    light, dark = re.search(r"<style>(.*?)@media \(prefers-color-scheme: dark\) {(.*?)\n}\n", text, re.DOTALL).groups()
    assert LIGHT.moved in light
    assert DARK.moved in dark
    rules = set(re.findall(r"\.([a-z-]+)", dark))
    assert rules <= set(re.findall(r"\.([a-z-]+)", light))
    used = {name for names in re.findall('class="([^"]*)"', text) for name in names.split()}
    assert used - rules - set(re.findall(r"\.([a-z-]+)", light)) <= {"kept", "gone", "legend"}
    assert {"moved", "bypassed", "cell", "out", "ghost-text", "filled"} <= used


def test_fates_differ_by_more_than_colour() -> None:
    style = draw(of_recipe("bk_tiny", "sd1"))
    assert re.search(r"\.node\.removed, .*stroke-dasharray: 4 3", style)
    assert re.search(r"\.node\.bypassed { .*stroke-dasharray: 0\.1", style)
    shapes = {box.shape: box for box in lay_out(of_recipe("bk_tiny", "sd1")).boxes if box.path}
    assert set(shapes) == {"conv", "resnet", "attention", "down", "up"}
    assert all(box.labels for box in shapes.values())


@every_plan
def test_letters_are_large_enough(make: Any) -> None:
    scene = lay_out(make())
    labels = [label for part in (*scene.cards, *scene.boxes) for label in part.labels]
    assert scene.width == 920
    assert min(text.size for text in (*scene.texts, *labels)) >= 11


HOSTILE = [
    "<script>alert(1)</script>", "a&b", "'\"><g>", "]]>", "\x00\x1b[31m\x07", "\ud800", "\ufffe", "\u202eevil",
    "x" * 5000, "漢字" * 40, "\U0001f469\u200d\U0001f467" * 20, "&#0;", "<!--", "%PDF",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_text(text: str) -> None:
    plan = replace(of_recipe("bk_tiny", "sd1"), recipe={"name": text, "remove": [text]}, teacher_id=text)
    plan = replace(plan, removed=dict.fromkeys(plan.removed, text))
    plain = ET.fromstring(draw(of_recipe("bk_tiny", "sd1")))
    scene = lay_out(plan)
    assert_tidy(scene)
    svg = draw(plan)
    root = ET.fromstring(svg)
    assert [e.tag for e in root.iter()] == [e.tag for e in plain.iter()]
    assert not re.search(r"[^\x20-\x7e\n]", svg)
    assert not re.search(r"&#(0|[1-8]|1[1-9]|2\d|3[01]|5[5-7]\d{3}|6553[45]|8238);", svg)
    assert len(root[0].text) < 600


def test_a_recipe_without_a_name_or_with_a_strange_one() -> None:
    plan = of_recipe("bk_tiny", "sd1")
    for recipe in ({}, {"name": None}, {"name": 7}, {"name": ["<"]}):
        ET.fromstring(draw(replace(plan, recipe=recipe)))


@every_plan
def test_the_document_stands_alone(make: Any) -> None:
    svg = draw(make())
    assert svg.isascii()
    assert svg.endswith("</svg>\n")
    allowed = {"svg", "title", "desc", "style", "g", "rect", "path", "circle", "text"}
    root = ET.fromstring(svg)
    assert {e.tag.removeprefix(SVG) for e in root.iter()} <= allowed
    assert not re.search(r"href|url\(|@import|<!|<\?|\bon\w+=|\bid=", svg)
    numbers = re.findall(r' (?:x|y|width|height|rx|cx|cy|r|font-size)="([^"]*)"', svg)
    assert all(re.fullmatch(r"-?\d+(\.\d{1,2})?", number) for number in numbers)
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"


def test_the_same_plan_gives_the_same_bytes() -> None:
    code = (
        "import hashlib, unet_surgery as us;"
        "plan = us.SurgeryPlan.from_json(us.plan('ssd_1b', 'sdxl-random').to_json());"
        "print(hashlib.sha256(us.draw(plan).encode()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    assert unet_surgery.draw is draw


# --- PNG ------------------------------------------------------------------------------------------------------------


@cache
def small_svg() -> str:
    return draw(planned(CONFIGS["two-levels"]))


def png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)


def has_fonts() -> bool:
    try:
        return bool(to_png(small_svg(), 8))
    except SurgeryError as error:
        return "no font" not in str(error)


def test_png_by_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    if not has_fonts():
        pytest.skip("no font here")
    monkeypatch.setenv("PATH", "")
    svg = small_svg()
    width, height = (float(n) for n in re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    data = to_png(svg, 700)
    assert png_size(data)[0] == 700
    assert abs(png_size(data)[1] - 700 * height / width) <= 1
    assert len(data) > len(to_png(re.sub("<text.*?</text>", "", svg), 700)) * 1.1  # the texts are there


def test_a_png_without_any_font_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resvg = pytest.importorskip("resvg_py")
    real = resvg.svg_to_bytes
    monkeypatch.setattr(resvg, "svg_to_bytes", lambda **options: real(**options, skip_system_fonts=True))
    with pytest.raises(SurgeryError, match="no font"):
        to_png(small_svg(), 100)


def program(folder: Path, body: str) -> None:
    script = folder / "rsvg-convert"
    script.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_png_by_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_wheel: None) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program(
        tmp_path,
        "data = sys.stdin.read(); sys.stdout.buffer.write(b'\\x89PNG\\r\\n\\x1a\\n' + ' '.join(sys.argv[1:]).encode())",
    )
    assert b"--width=321" in to_png(small_svg(), 321)
    program(tmp_path, "sys.exit('it \\x1b[31m broke')")
    with pytest.raises(SurgeryError, match="could not convert") as caught:
        to_png(small_svg(), 321)
    assert "broke" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    program(tmp_path, "print('no picture')")
    with pytest.raises(SurgeryError, match="no PNG"):
        to_png(small_svg(), 321)
    program(tmp_path, "import time; time.sleep(30)")
    monkeypatch.setattr(png_module, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(SurgeryError, match="timed out"):
        to_png(small_svg(), 321)


def test_png_without_a_converter(monkeypatch: pytest.MonkeyPatch, no_wheel: None) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingExtraError, match="unet-surgery") as caught:
        to_png(small_svg(), 100)
    assert caught.value.hint == "pip install 'unet-surgery[png]', or write .svg"


@pytest.mark.parametrize("width", [0, -1, 8193])
def test_png_widths_have_bounds(width: int) -> None:
    with pytest.raises(UsageError, match="width"):
        to_png("<svg/>", width)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return unet_surgery.prune("bk_tiny", tiny, tmp_path_factory.mktemp("drawn") / "my-student").folder


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_it_writes_and_never_replaces_unasked(tmp_path: Path) -> None:
    words = ("draw", "-r", "bk_tiny", "-t", "sd-v1-random")
    out, err = tool(*words, cwd=tmp_path)
    assert out == "sd-v1-random-bk_tiny.svg\n"
    assert "859.5 M parameters before, 323.4 M after" in err
    file = tmp_path / "sd-v1-random-bk_tiny.svg"
    assert file.read_text() == draw(unet_surgery.plan("bk_tiny", "sd-v1-random"))
    file.write_text("mine")
    _, err = tool(*words, cwd=tmp_path, code=4)
    assert "--force" in err
    assert file.read_text() == "mine"
    assert tool(*words, "--force", "--quiet", cwd=tmp_path) == ("sd-v1-random-bk_tiny.svg\n", "")
    assert file.read_text() != "mine"
    assert listing(tmp_path) == ["sd-v1-random-bk_tiny.svg"]


def test_student_and_recipe_give_the_same_picture(tmp_path: Path, student: Path, tiny: Path) -> None:
    assert tool("draw", str(student), cwd=tmp_path)[0] == "my-student.svg\n"
    assert tool("draw", str(student / "plan.json"), "-o", "b.svg", cwd=tmp_path)[0] == "b.svg\n"
    out, _ = tool("draw", "-r", "bk_tiny", "-t", str(tiny), "-o", "-", cwd=tmp_path)
    assert out == (tmp_path / "my-student.svg").read_text() == (tmp_path / "b.svg").read_text()
    plan = tmp_path / "other.json"
    plan.write_text(tool("plan", "-r", "bk_tiny", "-t", str(tiny), "--json")[0])
    assert tool("draw", "other.json", "-q", cwd=tmp_path) == ("other.svg\n", "")
    assert (tmp_path / "other.svg").read_text() == out


def test_a_teacher_alone(tmp_path: Path) -> None:
    assert tool("draw", "-t", "sdxl-random", cwd=tmp_path)[0] == "sdxl-random.svg\n"
    svg = (tmp_path / "sdxl-random.svg").read_text()
    assert svg == draw(planned(FULL_SIZE["sdxl"], teacher="sdxl-random"))
    assert "removed" not in svg.partition("</style>")[2]
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["sd1"], "block_out_channels": "wide"}))
    _, err = tool("draw", "-t", ".", cwd=tmp_path, code=3)
    assert "config.json" in err
    assert "'block_out_channels'" in err


def test_a_png_has_the_width_that_was_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    if not has_fonts():
        pytest.skip("no font here")
    tool("draw", "-t", "tiny-random", "-o", "a.png", "--width", "500", cwd=tmp_path)
    tool("draw", "-t", "tiny-random", "-o", "b.png", cwd=tmp_path)
    assert png_size((tmp_path / "a.png").read_bytes())[0] == 500
    assert png_size((tmp_path / "b.png").read_bytes())[0] == 1840


HERE = Path()
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing": ({}, 2, "nothing to draw"),
    "student and recipe": ({"student": HERE, "recipe": "bk_tiny"}, 2, "from its own plan"),
    "student and teacher": ({"student": HERE, "teacher": "tiny-random"}, 2, "from its own plan"),
    "student and variant": ({"student": HERE, "variant": "fp16"}, 2, "from its own plan"),
    "no student": ({"student": Path("nowhere")}, 2, "no such student"),
    "no plan": ({"student": HERE}, 6, "no readable plan.json"),
    "no JSON": ({"student": Path(__file__)}, 6, "not JSON"),
    "format": ({"teacher": "tiny-random", "out": "a.pdf"}, 2, ".svg or .png"),
    "no suffix": ({"teacher": "tiny-random", "out": "svg"}, 2, ".svg or .png"),
    "empty out": ({"teacher": "tiny-random", "out": ""}, 2, ".svg or .png"),
    "width of an SVG": ({"teacher": "tiny-random", "out": "a.svg", "width": 100}, 2, "SVG has no width"),
    "width of stdout": ({"teacher": "tiny-random", "out": "-", "width": 100}, 2, "SVG has no width"),
    "width 0": ({"teacher": "tiny-random", "out": "a.png", "width": 0}, 2, "width"),
    "no folder": ({"teacher": "tiny-random", "out": "no/such/a.svg"}, 4, "No such file"),
    "empty teacher": ({"teacher": ""}, 2, "empty"),
    "no teacher": ({"teacher": "tiny-randm"}, 3, "did you mean 'tiny-random'"),
    "family": ({"recipe": "koala_700m", "teacher": "tiny-random"}, 2, "not for this teacher"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, code, says = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SurgeryError) as caught:
        command.__wrapped__(**options)
    assert caught.value.exit_code == code
    assert says in str(caught.value)
    assert capsys.readouterr().out == ""
    assert listing(tmp_path) == []


def test_a_recipe_without_a_teacher_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nremove: [mid]\n")
    with pytest.raises(SurgeryError, match="names no teacher"):
        command.__wrapped__(recipe=str(tmp_path / "mine.yaml"))
    assert listing(tmp_path) == ["mine.yaml"]


def test_force_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.svg").mkdir()
    with pytest.raises(OutputError, match="exists"):
        command.__wrapped__(teacher="tiny-random", out=str(tmp_path / "a.svg"), force=True)
    assert listing(tmp_path) == ["a.svg"]


def test_no_converter_is_one_clear_error(tmp_path: Path) -> None:
    code = f"import sys; sys.modules['resvg_py'] = None\n{main_with('draw', '-t', 'tiny-random', '-o', 'a.png')}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PATH": ""}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "pip install 'unet-surgery[png]'" in result.stderr
    assert listing(tmp_path) == []


def test_drawing_loads_nothing_heavy(tmp_path: Path) -> None:
    modules = loaded(main_with("draw", "-r", "bk_tiny", "-t", "sd-v1-random"), tmp_path)
    assert "unet_surgery" in modules
    assert not modules & {*HEAVY, "numpy", "huggingface_hub", "resvg_py"}


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.svg"
    disk.replace_file(file, b"one")
    with pytest.raises(FileExistsError):
        disk.replace_file(file, b"two")
    assert file.read_bytes() == b"one"
    disk.replace_file(file, b"two", force=True)
    assert file.read_bytes() == b"two"
    (tmp_path / ".a.svg.unet-surgery").write_bytes(b"what a dead run left, longer than the new one")
    disk.replace_file(file, b"three", force=True)
    assert file.read_bytes() == b"three"

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "fsync", full)
    for force in (False, True):
        with pytest.raises(OSError, match="No space"):
            disk.replace_file(file, b"four", force=force)
    assert file.read_bytes() == b"three"
    assert listing(tmp_path) == ["a.svg"]


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    staged = tmp_path / ".a.svg.unet-surgery"
    with staged.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            disk.replace_file(tmp_path / "a.svg", b"mine")
        with pytest.raises(OutputBusyError, match="another process"):
            command.__wrapped__(teacher="tiny-random", out=str(tmp_path / "a.svg"))
    assert listing(tmp_path) == [staged.name]


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".a.svg.unet-surgery").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        disk.replace_file(tmp_path / "a.svg", b"mine", force=True)
    assert victim.read_text() == "precious"


def test_the_readmes_picture_is_what_draw_makes() -> None:
    root = Path(__file__).parents[1]
    assert (root / "docs" / "bk_tiny.svg").read_text() == draw(unet_surgery.plan("bk_tiny", "sd-v1-random"))
