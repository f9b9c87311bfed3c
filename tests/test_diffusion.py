"""The forward process against diffusers' schedulers; timesteps as functions of numbers; step distillation's algebra."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from unet_surgery.distill.diffusion import NoiseSchedule, PredictionType, draw_timesteps, offset_noise
from unet_surgery.distill.step_objective import (
    draw_guidance,
    guided,
    step_ladder,
    step_loss,
    step_target,
    task_loss,
    with_task,
)
from unet_surgery.errors import ConfigError

SD: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "steps_offset": 1,
}
ZERO_SNR: dict[str, Any] = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
CONFIGS = {
    "sd": SD,
    "sd2-v": {**SD, "prediction_type": "v_prediction"},
    "sample": {**SD, "prediction_type": "sample"},
    "zero-snr-v": ZERO_SNR,
    "zero-snr-sample": {**ZERO_SNR, "prediction_type": "sample"},
    "linear": {**SD, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {**SD, "beta_schedule": "squaredcos_cap_v2"},
    "cosine-zero-snr": {**ZERO_SNR, "beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [0.1, 0.2, 0.3, 0.4]},
    "short": {**SD, "num_train_timesteps": 50},
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_for(schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise and timesteps with both ends of the schedule among them."""
    count = schedule.num_timesteps
    timesteps = torch.tensor([0, 1, count // 3, count // 2, count - 2, count - 1])
    return random(6, 4, 3, 5), random(6, 4, 3, 5, seed=1), timesteps


# Against diffusers


@EVERY
def test_noise_and_targets_are_those_of_diffusers(config: dict[str, Any]) -> None:
    schedule, reference = NoiseSchedule.from_config(config), DDPMScheduler(**_known(config))
    assert torch.equal(schedule.alphas_cumprod_T, reference.alphas_cumprod)
    latents, noise, timesteps = batch_for(schedule)
    expected = reference.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(schedule.add_noise(latents, noise, timesteps), expected, rtol=1e-6, atol=1e-7)
    targets = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": reference.get_velocity(latents, noise, timesteps),
    }
    expected = targets[config.get("prediction_type", "epsilon")]
    torch.testing.assert_close(schedule.target(latents, noise, timesteps), expected, rtol=1e-6, atol=1e-7)


@EVERY
def test_a_right_prediction_gives_the_latents_back(config: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_config(config)
    latents, noise, timesteps = batch_for(schedule)
    noisy = schedule.add_noise(latents, noise, timesteps)
    found = schedule.to_sample(schedule.target(latents, noise, timesteps), noisy, timesteps)
    alpha, _ = schedule.alpha_sigma(timesteps)
    share = 1 / alpha if schedule.prediction_type == "epsilon" else torch.ones_like(alpha)  # rounding is divided too
    assert bool(((found - latents).abs() <= 3e-6 * share).all())


def test_short_latents_keep_their_dtype_and_targets_are_fp32() -> None:
    schedule = NoiseSchedule.from_config(ZERO_SNR)
    latents, noise, timesteps = batch_for(schedule)
    noisy = schedule.add_noise(latents.bfloat16(), noise.bfloat16(), timesteps)
    assert noisy.dtype == torch.bfloat16
    exact = schedule.add_noise(latents.bfloat16().float(), noise.bfloat16().float(), timesteps)
    assert torch.equal(noisy, exact.bfloat16())  # rounded once
    assert schedule.target(latents.bfloat16(), noise.bfloat16(), timesteps).dtype == torch.float32


def test_the_clean_end_is_timestep_minus_one() -> None:
    schedule = NoiseSchedule.from_config(SD)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([-1, 0, 999]))
    assert alpha.flatten()[0] == 1
    assert sigma.flatten()[0] == 0
    torch.testing.assert_close((alpha**2 + sigma**2).flatten(), torch.ones(3))


def test_snr_at_both_ends() -> None:
    assert NoiseSchedule.from_config(ZERO_SNR).snr(torch.tensor([999])).item() == 0
    snr = NoiseSchedule.from_config(SD).snr(torch.tensor([0, 999]))
    torch.testing.assert_close(snr, torch.tensor([0.99915 / 0.00085, 0.0046602 / 0.9953398]), rtol=1e-3, atol=0)


def test_nothing_waits_for_the_device() -> None:
    """Under fake tensors a value that Python asks for is an error: nothing may ask."""
    schedule = NoiseSchedule.from_config(ZERO_SNR)
    latents, noise, _ = batch_for(schedule)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        latents, noise = mode.from_tensor(latents), mode.from_tensor(noise)
        timesteps = draw_timesteps(torch.rand(6, 2), 1000, "half_high")
        noisy = schedule.add_noise(latents, noise, timesteps)
        schedule.to_sample(schedule.target(latents, noise, timesteps), noisy, timesteps)
        ladder = step_ladder(torch.rand(6), 1000, 4, 3)
        target = step_target(lambda z, _t: z, noisy, ladder, schedule)
        with_task(step_loss(noisy, target, schedule.snr(timesteps)), task_loss(noisy, target), 0.2).mean()
        with pytest.raises(DataDependentOutputException):
            timesteps[0].item()


def test_the_tables_go_to_the_device() -> None:
    schedule = NoiseSchedule.from_config(SD).to("meta")
    assert schedule.snr(torch.zeros(2, dtype=torch.long, device="meta")).device.type == "meta"
    assert all(t.device.type == "meta" for t in schedule.alpha_sigma(torch.zeros(1, dtype=torch.long, device="meta")))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"beta_schedule": None}, "beta_schedule"),
        ({"beta_start": None}, "beta_start"),
        ({"beta_start": "0.1"}, "beta_start"),
        ({"beta_end": 2}, "beta_end"),
        ({"beta_end": True}, "beta_end"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps"),
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"trained_betas": ["a"]}, "trained_betas"),
        ({"trained_betas": []}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "prediction_type"),
    ],
    ids=str,
)
def test_a_config_that_is_refused(change: dict[str, Any], where: str) -> None:
    config = {k: v for k, v in {**SD, **change}.items() if v is not None}
    with pytest.raises(ConfigError) as caught:
        NoiseSchedule.from_config(config)
    assert caught.value.where == f"scheduler_config.json: {where}"


