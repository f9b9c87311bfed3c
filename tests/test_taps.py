"""Taps: what the wrapped forward returns is what the modules compute, however the network is run."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from unet_surgery.errors import VerificationError
from unet_surgery.lower.features import Tap
from unet_surgery.runtime import load_unet
from unet_surgery.runtime.taps import Tapped, trace_taps_under_checkpointing

ENDS = (Tap("down_blocks.0"), Tap("up_blocks.0", "input"), Tap("up_blocks.0"))
STAGES = (Tap("down_blocks.0"), Tap("down_blocks.0.downsamplers.0", "input"), Tap("up_blocks.1"))
RESNET = Tap("down_blocks.0.resnets.0")
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
INSIDE = (Tap("down_blocks.0.attentions.0.proj_out"), Tap(ATTENTION, "output", "tokens"), RESNET)


def small_unet() -> UNet2DConditionModel:
    """Two stages, attention in the upper, no mid: what dynamo traces in a few seconds."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def smallest_unet() -> UNet2DConditionModel:
    """One stage, attention on its down side: every construct that a tap meets, and as little as dynamo can trace."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def inputs(side: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, side, side, generator=noise)
    return latents, torch.tensor([3, 700]), torch.randn(2, 5, width, generator=noise)


def loss_of(network: Any, *args: Tensor) -> Tensor:
    """A loss in which the prediction and every tap have a share."""
    prediction, features = network(*args)
    return prediction.square().mean() + sum(f.square().mean() for f in features)


def gradients(tapped: Tapped, network: Any = None) -> dict[str, Tensor]:
    tapped.zero_grad()
    loss_of(tapped if network is None else network, *inputs()).backward()
    return {name: p.grad.clone() for name, p in tapped.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(g.abs().max() > 0 for g in expected.values())
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def checkpointing_setting() -> Iterator[None]:
    config: Any = torch._dynamo.config
    before = config.skip_fwd_side_effects_in_bwd_under_checkpoint
    yield
    config.skip_fwd_side_effects_in_bwd_under_checkpoint = before


# The values


def test_every_module_of_the_tiny_teacher_gives_what_a_plain_hook_sees(tiny: Path) -> None:
    unet = load_unet(tiny).eval()
    names = [
        name
        for name, m in unet.named_modules()
        if name and not isinstance(m, nn.ModuleList) and (name.count(".") <= 3 or name.endswith("attn1"))
    ]
    args = inputs(16, 32)
    seen: dict[tuple[str, str], Tensor] = {}

    def look(name: str, module: nn.Module) -> list[Any]:
        def before(_m: nn.Module, a: tuple[Any, ...], k: dict[str, Any]) -> None:
            seen[name, "input"] = (*a, *k.values())[0]

        def after(_m: nn.Module, _a: Any, out: Any) -> None:
            seen[name, "output"] = out[0] if isinstance(out, tuple) else out

        return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]

    handles = [h for name in names for h in look(name, unet.get_submodule(name))]
    with torch.no_grad():
        expected = unet(args[0], args[1], encoder_hidden_states=args[2]).sample
    for handle in handles:
        handle.remove()
    taps = [Tap(name, at) for name, at in seen]
    assert len(taps) > 150
    with torch.no_grad():
        prediction, features = Tapped(unet, taps)(*args)
    assert torch.equal(prediction, expected)
    for tap, feature in zip(taps, features, strict=True):
        assert torch.equal(feature, seen[tap.module, tap.at]), tap


def test_the_order_is_that_of_the_taps_and_a_tap_may_come_twice() -> None:
    unet = small_unet()
    forward, backward = Tapped(unet, STAGES), Tapped(unet, (*reversed(STAGES), STAGES[0]))
    with torch.no_grad():
        here, there = forward(*inputs())[1], backward(*inputs())[1]
    assert len(there) == 4
    for a, b in zip(here, (there[2], there[1], there[0]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(there[3], here[0])


def test_names_and_state_of_the_network_stay(tiny: Path) -> None:
    unet = load_unet(tiny)
    before = {name: t.clone() for name, t in unet.state_dict().items()}
    tapped = Tapped(unet, [Tap("down_blocks.0")])
    assert tapped.unet is unet
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert {n.removeprefix("unet.") for n in tapped.state_dict()} == set(before)


def test_nothing_is_kept_between_calls() -> None:
    tapped = Tapped(small_unet(), STAGES + INSIDE)
    with torch.no_grad():
        prediction, features = tapped(*inputs())
    kept = [weakref.ref(t) for t in (prediction, *features)]
    del prediction, features
    gc.collect()
    assert [r() for r in kept] == [None] * 7


def test_nothing_is_kept_after_a_forward_that_fails() -> None:
    tapped = Tapped(small_unet(), STAGES)
    latents, timesteps, embeds = inputs()
    with pytest.raises(RuntimeError):
        tapped(latents, timesteps, embeds[..., :3])
    assert tapped._recording.taken is None
    assert len(tapped(latents, timesteps, embeds)[1]) == 3


def test_the_bare_network_and_a_copy_run_on_their_own() -> None:
    tapped = Tapped(small_unet(), STAGES)
    twin = copy.deepcopy(tapped)
    with torch.no_grad():
        twin.unet.conv_in.weight.mul_(2)
        ours, theirs = tapped(*inputs())[1], twin(*inputs())[1]
        latents, timesteps, embeds = inputs()
        alone = copy.deepcopy(tapped.unet)(latents, timesteps, encoder_hidden_states=embeds).sample
        assert torch.equal(alone, tapped(*inputs())[0])
    assert not torch.equal(ours[0], theirs[0])


def test_released_taps_leave_no_hook() -> None:
    unet = small_unet()
    tapped = Tapped(unet, STAGES + INSIDE)
    tapped.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


# What is refused


@pytest.mark.parametrize(
    ("tap", "message", "hint"),
    [
        (Tap("down_block.0"), "does not have", "down_blocks.0"),
        (Tap("up_blocks.2"), "does not have", "up_blocks.1"),
        (Tap("mid_block"), "does not have", None),
        (Tap(""), "does not have", None),
        (Tap("down_blocks.0.downsampler.0", "input"), "does not have", "down_blocks.0.downsamplers.0"),
        (Tap("down_blocks"), "a list of modules", "down_blocks.0, down_blocks.1"),
    ],
    ids=lambda v: v.module if isinstance(v, Tap) else "",
)
def test_a_tap_that_is_not_there(tap: Tap, message: str, hint: str | None) -> None:
    unet = small_unet()
    with pytest.raises(VerificationError, match=message) as caught:
        Tapped(unet, (STAGES[0], tap))
    assert tap.module in str(caught.value)
    if hint:
        assert hint in str(caught.value.hint)
    assert not any(m._forward_hooks for m in unet.modules())  # nothing was put in place


def test_a_tap_that_does_not_run() -> None:
    unet = small_unet()
    unet.spare = nn.Linear(1, 1)
    with pytest.raises(VerificationError, match="does not run") as caught:
        Tapped(unet, (STAGES[0], Tap("spare")))(*inputs())
    assert caught.value.where == "spare"


# However it is run


@pytest.mark.parametrize("taps", [STAGES, INSIDE], ids=["stages", "inside"])
def test_gradient_checkpointing_gives_the_same_features_and_gradients(taps: tuple[Tap, ...]) -> None:
    tapped = Tapped(small_unet(), taps).train()
    expected = gradients(tapped)
    with torch.no_grad():
        features = tapped(*inputs())[1]
    tapped.unet.enable_gradient_checkpointing()
    close(gradients(tapped), expected)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(tapped(*inputs())[1], features, strict=True))


def test_a_frozen_network_under_no_grad_serves_a_loss() -> None:
    teacher, student = Tapped(small_unet().requires_grad_(False), STAGES), Tapped(small_unet(), STAGES)
    with torch.no_grad():
        _, theirs = teacher(*inputs())
    _, ours = student(*inputs())
    sum((a - 2 * b).square().mean() for a, b in zip(ours, theirs, strict=True)).backward()
    assert student.unet.conv_in.weight.grad.abs().max() > 0


@pytest.mark.extra
@pytest.mark.usefixtures("fresh_dynamo")
def test_dynamo_traces_the_taps_whole() -> None:
    tapped = Tapped(smallest_unet(), ENDS + INSIDE)
    expected = gradients(tapped)
    compiled = torch.compile(tapped, backend="aot_eager", fullgraph=True)
    close(gradients(tapped, compiled), expected)
    with torch.no_grad():
        for a, b in zip(compiled(*inputs())[1], tapped(*inputs())[1], strict=True):
            torch.testing.assert_close(a, b)
    assert tapped._recording.taken is None


@pytest.mark.usefixtures("fresh_dynamo", "checkpointing_setting")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_dynamo_traces_taps_inside_what_checkpointing_runs_again() -> None:
    trace_taps_under_checkpointing()
    tapped = Tapped(smallest_unet(), ENDS + INSIDE).train()
    expected = gradients(tapped)
    tapped.unet.enable_gradient_checkpointing()
    close(gradients(tapped, torch.compile(tapped, backend="aot_eager", fullgraph=True)), expected)


def test_under_distributed_data_parallel(tmp_path: Path) -> None:
    tapped = Tapped(small_unet(), STAGES + INSIDE)
    expected = gradients(tapped)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tapped)
        close(gradients(tapped, wrapped), expected)
        close(gradients(tapped, wrapped), expected)  # a second step: the reducer is ready again
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.extra
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(os.environ.get("CXX") is None and not Path("/usr/bin/g++").exists(), reason="no compiler")
def test_inductor_traces_the_taps_whole() -> None:
    tapped = Tapped(small_unet(), STAGES)
    with torch.no_grad():
        expected = tapped(*inputs())
        found = torch.compile(tapped, fullgraph=True)(*inputs())
    for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
