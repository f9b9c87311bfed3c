"""Learning rates are those of the libraries that everyone uses, and the running average is the sum it claims to be."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_scheduler as diffusers_scheduler
from diffusers.training_utils import EMAModel
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler as transformers_scheduler

from unet_surgery.distill.ema import Ema
from unet_surgery.distill.rates import RateConfig, rate

THEIRS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("get_scheduler", [diffusers_scheduler, transformers_scheduler], ids=["diffusers", "hf"])
@pytest.mark.parametrize("schedule", THEIRS)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 20), (1, 20), (7, 20), (19, 20)])
def test_rates_are_the_libraries(get_scheduler: object, schedule: str, warmup: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(THEIRS[schedule], optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    config = RateConfig(schedule, warmup, steps)
    for step in range(steps + 1):
        assert rate(step, config) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_a_rate_falls_to_nothing_and_stays_there() -> None:
    for schedule in ("linear", "cosine"):
        rates = [rate(step, RateConfig(schedule, 2, 10)) for step in range(15)]
        assert rates[:3] == [0.0, 0.5, 1.0]
        assert rates[2:] == sorted(rates[2:], reverse=True)
        assert rates[10:] == [0.0] * 5
    assert [rate(step, RateConfig()) for step in (0, 1, 10**9)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"schedule": "cosin"}, "no schedule is called 'cosin'"),
        ({"warmup_steps": -1}, "negative"),
        ({"schedule": "linear", "warmup_steps": 10, "num_steps": 10}, "takes all of the 10 steps"),
    ],
)
def test_a_schedule_that_is_none_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RateConfig(**fields)


# --- the running average ----------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    decay=st.floats(0, 1),
    every=st.integers(1, 4),
    warm_up=st.booleans(),
    values=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12),
)
def test_the_average_is_the_sum_it_claims(decay: float, every: int, warm_up: bool, values: list[float]) -> None:
    param = torch.tensor([values[0]])
    ema = Ema({"x": param}, decay, every=every, warm_up=warm_up)
    expected = values[0]
    for step, value in enumerate(values[1:], 1):
        param.fill_(value)
        ema.update(step)
        if step % every == 0:
            kept = min(decay, (1 + step) / (10 + step)) ** every if warm_up else decay**every
            expected = kept * expected + (1 - kept) * value
    assert ema.state()["x"].item() == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("warm_up", [False, True])
def test_the_average_is_diffusers(warm_up: bool) -> None:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(5))
    # Theirs counts one step less, and takes the first value over as it is.
    theirs = EMAModel([param], decay=0.9, use_ema_warmup=False)
    ours = Ema({"x": param}, 0.9, warm_up=warm_up)
    theirs.step([param])
    for step in range(1, 200):
        param.data.normal_()
        theirs.step([param])
        ours.update(step)
        if warm_up:
            assert ours.decay_at(step) == pytest.approx(theirs.get_decay(step + 1))
            torch.testing.assert_close(ours.state()["x"], theirs.shadow_params[0])
    assert ours.decay_at(step) == pytest.approx(theirs.get_decay(step + 1)) == 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_average_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 4, generator=generator).to(dtype) for _ in range(12)]

    def go_on(ema: Ema, param: torch.Tensor, steps: range) -> None:
        for step in steps:
            param.copy_(values[step])
            ema.update(step)

    straight = values[0].clone()
    whole = Ema({"x": straight}, 0.99, every=3, warm_up=True)
    go_on(whole, straight, range(1, 12))
    for stop in range(1, 12):
        first = values[0].clone()
        before = Ema({"x": first}, 0.99, every=3, warm_up=True)
        go_on(before, first, range(1, stop))
        second = torch.zeros(3, 4, dtype=dtype)
        after = Ema({"x": second}, 0.99, every=3, warm_up=True)
        after.state()["x"].copy_(before.state()["x"])
        go_on(after, second, range(stop, 12))
        assert torch.equal(after.state()["x"], whole.state()["x"])
        assert after.state()["x"].dtype == torch.float32


def test_the_average_keeps_what_bf16_would_lose() -> None:
    param = torch.ones(4)
    ema = Ema({"x": param}, 0.9999, every=1)
    param.fill_(2.0)
    ema.update(1)
    assert 1.00009 < ema.state()["x"][0].item() < 1.00011


def test_strides_are_kept_and_the_parameters_are_left_alone() -> None:
    param = torch.nn.Parameter(torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last))
    before = param.detach().clone()
    ema = Ema({"x": param}, 0.5)
    ema.update(1)
    shadow = ema.state()["x"]
    assert shadow.is_contiguous(memory_format=torch.channels_last)
    assert not shadow.requires_grad
    assert shadow.data_ptr() != param.data_ptr()
    assert torch.equal(param, before)
    ema.update(2)
    assert ema.state()["x"].data_ptr() == shadow.data_ptr()


@pytest.mark.parametrize(("decay", "every"), [(-0.1, 1), (1.1, 1), (0.9, 0)])
def test_an_average_that_is_none_is_refused(decay: float, every: int) -> None:
    with pytest.raises(ValueError, match="no average"):
        Ema({}, decay, every=every)