# Timesteps and noise


@given(st.lists(st.tuples(st.floats(0, 1, width=32, exclude_max=True), st.floats(0, 1, width=32, exclude_max=True))))
def test_timesteps_are_in_range_and_each_samples_own(uniforms: list[tuple[float, float]]) -> None:
    numbers = torch.tensor([*uniforms, (1 - 2**-24, 0.0)])
    for how in ("uniform", "half_high"):
        timesteps = draw_timesteps(numbers, 1000, how)
        assert timesteps.dtype == torch.long
        assert 0 <= int(timesteps.min()) <= int(timesteps.max()) <= 999
        alone = torch.cat([draw_timesteps(row[None], 1000, how) for row in numbers])
        assert torch.equal(timesteps, alone)


def test_half_of_the_timesteps_are_high() -> None:
    numbers = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0))
    uniform, half = (draw_timesteps(numbers, 1000, how).double() for how in ("uniform", "half_high"))
    # P(t < T·x) is x, and half x + half x⁴
    for x in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert (uniform < 1000 * x).double().mean().item() == pytest.approx(x, abs=0.005)
        assert (half < 1000 * x).double().mean().item() == pytest.approx((x + x**4) / 2, abs=0.005)


def test_offset_noise_moves_whole_channels() -> None:
    noise, normals = random(2, 4, 3, 3), random(2, 4, seed=1)
    moved = offset_noise(noise, normals, 0.1) - noise
    torch.testing.assert_close(moved, (0.1 * normals)[..., None, None].expand_as(noise), rtol=1e-4, atol=1e-6)
    assert torch.equal(offset_noise(noise, normals, 0.0), noise)


# Step distillation


class Net:
    """A fixed nonlinear map in place of a network: what it predicts depends on z and t."""

    def __call__(self, z: Tensor, timesteps: Tensor) -> Tensor:
        return torch.tanh(0.7 * z + 0.3 * (timesteps.float() / 1000 - 0.5).view(-1, 1, 1, 1))


@pytest.mark.parametrize(("steps", "each"), [(1, 1), (1, 8), (4, 1), (4, 5), (8, 4), (16, 3), (1000, 1)])
def test_the_students_timesteps_are_a_subset_of_the_teachers(steps: int, each: int) -> None:
    numbers = torch.arange(steps * 3).float() / (steps * 3)
    ladder = step_ladder(numbers, 1000, steps, each)
    assert ladder.shape == (steps * 3, each + 1)
    assert bool((ladder[:, :-1] > ladder[:, 1:]).all())
    teacher = np.round(np.arange(1000, 0, -1000 / (steps * each)) - 1e-9) - 1  # diffusers' "trailing"; halves go down
    assert set(ladder.flatten().tolist()) - {-1} <= {int(t) for t in teacher} | {int(t) + 1 for t in teacher}
    starts = ladder[:, 0].unique()
    assert len(starts) == steps
    assert starts.max() == 999
    assert set(ladder[:, -1].tolist()) - {-1} <= set(starts.tolist())  # a step ends where another begins
    assert ladder.min() == -1


