"""Feature pairs: where each kind comes from, that both sides have one shape, and what similarity finds."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import unet_surgery
from unet_surgery.distill.pairs import check_pairs, choose_pairs, tapped
from unet_surgery.distill.similarity import layer_taps, linear_cka, match_layers, monotone_assignment
from unet_surgery.errors import RunError, VerificationError
from unet_surgery.lower.features import FeatureMap, FeaturePair, Tap
from unet_surgery.lower.plan import SurgeryPlan
from unet_surgery.runtime import load_unet

KINDS = ("bk", "plan", "attn1")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    timesteps = torch.tensor([100, 800] * (batch // 2))
    return random(batch, 4, 16, 16, seed=seed), timesteps, random(batch, 5, 32, seed=seed + 100)


@pytest.fixture(scope="module")
def students(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    for name in ("bk_base", "bk_small", "bk_tiny"):
        unet_surgery.prune(name, "tiny-random", root / name)
    return {name: root / name for name in ("bk_base", "bk_small", "bk_tiny")}


def plan_of(folder: Path) -> SurgeryPlan:
    return SurgeryPlan.from_json((folder / "plan.json").read_text())


@pytest.fixture(scope="module")
def nets(students: dict[str, Path], tiny: Path) -> dict[str, UNet2DConditionModel]:
    return {name: load_unet(folder).eval() for name, folder in {**students, "teacher": tiny}.items()}


# The kinds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bk_base", "bk_small", "bk_tiny"])
def test_both_sides_of_every_pair_have_the_plans_shape(
    nets: dict[str, Any], students: dict[str, Path], name: str, kind: Any
) -> None:
    pairs = choose_pairs(kind, plan_of(students[name]))
    student, teacher = tapped(nets[name], nets["teacher"], pairs)
    check_pairs(student, teacher, pairs, inputs())  # on the meta device
    with torch.no_grad():  # and in truth
        ours, theirs = student(*inputs())[1], teacher(*inputs())[1]
    for pair, a, b in zip(pairs, ours, theirs, strict=True):
        side = 16 // pair.stride
        image = (2, pair.channels, side, side)
        assert a.shape == b.shape == (image if pair.student.layout == "image" else (2, side * side, pair.channels))
    student.release()
    teacher.release()


def test_the_maps_are_the_plans(students: dict[str, Path]) -> None:
    plan = plan_of(students["bk_tiny"])
    assert choose_pairs("bk", plan) == plan.features.bk
    assert choose_pairs("plan", plan) == plan.features.plan


def test_attn1_pairs_every_block_with_the_one_its_weights_are_from(students: dict[str, Path]) -> None:
    """By hand: BK Tiny keeps layer 0 of a down stage, layers 0 and 2 of an up stage, and up stages from 1 on."""
    pairs = choose_pairs("attn1", plan_of(students["bk_tiny"]))
    block = "transformer_blocks.0.attn1"
    expected = [
        (f"down_blocks.{i}.attentions.0", f"down_blocks.{i}.attentions.0", (16, 32, 64)[i], 2**i) for i in range(3)
    ]
    expected += [
        (f"up_blocks.{i}.attentions.{j}", f"up_blocks.{i + 1}.attentions.{2 * j}", (64, 32, 16)[i], 2 ** (2 - i))
        for i in range(3)
        for j in range(2)
    ]
    found = [(p.student.module, p.teacher.module, p.channels, p.stride) for p in pairs]
    assert found == [(f"{s}.{block}", f"{t}.{block}", c, stride) for s, t, c, stride in expected]
    assert {p.student.layout for p in pairs} == {"tokens"}


def test_attn1_knows_the_mid(students: dict[str, Path]) -> None:
    (mid,) = (p for p in choose_pairs("attn1", plan_of(students["bk_base"])) if p.student.module.startswith("mid"))
    assert (mid.student, mid.channels, mid.stride) == (mid.teacher, 64, 8)


def test_attn1_leaves_out_blocks_whose_resolution_changed(students: dict[str, Path]) -> None:
    """A student without the deepest stage runs up_blocks.0 at stride 4: a teacher that has it elsewhere is no match."""
    plan = plan_of(students["bk_tiny"])
    widths = plan.teacher_config["block_out_channels"]
    deeper = replace(plan, teacher_config={**plan.teacher_config, "block_out_channels": [*widths, 64]})
    kept = choose_pairs("attn1", deeper)
    assert [p.student.module.split(".")[0] for p in kept] == ["down_blocks"] * 3


# What is refused before the first step


def test_no_pairs(students: dict[str, Path]) -> None:
    plan = replace(plan_of(students["bk_tiny"]), features=FeatureMap((), ()), weights={})
    for kind in KINDS:
        with pytest.raises(RunError, match="no feature pairs") as caught:
            choose_pairs(kind, plan)
        assert caught.value.where == f"pairs: {kind}"


def test_an_unknown_module_is_named_with_its_side(nets: dict[str, Any]) -> None:
    pair = FeaturePair(Tap("down_blocks.0"), Tap("down_blocks.9"), 16, 2)
    with pytest.raises(VerificationError, match="the teacher's") as caught:
        tapped(nets["bk_tiny"], nets["teacher"], [pair])
    assert "down_blocks.9" in str(caught.value)
    assert not nets["bk_tiny"].down_blocks[0]._forward_hooks  # the student is as it was


@pytest.mark.parametrize(
    ("pair", "side", "found"),
    [
        (FeaturePair(Tap("down_blocks.0"), Tap("down_blocks.1"), 16, 2), "teacher: down_blocks.1", "[2, 32, 4, 4]"),
        (FeaturePair(Tap("down_blocks.1"), Tap("down_blocks.1"), 16, 4), "student: down_blocks.1", "[2, 32, 4, 4]"),
        (FeaturePair(Tap("up_blocks.2"), Tap("up_blocks.3"), 16, 2), "student: up_blocks.2", "[2, 16, 16, 16]"),
        (
            FeaturePair(Tap("down_blocks.0"), Tap("down_blocks.1", "input", "image"), 16, 4),
            "student: down_blocks.0",
            "[2, 16, 8, 8]",
        ),
    ],
    ids=["other stage", "channels", "stride", "stride of an input"],
)
def test_a_pair_whose_shapes_differ(nets: dict[str, Any], pair: FeaturePair, side: str, found: str) -> None:
    student, teacher = tapped(nets["bk_tiny"], nets["teacher"], [pair])
    try:
        with pytest.raises(VerificationError, match="does not have the shape") as caught:
            check_pairs(student, teacher, [pair], inputs())
    finally:
        student.release()
        teacher.release()
    assert caught.value.where == side
    assert caught.value.found == found


def test_the_check_computes_nothing_and_leaves_the_networks_as_they_were(nets: dict[str, Any]) -> None:
    pair = FeaturePair(Tap("down_blocks.0"), Tap("down_blocks.0"), 16, 2)
    student, teacher = tapped(nets["bk_tiny"], nets["teacher"], [pair])
    weight = nets["bk_tiny"].conv_in.weight
    check_pairs(student, teacher, [pair], inputs())
    assert nets["bk_tiny"].conv_in.weight is weight
    assert weight.device.type == "cpu"
    huge = (random(2, 4, 16, 16).expand(2, 4, 16, 16), *inputs()[1:])
    check_pairs(student, teacher, [pair], huge)
    student.release()
    teacher.release()


# CKA


def reference_cka(x: Tensor, y: Tensor) -> float:
    """By Gram matrices of rows and the centring matrix, as the paper defines HSIC."""
    x, y = x.double(), y.double()
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return torch.trace(a @ a.T @ centre @ b @ b.T @ centre)

    return (hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()).item()


@given(st.integers(2, 30), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_cka_is_the_papers(rows: int, width: int, other: int, seed: int) -> None:
    x, y = random(rows, width, seed=seed) + 3, random(rows, other, seed=seed + 1)
    value = linear_cka(x, y).item()
    assert value == pytest.approx(reference_cka(x, y), abs=1e-9)
    assert -1e-9 <= value <= 1 + 1e-9


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-50, 50))
def test_cka_is_blind_to_rotation_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    x, y = random(40, 6, seed=seed).double(), random(40, 6, seed=seed + 1).double()
    y += 0.5 * x
    rotation = torch.linalg.qr(random(6, 6, seed=seed + 2).double()).Q
    moved = scale * (x @ rotation) + shift
    assert linear_cka(moved, y).item() == pytest.approx(linear_cka(x, y).item(), abs=1e-9)
    assert linear_cka(x, moved).item() == pytest.approx(1, abs=1e-9)
    assert linear_cka(x, y).item() == pytest.approx(linear_cka(y, x).item(), abs=1e-12)


def test_cka_of_a_constant_is_zero() -> None:
    assert linear_cka(torch.ones(5, 3), random(5, 3)).item() == 0


# The assignment


def brute_force(scores: list[list[float]]) -> float:
    rows, columns = len(scores), len(scores[0])
    best = 0.0
    for count in range(1, min(rows, columns) + 1):
        for s in combinations(range(rows), count):
            for k in combinations(range(columns), count):
                total = sum(scores[a][b] for a, b in zip(s, k, strict=True))
                best = max(best, total)  # a NaN total is never larger
    return best


@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_the_assignment_is_the_best_in_order(rows: int, columns: int, data: Any) -> None:
    score = st.one_of(st.floats(0, 1), st.just(nan), st.just(0.5))
    scores = data.draw(st.lists(st.lists(score, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    pairs = monotone_assignment(torch.tensor(scores, dtype=torch.float64))
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(pairs))
    total = sum(scores[s][k] for s, k in pairs)
    assert total == pytest.approx(brute_force(scores), abs=1e-12)  # a NaN among them would fail here


def test_an_assignment_of_nothing() -> None:
    assert monotone_assignment(torch.full((2, 3), nan)) == ()


# Similarity on networks


def test_layers_of_the_student_find_themselves_in_an_equal_network(nets: dict[str, Any], tiny: Path) -> None:
    found = match_layers(load_unet(tiny).eval(), nets["teacher"], [inputs()])
    assert [(p.student, p.teacher) for p in found.pairs] == [(t, t) for t in found.student]
    assert found.cka_SK.diagonal().tolist() == pytest.approx([1.0] * len(found.student))


@pytest.mark.parametrize("name", ["bk_base", "bk_tiny"])
def test_similarity_pairs_can_be_trained_on(nets: dict[str, Any], name: str) -> None:
    batches = [inputs(seed, batch=4) for seed in range(2)]
    found = match_layers(nets[name], nets["teacher"], iter(batches))
    assert len(found.student) == {"bk_base": 13, "bk_tiny": 9}[name]
    assert found.cka_SK.shape == (len(found.student), len(found.teacher)) == (len(found.student), 21)
    assert len(found.pairs) >= len(found.student) - 2
    student, teacher = tapped(nets[name], nets["teacher"], found.pairs)
    check_pairs(student, teacher, found.pairs, inputs())
    with torch.no_grad():  # the matrix is the CKA of all rows of all batches
        ours, theirs = ([net(*b)[1] for b in batches] for net in (student, teacher))
    for i, pair in enumerate(found.pairs):
        x, y = (torch.cat([f[i].movedim(1, -1).reshape(-1, pair.channels) for f in side]) for side in (ours, theirs))
        s, k = found.student.index(pair.student), found.teacher.index(pair.teacher)
        assert linear_cka(x, y).item() == pytest.approx(found.cka_SK[s, k].item(), abs=1e-9)
    student.release()
    teacher.release()
    assert not any(m._forward_hooks for net in (nets[name], nets["teacher"]) for m in net.modules())


def test_layer_taps_are_in_the_order_of_the_forward(nets: dict[str, Any]) -> None:
    taps = layer_taps(nets["bk_base"])
    ran = []
    handles = [
        nets["bk_base"].get_submodule(tap.module).register_forward_hook(lambda *_, tap=tap: ran.append(tap))
        for tap in taps
    ]
    with torch.no_grad():
        nets["bk_base"](inputs()[0], inputs()[1], encoder_hidden_states=inputs()[2])
    for handle in handles:
        handle.remove()
    assert tuple(ran) == taps


def test_similarity_without_batches_or_equal_shapes(nets: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="none"):
        match_layers(nets["bk_tiny"], nets["teacher"], [])
    wider = UNet2DConditionModel(
        block_out_channels=(24,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    with pytest.raises(RunError, match="no layer"):
        match_layers(wider, nets["teacher"], [inputs()])
    assert not any(m._forward_hooks for m in wider.modules())
