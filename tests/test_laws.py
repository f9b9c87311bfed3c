"""The laws of ARCHITECTURE.md for graph, removal and lowering, over every small config and random removals."""

from __future__ import annotations

import os
import warnings
from itertools import permutations
from typing import Any

import pytest
from configs import CONFIGS, FULL_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_surgery.errors import InexpressibleError, SelectorError
from unet_surgery.graph import Selection, UNetGraph, build, dump, parse_config, remove, resolve, verify
from unet_surgery.lower import count, lower_config, make_plan, modules, shapes_of
from unet_surgery.lower.plan import SurgeryPlan
from unet_surgery.recipe import builtin_names, load_recipe, select

NAMES = sorted(CONFIGS)


def examples(number: int) -> int:
    """Return how many examples to draw: ``number``, and ten times as many in make test-extra."""
    return number * 10 if os.environ.get("HYPOTHESIS_PROFILE") == "extra" else number


def selectors_of(graph: UNetGraph) -> list[str]:
    """Every single node a selector can name, except transformer blocks of depth one."""
    names = ["mid"] if graph.mid else []
    if graph.mid and graph.mid.attention:
        names += ["mid.attentions.0", "mid.resnets.1"]
        names += [f"mid.attentions.0.transformer_blocks.{k}" for k in range(graph.mid.attention.depth)]
    for stage in graph.stages:
        names.append(stage.selector)
        names += [f"{stage.selector}.layers.{j}" for j in range(len(stage.layers))]
        attentions = [layer.attention for layer in stage.layers if layer.attention]
        for k, attention in enumerate(attentions):
            names.append(f"{stage.selector}.attentions.{k}")
            names += [f"{stage.selector}.attentions.{k}.transformer_blocks.{b}" for b in range(attention.depth)]
    return names


@st.composite
def removals(draw: st.DrawFn) -> tuple[str, tuple[str, ...]]:
    """A config and selectors for it, biased to what can be expressed: layers go in pairs, middles on the up side."""
    name = draw(st.sampled_from(NAMES))
    graph = build(parse_config(CONFIGS[name]))
    chosen: list[str] = []
    for down, up in graph.pairs():
        middle = range(1, len(up.layers) - 1)
        num = draw(st.integers(0, min(len(down.layers), len(middle))))
        chosen += [f"{down.selector}.layers.{j}" for j in draw(st.permutations(range(len(down.layers))))[:num]]
        chosen += [f"{up.selector}.layers.{j}" for j in draw(st.permutations(middle))[:num]]
    others = [s for s in selectors_of(graph) if ".layers." not in s and (s.count(".") > 1 or s == "mid")]
    chosen += draw(st.lists(st.sampled_from(others), max_size=4, unique=True)) if others else []
    if draw(st.booleans()):
        chosen += [f"down.{graph.num_levels - 1}", "up.0"]
    if draw(st.integers(0, 9)) == 0:
        chosen += draw(st.lists(st.sampled_from(selectors_of(graph)), max_size=2))
    return name, tuple(draw(st.permutations(chosen)))


def expressible(name: str, selectors: tuple[str, ...], allow: bool = False) -> SurgeryPlan | None:
    config = parse_config(CONFIGS[name])
    try:
        selection = resolve(build(config), selectors)
        return make_plan(
            config,
            selection,
            recipe={"name": "x", "remove": list(selectors)},
            teacher_id="local",
            allow_skip_change=allow,
        )
    except InexpressibleError:
        return None


def meta_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet = UNet2DConditionModel.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


# --- the graph is diffusers' ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_has_diffusers_tensors(name: str) -> None:
    assert shapes_of(build(parse_config(CONFIGS[name]))) == meta_shapes(CONFIGS[name])


@pytest.mark.parametrize("name", sorted(FULL_SIZE))
def test_the_full_size_graph_has_diffusers_tensors(name: str) -> None:
    assert shapes_of(build(parse_config(FULL_SIZE[name]))) == meta_shapes(FULL_SIZE[name])


@pytest.mark.parametrize("name", NAMES)
def test_lowering_the_whole_graph_gives_the_same_graph(name: str) -> None:
    graph = build(parse_config(CONFIGS[name]))
    assert build(parse_config(lower_config(CONFIGS[name], graph))) == graph


# --- law 1: remove is pure, order does not matter, overlaps are fine, a miss is an error ----------------------------


def test_order_never_matters() -> None:
    graph = build(parse_config(CONFIGS["sd1"]))
    selectors = load_recipe("bk_tiny").remove
    graphs = {dump(remove(graph, resolve(graph, order).nodes)) for order in permutations(selectors)}
    assert len(graphs) == 1
    assert graph == build(parse_config(CONFIGS["sd1"]))


@given(removals())
@settings(max_examples=examples(150))
def test_any_order_gives_the_same_graph(case: tuple[str, tuple[str, ...]]) -> None:
    name, selectors = case
    graph = build(parse_config(CONFIGS[name]))

    def outcome(order: tuple[str, ...]) -> str:
        try:
            return dump(remove(graph, resolve(graph, order).nodes))
        except InexpressibleError as error:
            return error.what

    assert outcome(selectors) == outcome(tuple(reversed(selectors))) == outcome(selectors + selectors)