@pytest.mark.parametrize(("steps", "each"), [(0, 1), (1, 0), (600, 2)])
def test_ladders_that_cannot_be(steps: int, each: int) -> None:
    with pytest.raises(ValueError, match="steps in 1000 timesteps"):
        step_ladder(torch.rand(2), 1000, steps, each)


@pytest.mark.parametrize("kind", get_args(PredictionType))
def test_the_target_is_where_the_ddim_scheduler_of_diffusers_arrives(kind: PredictionType) -> None:
    config = {**SD, "prediction_type": kind, "rescale_betas_zero_snr": kind == "v_prediction"}
    schedule, net = NoiseSchedule.from_config(config), Net()
    reference = DDIMScheduler(**_known(config), clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    reference.set_timesteps(20)  # a divisor: diffusers steps back by a constant
    for start in range(4):
        noisy = random(1, 4, 6, 6, seed=start)
        ladder = step_ladder(torch.tensor([start / 4]), 1000, 4, 5)
        assert ladder[0, :-1].tolist() == reference.timesteps[5 * start : 5 * start + 5].tolist()
        z = noisy
        for t in ladder[0, :-1]:
            z = reference.step(net(z, t.view(1)), t, z).prev_sample
        target = step_target(lambda z, t: schedule.to_sample(net(z, t), z, t), noisy, ladder, schedule)
        # one DDIM step of the student with the target as its x̂
        (alpha, sigma), (alpha_k, sigma_k) = (schedule.alpha_sigma(ladder[:, i]) for i in (0, -1))
        arrived = alpha_k * target + sigma_k * (noisy - alpha * target) / sigma
        torch.testing.assert_close(arrived, z, rtol=1e-4, atol=1e-4)


def test_a_teacher_that_knows_the_sample_gives_it_as_target() -> None:
    schedule = NoiseSchedule.from_config(ZERO_SNR)
    latents, noise = random(5, 4, 3, 3), random(5, 4, 3, 3, seed=1)
    ladder = step_ladder(torch.tensor([0.0, 0.2, 0.5, 0.8, 0.99]), 1000, 8, 4)
    noisy = schedule.add_noise(latents, noise, ladder[:, 0])
    target = step_target(lambda _z, _t: latents, noisy, ladder, schedule)
    torch.testing.assert_close(target, latents, rtol=1e-4, atol=1e-4)
    loss = step_loss(target, latents, schedule.snr(ladder[:, 0]))
    assert loss.max() < 1e-5


def test_the_target_has_no_gradient() -> None:
    schedule, weight = NoiseSchedule.from_config(SD), torch.ones(1, requires_grad=True)
    ladder = step_ladder(torch.tensor([0.3]), 1000, 4, 2)
    assert not step_target(lambda z, _t: weight * z, random(1, 4, 2, 2), ladder, schedule).requires_grad


def test_step_loss_truncates_the_snr() -> None:
    sample, target = random(3, 2, 2, 2), random(3, 2, 2, 2, seed=1)
    each = (sample - target).square().mean((1, 2, 3))
    expected = torch.stack([each[0], each[1], 7 * each[2]])
    torch.testing.assert_close(step_loss(sample, target, torch.tensor([0.0, 0.5, 7.0])), expected)


def test_the_task_term_is_scaled_to_the_step_loss_of_its_sample() -> None:
    step, task = torch.tensor([0.3, 2.0], requires_grad=True), torch.tensor([6.0, 0.0], requires_grad=True)
    total = with_task(step, task, 0.2)
    assert total.tolist() == pytest.approx([0.3 * 1.2, 2.0])
    total.sum().backward()
    assert step.grad.tolist() == [1, 1]
    assert task.grad[0].item() == pytest.approx(0.2 * 0.3 / 6)
    assert bool(torch.isfinite(task.grad).all())


def test_guidance() -> None:
    conditional, unconditional = random(2, 4, 2, 2), random(2, 4, 2, 2, seed=1)
    found = guided(conditional, unconditional, torch.tensor([1.0, 7.5]))
    torch.testing.assert_close(found[0], conditional[0])
    torch.testing.assert_close(found[1], unconditional[1] + 7.5 * (conditional[1] - unconditional[1]))
    assert draw_guidance(torch.tensor([0.0, 0.5]), 2.0, 14.0).tolist() == [2, 8]


def _known(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("_class_name", "clip_sample", "steps_offset")}
