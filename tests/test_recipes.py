"""Recipes: selectors, YAML, extends, and that every refusal says where and what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from configs import CONFIGS, FULL_SIZE

import unet_surgery
from unet_surgery.api import plan_families
from unet_surgery.errors import FamilyError, InexpressibleError, RecipeError, SelectorError
from unet_surgery.graph import build, family_of, parse_config, resolve
from unet_surgery.recipe import Recipe, builtin_names, builtin_text, load_recipe


def nodes(selector: str, name: str = "sd1") -> set[str]:
    return set(resolve(build(parse_config(CONFIGS[name])), [selector]).nodes)


# --- selectors ------------------------------------------------------------------------------------------------------

SELECTORS = {
    "down.2": {"down_blocks.2"},
    "up.-1": {"up_blocks.3"},
    "mid": {"mid_block"},
    "mid.resnets.1": {"mid_block.resnets.1"},
    "mid.attentions.0": {"mid_block.attentions.0"},
    "down.2.layers.1": {"down_blocks.2.resnets.1", "down_blocks.2.attentions.1"},
    "down.3.layers.1": {"down_blocks.3.resnets.1"},
    "down.2.resnets.0": {"down_blocks.2.resnets.0"},
    "down.*.attentions.1": {f"down_blocks.{i}.attentions.1" for i in range(3)},
    "up.1-2.attentions.0": {"up_blocks.1.attentions.0", "up_blocks.2.attentions.0"},
    "up.1.attentions.1-": {"up_blocks.1.attentions.1", "up_blocks.1.attentions.2"},
    "up.1.attentions.-1": {"up_blocks.1.attentions.2"},
    "up.1.attentions.0|2": {"up_blocks.1.attentions.0", "up_blocks.1.attentions.2"},
    "up.1.attentions.-3|2": {"up_blocks.1.attentions.0", "up_blocks.1.attentions.2"},
    "up.1|3.attentions.0": {"up_blocks.1.attentions.0", "up_blocks.3.attentions.0"},
    "up.1.attentions.0.transformer_blocks.0": {"up_blocks.1.attentions.0.transformer_blocks.0"},
}


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_what_selectors_name(selector: str) -> None:
    assert nodes(selector) == SELECTORS[selector]


def test_transformer_block_ranges() -> None:
    graph = build(parse_config(FULL_SIZE["sdxl"]))
    found = set(resolve(graph, ["up.0.attentions.*.transformer_blocks.4-9"]).nodes)
    assert found == {f"up_blocks.0.attentions.{k}.transformer_blocks.{b}" for k in range(3) for b in range(4, 10)}
    assert len(resolve(graph, ["up.0.attentions.0.transformer_blocks.4-"]).nodes) == 6
    assert set(resolve(graph, ["mid.attentions.0.transformer_blocks.-1"]).nodes) == {
        "mid_block.attentions.0.transformer_blocks.9"
    }


def test_a_parent_that_lacks_it_is_skipped_and_listed() -> None:
    selection = resolve(build(parse_config(CONFIGS["sd1"])), ["down.*.attentions.1"])
    assert [(s.parent, s.missing) for s in selection.skipped] == [("down.3", "attentions.1")]
    mixed = resolve(build(parse_config(CONFIGS["mixed-layers"])), ["down.*.layers.1|2"])
    assert {(s.parent, s.missing) for s in mixed.skipped} == {
        ("down.0", "layers.1"), ("down.0", "layers.2"), ("down.1", "layers.2"), ("down.3", "layers.2"),
    }  # fmt: skip


MISSES = [
    ("down.4", "4 down stages (0 to 3)"),
    ("down.0-4", "4 down stages"),
    ("down.0|7", "4 down stages"),
    ("down.-5", "4 down stages"),
    ("down.4-", "4 down stages"),
    ("down.3.attentions.0", "down.3 has no attentions"),
    ("down.3.attentions.*", "down.3 has no attentions"),
    ("down.*.layers.2", "down.0 has 2 layers (0 to 1)"),
    ("down.*.layers.1-2", "2 layers"),
    ("up.0.layers.3", "up.0 has 3 layers (0 to 2)"),
    ("up.1.attentions.0.transformer_blocks.1", "1 of transformer blocks (0)"),
    ("mid.attentions.1", "mid has 1 of attentions (0)"),
]


@pytest.mark.parametrize(("selector", "says"), MISSES, ids=[m[0] for m in MISSES])
def test_misses(selector: str, says: str) -> None:
    with pytest.raises(SelectorError) as caught:
        nodes(selector)
    assert says in str(caught.value)
    assert selector in str(caught.value)


def test_a_teacher_without_a_mid() -> None:
    with pytest.raises(SelectorError, match="no mid") as caught:
        nodes("mid", "no-mid")
    assert "names nothing" in str(caught.value)


FORMS = [
    ("dwon.1", "'dwon'", "down.1"),
    ("down.1.layer.0", "'layer'", "down.1.layers.0"),
    ("down.1.attention.0", "'attention'", "down.1.attentions.0"),
    ("down", "without a number after 'down'", "down.*"),
    ("down.1.layers", "without a number", "down.1.layers.0"),
    ("down.x", "'x' where an index belongs", None),
    ("down.", "'' where an index belongs", None),
    ("", "unknown word ''", None),
    ("down.2-1", "empty range", "1-2"),
    ("down.-0", "'-0' where", None),
    ("down.1--2", "where an index belongs", None),
    ("down.1|", "where an index belongs", None),
    ("down.*|1", "where an index belongs", None),
    ("mid.layers.0", "'layers'", None),
    ("down.1.layers.0.resnets.0", "nothing more can follow", None),
    ("down.1.attentions.0.transformer_blocks.0.attn1", "nothing more", None),
    ("down.99999", "where an index belongs", None),
    ("down_blocks.1", "'down_blocks'", None),
    ("down.\x1b[31m1", "\\u001b", None),
]


@pytest.mark.parametrize(("selector", "says", "hint"), FORMS, ids=[repr(f[0]) for f in FORMS])
def test_bad_forms(selector: str, says: str, hint: str | None) -> None:
    with pytest.raises(SelectorError) as caught:
        nodes(selector)
    assert says in str(caught.value)
    assert "\x1b" not in str(caught.value)
    if hint:
        assert hint in (caught.value.hint or "")


# --- families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"),
    [("sd1", "sd1"), ("sd1-inpaint", "sd1"), ("sd2", "sd2"), ("sd2-depth", "sd2"), ("sdxl", "sdxl"),
     ("upscale", None), ("two-levels", None), ("three-layers", None), ("no-mid", None), ("deep", None)],
)  # fmt: skip
def test_families_come_from_the_graph(name: str, family: str | None) -> None:
    assert family_of(build(parse_config(CONFIGS[name]))) == family


def test_the_wrong_family(unet_folders: dict[str, Path]) -> None:
    with pytest.raises(FamilyError) as caught:
        unet_surgery.plan("koala_700m", unet_folders["sd1"])
    message = str(caught.value)
    for part in ("koala_700m", "sdxl", "sd1 (Stable Diffusion v1", "'bk_small'", "recipes/koala_700m.yaml:"):
        assert part in message


def test_a_pruned_network_is_of_no_family(unet_folders: dict[str, Path], tmp_path: Path) -> None:
    student = unet_surgery.prune("bk_base", unet_folders["sd1"], tmp_path / "student").folder
    with pytest.raises(FamilyError, match="not for this teacher") as caught:
        unet_surgery.plan("bk_tiny", student)
    assert "no known family (4 stages, layers 1, 1, 1, 1" in str(caught.value)
    again = Recipe(name="again", remove=("mid", "down.3", "up.0"))
    plan = unet_surgery.plan(again, student)
    assert plan.student == unet_surgery.plan("bk_tiny", unet_folders["sd1"]).student


def test_a_recipe_without_families_serves_what_it_resolves_on() -> None:
    plans = plan_families(Recipe(name="x", remove=("down.3", "up.0")))
    assert set(plans) == {"sd1", "sd2"}
    with pytest.raises(SelectorError):
        plan_families(Recipe(name="x", remove=("down.9",)))


# --- what stock diffusers cannot express ----------------------------------------------------------------------------

INEXPRESSIBLE = [
    ("sd1", ["up.*.layers.1"], "(rule 1)", 'add "down.0.layers.1"'),
    ("sd1", ["down.1.layers.1"], "(rule 1)", 'add "up.2.layers.1" (a middle layer'),
    ("sd1", ["down.1.layers.1", "up.1.layers.1"], "(rule 1)", 'add "up.2.layers.1"'),
    ("sd1", ["mid.resnets.1"], "keeps its attention", '"mid.attentions.0"'),
    ("sd1", ["mid.resnets.*"], "keeps its attention", '"mid"'),
    ("sd1", ["down.1.resnets.1"], "keeps its attention", '"down.1.layers.1"'),
    ("sd1", ["down.3"], "(rule 8)", 'add "up.0"'),
    ("sd1", ["up.0"], "(rule 8)", 'add "down.3"'),
    ("sd1", ["down.0", "up.3"], "level 0, which never goes (rule 8)", "layers or attentions"),
    ("sd1", ["down.*"], "every stage", "level 0"),
    ("sd1", ["down.2", "up.1"], "down_blocks.3.resnets.0.conv1.weight", "keep"),
    ("sd1", ["down.1.layers.0", "up.2.layers.1"], "(rule 8)", "keep"),
    ("sd1", ["down.1.layers.*", "up.2.layers.0-1"], "(rule 7)", "allow_skip_change"),
    ("sd1", ["up.1.layers.0", "down.2.layers.1"], "the first of its stage, which stays (rule 7)", '"up.1.layers.1"'),
    (
        "sd1",
        ["up.3.layers.2", "down.0.layers.1"],
        "the last of its stage, which stays (rule 7)",
        "allow_skip_change: true",
    ),
    ("sdxl", ["mid.attentions.0"], "(rule 2)", '"mid.resnets.1"'),
    (
        "sdxl",
        ["mid.attentions.0.transformer_blocks.5-9"],
        "(rule 2)",
        "down.2.attentions.0.transformer_blocks.5|6|7|8|9",
    ),
    ("sdxl", ["down.2", "up.0"], "(rule 8)", "keep"),
    ("upscale", ["down.3", "up.0"], "(rule 8)", "keep"),
    ("resnet-mid", ["mid.resnets.*", "down.3"], "(rule 8)", 'add "up.0"'),
]


@pytest.mark.parametrize(
    ("name", "selectors", "says", "hint"), INEXPRESSIBLE, ids=[f"{i[0]}-{'+'.join(i[1])}" for i in INEXPRESSIBLE]
)
def test_what_cannot_be_expressed(
    name: str, selectors: list[str], says: str, hint: str, unet_folders: dict[str, Path]
) -> None:
    recipe = Recipe(name="mine", remove=tuple(selectors))
    with pytest.raises(InexpressibleError) as caught:
        unet_surgery.plan(recipe, unet_folders[name])
    assert says in str(caught.value)
    assert hint in (caught.value.hint or "")
    assert (caught.value.where or "").startswith("recipe mine, remove[")


def test_the_nearest_recipe_is_named(unet_folders: dict[str, Path]) -> None:
    recipe = Recipe(name="mine", remove=("up.*.layers.1",))
    with pytest.raises(InexpressibleError, match="or use 'bk_base', the nearest built-in recipe"):
        unet_surgery.plan(recipe, unet_folders["sd1"])


def test_equal_shapes_do_not_excuse_other_head_counts(tmp_path: Path) -> None:
    """The mid of a 3-level student would get the heads of level 2: every tensor would fit, and mean something else."""
    config = {**CONFIGS["sd1"], "attention_head_dim": [1, 2, 4, 8]}
    parsed = parse_config(config)
    from unet_surgery.lower import make_plan

    with pytest.raises(InexpressibleError) as caught:
        make_plan(parsed, resolve(build(parsed), ["down.3", "up.0"]), recipe={}, teacher_id="x")
    assert "heads 8" in (caught.value.expected or "")
    assert "heads 4" in (caught.value.found or "")
    make_plan(parsed, resolve(build(parsed), ["down.3", "up.0", "mid"]), recipe={}, teacher_id="x")


def test_skip_changes_only_where_shapes_fit(unet_folders: dict[str, Path]) -> None:
    fits = Recipe(name="fits", remove=("up.0.layers.2", "down.3.layers.1"), allow_skip_change=True)
    plan = unet_surgery.plan(fits, unet_folders["sd1"])
    changes = {skip.layer: (skip.teacher_skip, skip.student_skip) for skip in plan.changed_skips}
    assert changes["up_blocks.0.resnets.1"] == ("down_blocks.3.resnets.0", "down_blocks.2.downsamplers.0")
    wider = Recipe(name="wider", remove=("up.2.layers.2", "down.1.layers.1"), allow_skip_change=True)
    with pytest.raises(InexpressibleError, match="rule 8"):
        unet_surgery.plan(wider, unet_folders["sd1"])


# --- files ----------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


WRONG_FILES = [
    ("", "not a mapping", ":1:1"),
    ("- a\n", "not a mapping", ":1:1"),
    ("name: x\n", "needs remove: or extends:", ":1:1"),
    ("remove: [mid]\n", "no 'name'", ":1:1"),
    ("name: x\nremov: [mid]\n", "unknown key 'remov'", ":2:1"),
    ("name: x\nremove: [mid]\nfamilys: [sd1]\n", "did you mean 'families'?", ":3:1"),
    ("name: x\nremove: [mid]\nfamilies: [sd3]\n", "unknown family 'sd3'", ":3:1"),
    ("name: x\nremove: [mid]\nfamilies: []\n", "empty list", ":3:1"),
    ("name: 'a b'\nremove: [mid]\n", "'name' is wrong", ":1:1"),
    ("name: x\nremove:\n  - mid\n  - down.1.layer.0\n", "'layer'", ":4:5"),
    ("name: x\nremove:\n  - 5\n", "quote it: '5'", ":3:5"),
    ("name: x\nremove:\n  - true\n", "quote it", ":3:5"),
    ("name: x\nremove:\n  - 1.5\n", "quote it", ":3:5"),
    ("name: x\nremove:\n  - {a: b}\n", "'remove' is wrong", ":3:5"),
    ("name: x\nremove:\n  - *mid\n", "aliases", ":3:5"),
    ("name: &a x\nremove: [mid]\n", "anchors", ":1:7"),
    ("name: !!str x\nremove: [mid]\n", "tags", ":1:7"),
    ("name: !!python/object/apply:os.system ['true']\n", "tags", ":1:7"),
    ("name: x\nremove: [mid]\nname: y\n", "stands twice", ":3:1"),
    ("name: x\n<<: {remove: [mid]}\n", "merge keys", ":2:1"),
    ("name: x\nremove: [mid]\n---\nname: y\n", "second YAML document", ":3:1"),
    ("name: x\nremove: [mid\n", "not valid YAML", ":3:1"),
    ("name: x\n\tremove: [mid]\n", "not valid YAML", ":2:1"),
    ("name: 2020-01-01\nremove: [mid]\n", "quote it", ":1:7"),
    ("1: x\n", "key that is not text", ":1:1"),
    ("name: x\nremove: " + "[" * 30 + "]" * 30 + "\n", "nested too deeply", ":2:"),
    ("name: x\nsummary: '" + "y" * 600 + "'\nremove: [mid]\n", "'summary' is wrong", ":2:1"),
    ("name: x\nextends: bk_tyny\n", "did you mean 'bk_tiny'?", ":2:1"),
    ("name: x\nextends: ./nowhere.yaml\n", "nowhere.yaml does not exist", ":2:1"),
    ("name: x\nextends: [bk_base, ssd_1b]\n", "no family in common", ":2:1"),
    ("name: x\nremove: [mid]\nallow_skip_change: maybe\n", "'allow_skip_change' is wrong", ":3:1"),
]


@pytest.mark.parametrize(("text", "says", "place"), WRONG_FILES, ids=[repr(w[0])[:50] for w in WRONG_FILES])
def test_wrong_files(tmp_path: Path, text: str, says: str, place: str) -> None:
    path = write(tmp_path, "r.yaml", text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert says in str(caught.value)
    assert f"{path}{place}" in str(caught.value)


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    with pytest.raises(RecipeError, match="anchors"):
        load_recipe(write(tmp_path, "bomb.yaml", "\n".join(lines)))


def test_too_large_and_not_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="too large"):
        load_recipe(write(tmp_path, "r.yaml", "name: x\nremove: [mid]\n# " + "y" * (1 << 20)))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "b.yaml")


def test_extends_by_name_path_and_list(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "name: base\nextends: bk_small\nremove: [down.3, up.0]\n")
    path = write(tmp_path, "top.yaml", "name: top\nextends: [./base.yaml, sdxs_512]\nteacher: me/mine\n")
    recipe = load_recipe(path)
    assert set(recipe.remove) == set(load_recipe("sdxs_512").remove)
    assert recipe.teacher == "me/mine"
    assert recipe.families == ("sd1",)
    assert not recipe.extends
    assert recipe.origin(recipe.remove.index("down.3")) == f"{tmp_path / 'base.yaml'}:3:10"


def test_skip_changes_are_inherited_and_can_be_refused(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "name: base\nremove: [mid]\nallow_skip_change: true\n")
    assert load_recipe(write(tmp_path, "a.yaml", "name: a\nextends: ./base.yaml\n")).allow_skip_change
    strict = "name: b\nextends: ./base.yaml\nallow_skip_change: false\n"
    assert not load_recipe(write(tmp_path, "b.yaml", strict)).allow_skip_change


@pytest.mark.parametrize(
    ("lines", "culprit"),
    [
        (["up.3.attentions.0", "mid", "down.2", "up.1"], 3),
        (["up.3.attentions.0", "mid", "down.1.layers.0", "up.2.layers.1"], 3),
        (["mid", "down.0.attentions.0", "up.1.layers.1"], 3),
        (["down.0.attentions.0", "mid.resnets.1"], 2),
    ],
)
def test_refusals_point_at_the_line_that_caused_them(
    tmp_path: Path, unet_folders: dict[str, Path], lines: list[str], culprit: int
) -> None:
    path = write(tmp_path, "r.yaml", "name: r\nremove:\n" + "".join(f"  - {line}\n" for line in lines))
    with pytest.raises(InexpressibleError) as caught:
        unet_surgery.plan(path, unet_folders["sd1"])
    assert caught.value.where == f"{path}:{culprit + 2}:5"


def test_circles(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "name: a\nextends: ./b.yaml\n")
    write(tmp_path, "b.yaml", "name: b\nextends: ./a.yaml\n")
    with pytest.raises(RecipeError, match="circle") as caught:
        load_recipe(tmp_path / "a.yaml")
    assert "a.yaml → b.yaml → a.yaml" in str(caught.value)


def test_recipes_compose_by_union(tmp_path: Path, unet_folders: dict[str, Path]) -> None:
    path = write(tmp_path, "r.yaml", "name: r\nextends: [bk_base, bk_tiny, bk_small]\nremove: [mid, 'down.-1']\n")
    assert (
        unet_surgery.plan(path, unet_folders["sd1"]).weights
        == unet_surgery.plan("bk_tiny", unet_folders["sd1"]).weights
    )


@pytest.mark.parametrize("name", builtin_names())
def test_builtin_recipes_are_as_documented(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary
    assert recipe.citation
    assert recipe.teacher
    assert "/" in recipe.teacher
    assert recipe.families
    assert builtin_text(name).startswith("#")
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())).to_data() == recipe.to_data()


def test_recipes_in_python() -> None:
    with pytest.raises(SelectorError, match="unknown word 'layer'"):
        Recipe(name="x", remove=("down.1.layer.0",))
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("bk_tiny").name = "other"  # type: ignore[misc]
    with pytest.raises(unet_surgery.SurgeryError, match="must list all it removes"):
        unet_surgery.plan(Recipe(name="x", extends=("bk_tiny",)), "tiny-random")
    with pytest.raises(FamilyError, match="names no teacher"):
        unet_surgery.plan(Recipe(name="x", remove=("mid",)))


def test_values_of_any_type_never_crash(tmp_path: Path) -> None:
    """Every key with every kind of value: a recipe or a RecipeError, nothing else."""
    values: list[Any] = [None, True, 3, 1.5, "x", "mid", [], ["mid"], [[]], {}, {"a": 1}, "\u0000"]
    outcomes = set()
    for key in Recipe.model_fields:
        for value in values:
            data = {"name": "x", "remove": ["mid"], key: value}
            path = write(tmp_path, "r.yaml", yaml.safe_dump(data))
            try:
                load_recipe(path)
                outcomes.add("fine")
            except RecipeError as error:
                assert str(path) in str(error)  # noqa: PT017
                outcomes.add("refused")
    assert outcomes == {"fine", "refused"}