def test_removing_in_two_steps_of_nodes_is_removing_the_union() -> None:
    graph = build(parse_config(CONFIGS["sd1"]))
    both = resolve(graph, ["mid", "down.3", "up.0"]).nodes
    assert remove(remove(graph, resolve(graph, ["mid"]).nodes), resolve(graph, ["down.3", "up.0"]).nodes) == remove(
        graph, both
    )


def test_a_miss_is_an_error() -> None:
    graph = build(parse_config(CONFIGS["sd1"]))
    with pytest.raises(SelectorError, match="down.9"):
        resolve(graph, ["mid", "down.9"])


# --- laws 2, 3, 4 over random legal removals ------------------------------------------------------------------------


@given(removals(), st.booleans())
@settings(max_examples=examples(400))
def test_lowering_is_faithful(case: tuple[str, tuple[str, ...]], allow: bool) -> None:
    name, selectors = case
    plan = expressible(name, selectors, allow)
    if plan is None:
        return
    teacher = build(parse_config(CONFIGS[name]))
    student = remove(teacher, plan.removed)
    rebuilt = build(parse_config(plan.student_config))
    assert rebuilt == student  # law 2
    teacher_shapes, student_shapes = shapes_of(teacher), shapes_of(rebuilt)
    assert student_shapes.keys() == plan.weights.keys()
    for tensor, source in plan.weights.items():  # law 4
        assert source is None or teacher_shapes[source] == student_shapes[tensor]
    used = {source for source in plan.weights.values() if source}
    unused = [tensor for names in plan.unused.values() for tensor in names]
    assert len(unused) == len(set(unused))
    assert used | set(unused) == teacher_shapes.keys()
    assert not used & set(unused)
    assert set(plan.unused) <= set(selectors)
    assert plan.student == count(rebuilt)
    assert SurgeryPlan.from_json(plan.to_json()) == plan


@given(removals())
@settings(max_examples=examples(40))
def test_students_have_diffusers_tensors(case: tuple[str, tuple[str, ...]]) -> None:  # law 3
    plan = expressible(*case)
    if plan is not None:
        assert shapes_of(build(parse_config(plan.student_config))) == meta_shapes(dict(plan.student_config))


def test_random_removals_are_mostly_expressible() -> None:
    """The property tests above prove nothing if their cases are all refused."""
    outcomes: list[bool] = []

    @given(removals())
    @settings(max_examples=100, database=None)
    def collect(case: tuple[str, tuple[str, ...]]) -> None:
        outcomes.append(expressible(*case) is not None)

    collect()
    assert sum(outcomes) > len(outcomes) / 4


# --- every built-in recipe on every family it names -----------------------------------------------------------------

PAIRS = [
    (recipe, name)
    for recipe in builtin_names()
    for name in ("sd1", "sd1-inpaint", "sd2", "sd2-depth", "sdxl")
    if name.split("-")[0] in (load_recipe(recipe).families or ())
]


def test_there_are_recipes_for_every_family() -> None:
    assert len(builtin_names()) == 9
    assert len(PAIRS) == 3 * 4 + 4 * 2 + 2


@pytest.mark.parametrize(("recipe", "name"), PAIRS, ids=[f"{r}-{n}" for r, n in PAIRS])
def test_recipes_make_diffusers_students(recipe: str, name: str) -> None:
    config = parse_config(CONFIGS[name])
    chosen = load_recipe(recipe)
    plan = make_plan(config, select(chosen, build(config)), recipe=chosen.to_data(), teacher_id="local")
    assert shapes_of(build(parse_config(plan.student_config))) == meta_shapes(dict(plan.student_config))
    assert not plan.skipped
    assert not plan.bypassed


# --- bypass: depth 0 costs exactly what is said ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "left"),
    [("down.0.attentions.0", 206_080), ("down.1.attentions.1", 821_760), ("up.1.attentions.2", 3_281_920)],
)
def test_a_bypassed_attention_leaves_this_many_parameters(selector: str, left: int) -> None:
    config = parse_config(FULL_SIZE["sd1"])
    plan = make_plan(config, resolve(build(config), [selector]), recipe={}, teacher_id="local")
    assert [b.params_left for b in plan.bypassed] == [left]
    zeros = [name for name, source in plan.weights.items() if source is None]
    assert len(zeros) == 2
    assert all(".proj_out." in name for name in zeros)


def test_emptying_an_attention_is_not_bypassing_it() -> None:
    config = parse_config(FULL_SIZE["sd1"])
    selectors = ["down.0.attentions.0.transformer_blocks.*"]
    plan = make_plan(config, resolve(build(config), selectors), recipe={}, teacher_id="local")
    assert not plan.bypassed
    assert plan.weights["down_blocks.0.attentions.0.proj_out.weight"] == "down_blocks.0.attentions.0.proj_out.weight"


def test_every_tensor_stands_in_one_module() -> None:
    for config in CONFIGS.values():
        names = [p.path + t.name for p in modules(build(parse_config(config))) for t in p.module.tensors]
        assert len(names) == len(set(names))


def test_verify_accepts_the_teacher_itself() -> None:
    for config in CONFIGS.values():
        graph = build(parse_config(config))
        verify(graph, remove(graph, Selection({}).nodes))
