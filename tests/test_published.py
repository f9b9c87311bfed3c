"""Exact counts and configs of the published networks."""

from __future__ import annotations

from typing import Any

import pytest
from configs import FULL_SIZE

from unet_surgery.graph import UNetGraph, build, parse_config
from unet_surgery.lower import count, make_plan
from unet_surgery.recipe import Recipe, load_recipe, select

TEACHERS = [
    ("sd1", 859_520_964, 686, 338.6, 401.6),
    ("sd2", 865_910_724, 686, 339.1, 402.1),
    ("sd2-768", 865_910_724, 686, 760.5, 1074.6),
    ("sdxl", 2_567_463_684, 1680, 2988.7, 3380.6),
]

# recipe, teacher, parameters, tensors, GMACs conv+linear (None: not published), GMACs all
STUDENTS = [
    ("bk_base", "sd1", 579_384_964, 442, 223.7, 261.5),
    ("bk_small", "sd1", 482_346_884, 396, 217.6, 255.4),
    ("bk_tiny", "sd1", 323_384_964, 358, 205.0, 242.8),
    ("bk_base", "sd2", 583_480_964, 442, 224.0, 261.8),
    ("bk_small", "sd2", 485_787_524, 396, 217.9, 255.7),
    ("bk_tiny", "sd2", 326_825_604, 358, 205.2, 243.0),
    ("bk_base", "sd2-768", 583_480_964, 442, None, 690.8),
    ("bk_small", "sd2-768", 485_787_524, 396, None, 677.3),
    ("bk_tiny", "sd2-768", 326_825_604, 358, None, 648.8),
    ("ofa_small", "sd1", 579_384_964, 442, 223.7, 261.5),
    ("segmind_small", "sd1", 579_384_964, 442, 223.7, 261.5),
    ("segmind_tiny", "sd1", 323_384_964, 358, 205.0, 242.8),
    ("sdxs_512", "sd1", 315_746_244, 280, 179.7, 184.7),
    ("ssd_1b", "sdxl", 1_331_334_404, 944, 1853.8, 2103.9),
    ("koala_700m", "sdxl", 782_822_724, 584, 1176.2, 1350.8),
    ("bk_base", "sdxl", 1_717_277_764, None, None, None),
    ("bk_small", "sdxl", 1_304_160_324, None, None, None),
]


def plan_of(recipe: Recipe, teacher: str) -> Any:
    config = parse_config(FULL_SIZE[teacher])
    return make_plan(config, select(recipe, build(config)), recipe=recipe.to_data(), teacher_id="local")


def giga(macs: int) -> float:
    return round(macs / 1e9, 1)


@pytest.mark.parametrize(("teacher", "params", "tensors", "macs", "macs_all"), TEACHERS, ids=[t[0] for t in TEACHERS])
def test_teacher_counts(teacher: str, params: int, tensors: int, macs: float, macs_all: float) -> None:
    counts = count(build(parse_config(FULL_SIZE[teacher])))
    assert (counts.params, counts.tensors) == (params, tensors)
    assert (giga(counts.macs), giga(counts.macs_all)) == (macs, macs_all)


@pytest.mark.parametrize(
    ("recipe", "teacher", "params", "tensors", "macs", "macs_all"), STUDENTS, ids=[f"{s[0]}-{s[1]}" for s in STUDENTS]
)
def test_student_counts(
    recipe: str, teacher: str, params: int, tensors: int | None, macs: float | None, macs_all: float | None
) -> None:
    counts = plan_of(load_recipe(recipe), teacher).student
    assert counts.params == params
    assert tensors is None or counts.tensors == tensors
    assert macs is None or giga(counts.macs) == macs
    assert macs_all is None or giga(counts.macs_all) == macs_all


# What the authors' config.json says, in the fields that surgery changes, expanded to one value a layer.
PUBLISHED_CONFIGS = [
    ("bk_base", "sd1", [320, 640, 1280, 1280], [1, 1, 1, 1], "cross"),
    ("bk_small", "sd1", [320, 640, 1280, 1280], [1, 1, 1, 1], None),
    ("bk_tiny", "sd1", [320, 640, 1280], [1, 1, 1], None),
    ("bk_tiny", "sd2", [320, 640, 1280], [1, 1, 1], None),
    ("sdxs_512", "sd1", [320, 640, 1280], [1, 1, 1], None),
    ("koala_700m", "sdxl", [320, 640, 1280], [1, 1, 1], None),
    ("ssd_1b", "sdxl", [320, 640, 1280], [2, 2, 2], "resnet"),
]


