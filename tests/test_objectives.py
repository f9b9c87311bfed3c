"""Every objective against a second writing of it, as the papers' trainers do it: hooks, ``F.mse_loss``, no autocast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import unet_surgery
from unet_surgery.distill.diffusion import NoiseSchedule
from unet_surgery.distill.objectives import (
    POWER_DECAY,
    TeacherPower,
    feature_kd,
    mean_squares,
    min_snr_weights,
    no_power,
    output_kd,
    task,
    updated_power,
)
from unet_surgery.distill.pairs import choose_pairs, tapped
from unet_surgery.lower.plan import SurgeryPlan

LOSSES = pytest.mark.parametrize("loss", [task, output_kd], ids=["task", "output_kd"])
Loss = Callable[..., Tensor]

# What BK-SDM's trainer hooks for its Tiny: (student, teacher), written down from its code, not from our plan.
BK_TINY = [
    ("down_blocks.0", "down_blocks.0"),
    ("down_blocks.1", "down_blocks.1"),
    ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out"),
    ("up_blocks.0", "up_blocks.1"),
    ("up_blocks.1", "up_blocks.2"),
    ("up_blocks.2", "up_blocks.3"),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def bk_tiny(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("students") / "bk_tiny"
    unet_surgery.prune("bk_tiny", "tiny-random", out)
    return out


def trainer_losses(student: Any, teacher: Any, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> dict[str, Any]:
    """The reference: plain forward hooks on plain diffusers networks, one mse_loss a term."""
    seen: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
    handles = []
    for side, unet, column in (("student", student, 0), ("teacher", teacher, 1)):
        for pair in BK_TINY:

            def keep(_m: Any, _a: Any, out: Any, side: str = side, name: str = pair[column]) -> None:
                seen[side][name] = out[0] if isinstance(out, tuple) else out

            handles.append(unet.get_submodule(pair[column]).register_forward_hook(keep))
    with torch.no_grad():
        theirs = teacher(latents, timesteps, encoder_hidden_states=embeds).sample
    ours = student(latents, timesteps, encoder_hidden_states=embeds).sample
    for handle in handles:
        handle.remove()
    terms = [F.mse_loss(seen["student"][s].float(), seen["teacher"][t].float()) for s, t in BK_TINY]
    return {"output": F.mse_loss(ours.float(), theirs.float()), "terms": terms, "prediction": ours}


def test_bk_tinys_losses_and_gradients_are_those_of_a_trainer_with_hooks(tiny: Path, bk_tiny: Path) -> None:
    nets = [UNet2DConditionModel.from_pretrained(f / "unet").float() for f in (bk_tiny, tiny)]
    student, teacher = nets[0].train(), nets[1].eval().requires_grad_(False)
    latents, noise, embeds = random(2, 4, 16, 16), random(2, 4, 16, 16, seed=1), random(2, 7, 32, seed=2)
    timesteps = torch.tensor([10, 900])
    reference = trainer_losses(student, teacher, latents, timesteps, embeds)
    (F.mse_loss(reference["prediction"], noise) + reference["output"] + sum(reference["terms"])).backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    pairs = choose_pairs("bk", SurgeryPlan.from_json((bk_tiny / "plan.json").read_text()))
    assert [(p.student.module, p.teacher.module) for p in pairs] == BK_TINY
    ours, theirs = tapped(student, teacher, pairs)
    with torch.no_grad():
        target, teacher_features = theirs(latents, timesteps, embeds)
    prediction, features = ours(latents, timesteps, embeds)
    terms = feature_kd(features, teacher_features)
    torch.testing.assert_close(terms, torch.stack(reference["terms"]), rtol=1e-6, atol=0)
    assert output_kd(prediction, target).item() == pytest.approx(reference["output"].item(), rel=1e-6)
    (task(prediction, noise) + output_kd(prediction, target) + terms.sum()).backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-8)


@LOSSES
def test_losses_are_mse_with_a_weight_a_sample(loss: Loss) -> None:
    a, b, weights = random(3, 4, 5, 6), random(3, 4, 5, 6, seed=1), torch.tensor([0.0, 1.0, 2.5])
    torch.testing.assert_close(loss(a, b), F.mse_loss(a, b))
    each = F.mse_loss(a, b, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss(a, b, weights), (each * weights).mean())
    torch.testing.assert_close(loss(a, b, torch.ones(3)), loss(a, b))


@LOSSES
def test_differences_are_squared_in_fp32_in_and_out_of_autocast(loss: Loss) -> None:
    a, b = random(64, 4, 8, 8).bfloat16(), random(64, 4, 8, 8, seed=1).bfloat16()
    exact = (a.double() - b.double()).square().mean().item()
    found = [loss(a, b), loss(a, b, torch.ones(64)), feature_kd([a], [b])[0]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found += [loss(a, b), loss(a, b, torch.ones(64)), feature_kd([a], [b])[0]]
    for value in found:
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact, rel=1e-5)
    assert (a - b).square().mean().item() != pytest.approx(exact, rel=1e-5)  # what a bf16 square would have given


def test_the_teacher_gets_no_gradient() -> None:
    a, b = random(2, 3, 4).requires_grad_(), random(2, 3, 4, seed=1).requires_grad_()
    (output_kd(a, b) + (feature_kd([a], [b]) / mean_squares([b])).sum()).backward()
    assert a.grad is not None
    assert b.grad is None


def test_each_feature_term_is_the_mean_over_all_elements() -> None:
    ours = [random(2, 3, 4, 4), random(2, 7, 5, seed=1)]
    theirs = [random(2, 3, 4, 4, seed=2), random(2, 7, 5, seed=3)]
    expected = torch.stack([F.mse_loss(a, b) for a, b in zip(ours, theirs, strict=True)])
    torch.testing.assert_close(feature_kd(ours, theirs), expected)


def test_divided_by_its_power_a_term_does_not_know_the_features_scale() -> None:
    ours, theirs = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    terms = feature_kd([ours, 100 * ours], [theirs, 100 * theirs]) / mean_squares([theirs, 100 * theirs])
    assert terms[1].item() == pytest.approx(terms[0].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([random(2, 3)], [random(2, 1)], r"\(2, 3\) and \(2, 1\)"),
        ([random(2, 3)], [], "1 features of the student, 0 of the teacher"),
        ([], [], "0 features"),
    ],
    ids=["would broadcast", "one missing", "none"],
)
def test_features_that_do_not_match(ours: list[Tensor], theirs: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feature_kd(ours, theirs)


@LOSSES
def test_predictions_that_would_broadcast_are_refused(loss: Loss) -> None:
    for weights in (None, torch.ones(2)):
        with pytest.raises(ValueError, match="shapes differ"):
            loss(random(2, 4, 8, 8), random(2, 4, 1, 1), weights)


# The running mean square


def test_the_running_mean_square_is_a_weighted_mean_of_all_steps() -> None:
    steps = [torch.tensor([float(i + 1), 10.0 * (i + 1)]) for i in range(5)]
    power = no_power(2)
    for i, values in enumerate(steps):
        power = updated_power(power, values)
        weights = torch.tensor([POWER_DECAY ** (i - j) for j in range(i + 1)])
        expected = (torch.stack(steps[: i + 1]) * weights[:, None]).sum(0) / weights.sum()
        torch.testing.assert_close(power.means(), expected)


def test_the_running_mean_square_goes_on_bit_for_bit_from_stored_tensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    power = no_power(3)
    for i in range(7):
        power = updated_power(power, mean_squares([random(2, 4, seed=3 * i + k) for k in range(3)]))
    save_file(power._asdict(), tmp_path / "power.safetensors")
    again = TeacherPower(**load_file(tmp_path / "power.safetensors"))
    for i in range(7, 12):
        values = mean_squares([random(2, 4, seed=3 * i + k) for k in range(3)])
        power, again = updated_power(power, values), updated_power(again, values)
    assert torch.equal(power.means(), again.means())


def test_mean_squares_are_of_fp32() -> None:
    features = [random(16, 4, 8, 8).bfloat16(), 1000 * random(3, 5, seed=1).half()]
    expected = torch.stack([f.double().square().mean() for f in features]).float()
    torch.testing.assert_close(mean_squares(features), expected, rtol=1e-5, atol=0)


# Min-SNR


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_all_say_the_same_of_the_sample(gamma: float) -> None:
    """An error in x of size δ is α/σ·δ in ε and δ/σ in v: the weighted losses must agree (arXiv 2303.09556)."""
    schedule = NoiseSchedule.from_config(
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    )
    timesteps = torch.arange(0, 1000, 37)
    snr = schedule.snr(timesteps)
    alpha, sigma = (table.flatten() for table in schedule.alpha_sigma(timesteps))
    expected = torch.minimum(snr, torch.tensor(gamma))
    torch.testing.assert_close(min_snr_weights(snr, "sample", gamma), expected)
    torch.testing.assert_close(
        min_snr_weights(snr, "epsilon", gamma) * (alpha / sigma) ** 2, expected, rtol=1e-4, atol=0
    )
    torch.testing.assert_close(min_snr_weights(snr, "v_prediction", gamma) / sigma**2, expected, rtol=1e-4, atol=0)


@given(st.floats(0, 1e6, width=32))
def test_min_snr_weights_are_finite_and_never_above_their_bound(snr: float) -> None:
    values = torch.tensor([snr, 0.0])
    for kind, bound in (("epsilon", 1.0), ("v_prediction", 5.0 / 6 + 1e-6), ("sample", 5.0)):
        weights = min_snr_weights(values, kind, 5.0)
        assert bool(torch.isfinite(weights).all())
        assert 0 <= float(weights.min()) <= float(weights.max()) <= bound
    assert min_snr_weights(values, "epsilon")[1] == 1
    assert min_snr_weights(values, "v_prediction")[1] == 0


# Goldens


def test_golden_losses_of_seeded_networks(tiny: Path, bk_tiny: Path) -> None:
    """The numbers themselves: a change that moves one of them changes what is trained."""
    student, teacher = (UNet2DConditionModel.from_pretrained(f / "unet").double() for f in (bk_tiny, tiny))
    plan = SurgeryPlan.from_json((bk_tiny / "plan.json").read_text())
    schedule = NoiseSchedule.from_config(
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
        }
    )
    # a formula, not a generator: the same numbers on every version and machine
    count = torch.arange(2 * 4 * 16 * 16, dtype=torch.float64)
    latents, noise = (torch.sin(count * k).view(2, 4, 16, 16) for k in (0.7, 1.3))
    embeds = torch.cos(torch.arange(2 * 7 * 32, dtype=torch.float64) * 0.9).view(2, 7, 32)
    timesteps = torch.tensor([250, 999])
    ours, theirs = tapped(student, teacher, choose_pairs("bk", plan))
    with torch.no_grad():
        noisy = schedule.add_noise(latents, noise, timesteps)
        (prediction, features), (target, others) = (net(noisy, timesteps, embeds) for net in (ours, theirs))
    weights = min_snr_weights(schedule.snr(timesteps), "v_prediction")
    found = {
        "task": task(prediction, schedule.target(latents, noise, timesteps)).item(),
        "task min-SNR": task(prediction, schedule.target(latents, noise, timesteps), weights).item(),
        "output_kd": output_kd(prediction, target).item(),
        "feature_kd": feature_kd(features, others).tolist(),
        "teacher_power": (feature_kd(features, others) / mean_squares(others)).tolist(),
    }
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in GOLDEN.items()}, found


GOLDEN: dict[str, Any] = {
    "task": 0.5983583331108093,
    "task min-SNR": 0.1934679001569748,
    "output_kd": 0.133620023727417,
    "feature_kd": [
        0.06803307682275772,
        0.10799232870340347,
        0.24229659140110016,
        0.1629098802804947,
        0.15058459341526031,
        0.2453966736793518,
    ],
    "teacher_power": [
        0.40275123715400696,
        0.786110520362854,
        1.8944560289382935,
        1.7214714288711548,
        1.361664056777954,
        1.07837975025177,
    ],
}