@pytest.mark.parametrize(
    ("recipe", "teacher", "channels", "layers", "mid"),
    PUBLISHED_CONFIGS,
    ids=[f"{c[0]}-{c[1]}" for c in PUBLISHED_CONFIGS],
)
def test_published_configs(recipe: str, teacher: str, channels: list[int], layers: list[int], mid: str | None) -> None:
    config = plan_of(load_recipe(recipe), teacher).student_config
    parsed = parse_config(config)
    assert [level.channels for level in parsed.levels] == channels
    assert [level.num_layers for level in parsed.levels] == layers
    assert parsed.mid_type == {"cross": "UNetMidBlock2DCrossAttn", "resnet": "UNetMidBlock2D", None: None}[mid]
    assert "mid_block_type" not in config or config["mid_block_type"] == parsed.mid_type


def depths(graph: UNetGraph) -> tuple[list[list[int]], list[list[int]]]:
    def of(stages: Any) -> list[list[int]]:
        return [[layer.attention.depth for layer in stage.layers if layer.attention] for stage in stages]

    return of(graph.down), of(graph.up)


def test_ssd_1b_depths() -> None:
    graph = build(parse_config(plan_of(load_recipe("ssd_1b"), "sdxl").student_config))
    assert depths(graph) == ([[], [2, 2], [4, 4]], [[4, 4, 10], [2, 1, 1], []])


def test_koala_depths_are_written_without_nesting() -> None:
    config = plan_of(load_recipe("koala_700m"), "sdxl").student_config
    assert config["transformer_layers_per_block"] == [1, 2, 5]
    assert config.get("reverse_transformer_layers_per_block") is None


def test_sd2_tiny_shortens_every_list() -> None:
    config = plan_of(load_recipe("bk_tiny"), "sd2").student_config
    assert config["attention_head_dim"] == [5, 10, 20]
    assert config["layers_per_block"] == 1
    assert config["down_block_types"] == ["CrossAttnDownBlock2D"] * 3
    assert config["up_block_types"] == ["CrossAttnUpBlock2D"] * 3


def test_tiny_weight_map_follows_the_authors() -> None:
    weights = plan_of(load_recipe("bk_tiny"), "sd1").weights
    assert weights["up_blocks.0.resnets.0.conv1.weight"] == "up_blocks.1.resnets.0.conv1.weight"
    assert weights["up_blocks.0.resnets.1.conv1.weight"] == "up_blocks.1.resnets.2.conv1.weight"
    assert weights["up_blocks.2.attentions.1.proj_in.weight"] == "up_blocks.3.attentions.2.proj_in.weight"
    assert weights["down_blocks.2.resnets.0.conv1.weight"] == "down_blocks.2.resnets.0.conv1.weight"
    assert not any(name.startswith("down_blocks.2.downsamplers") for name in weights)


def test_tiny_changes_these_skips() -> None:
    changes = [(s.layer, s.teacher_skip, s.student_skip) for s in plan_of(load_recipe("bk_tiny"), "sd1").changed_skips]
    assert changes == [
        (f"up_blocks.{3 - i}.resnets.0", f"down_blocks.{i}.attentions.1", f"down_blocks.{i}.attentions.0")
        for i in (2, 1, 0)
    ]
    assert plan_of(load_recipe("ssd_1b"), "sdxl").changed_skips == ()


def test_branches_of_linear_projections_are_tokens() -> None:
    for teacher, layout in (("sd1", "image"), ("sd2", "tokens")):
        pairs = plan_of(load_recipe("bk_tiny"), teacher).features.bk
        assert [(p.student.layout, p.teacher.layout) for p in pairs] == [("image",) * 2] * 2 + [(layout,) * 2] + [
            ("image",) * 2
        ] * 3


def test_tiny_feature_pairs_follow_the_authors() -> None:
    features = plan_of(load_recipe("bk_tiny"), "sd1").features
    bk = [(p.student.module, p.teacher.module, p.channels, p.stride) for p in features.bk]
    assert bk == [
        ("down_blocks.0", "down_blocks.0", 320, 2),
        ("down_blocks.1", "down_blocks.1", 640, 4),
        ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out", 1280, 4),
        ("up_blocks.0", "up_blocks.1", 1280, 2),
        ("up_blocks.1", "up_blocks.2", 640, 1),
        ("up_blocks.2", "up_blocks.3", 320, 1),
    ]
    third = features.plan[2]
    assert (third.student.module, third.teacher.module, third.teacher.at) == (
        "down_blocks.2",
        "down_blocks.2.downsamplers.0",
        "input",
    )


def test_base_feature_pairs_leave_the_mid_out() -> None:
    features = plan_of(load_recipe("bk_base"), "sd1").features
    assert [p.student.module for p in features.bk] == [f"{s}_blocks.{i}" for s in ("down", "up") for i in range(4)]
    assert "mid_block" in [p.student.module for p in features.plan]
