"""Pictures from prompts: those of diffusers' own pipeline, whatever the batch, and drawing changes nothing else."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st

from unet_surgery.errors import UsageError, VerificationError
from unet_surgery.runtime.load import load_unet
from unet_surgery.runtime.parts import Parts, load_parts
from unet_surgery.sample.draw import SCHEDULERS, decode, generators, make_scheduler, sample, start_noise

PROMPTS = ["a red circle", "", "a small green square at the left" * 9]
SEED, STEPS = 3, 3
SIDE = 16  # pixels; the model's own 32 cost four times as much
V_ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@pytest.fixture(scope="module")
def parts(tiny: Path) -> Parts:
    return load_parts(tiny)


@pytest.fixture(scope="module")
def unet(tiny: Path) -> Any:
    return load_unet(tiny)


@pytest.fixture(scope="module")
def drawn(unet: Any, parts: Parts) -> np.ndarray:
    return sample(unet, parts, PROMPTS, seed=SEED, steps=STEPS, size=SIDE)


def with_config(parts: Parts, **changes: Any) -> Parts:
    return dataclasses.replace(parts, scheduler_config={**parts.scheduler_config, **changes})


def by_pipeline(unet: Any, parts: Parts, scheduler: str | None, **call: Any) -> np.ndarray:
    """Draw with diffusers' pipeline, which is given its noise by the same generators."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler=make_scheduler(parts.scheduler_config, scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    diffusers.utils.logging.set_verbosity(level)
    noise = generators(SEED, range(len(PROMPTS)))
    images = pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        size=SIDE,
        generator=noise,
        output_type="np",
        **{"height": SIDE, "width": SIDE, **call},
    ).images
    return (images * 255).round().astype(np.uint8)


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_pictures_are_the_pipelines(unet: Any, parts: Parts, scheduler: str | None) -> None:
    mine = sample(unet, parts, PROMPTS, seed=SEED, steps=STEPS, size=SIDE, scheduler=scheduler)
    assert mine.shape == (3, SIDE, SIDE, 3)
    assert mine.dtype == np.uint8
    assert min(levels_apart(mine[0], other) for other in mine[1:]) > 30
    assert levels_apart(mine, by_pipeline(unet, parts, scheduler, guidance_scale=2.0)) <= 1


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++", "euler"])
def test_velocity_with_zero_terminal_snr(unet: Any, parts: Parts, scheduler: str, drawn: np.ndarray) -> None:
    parts = with_config(parts, **V_ZERO_SNR)
    mine = sample(unet, parts, PROMPTS, seed=SEED, steps=STEPS, size=SIDE, scheduler=scheduler)
    assert levels_apart(mine, by_pipeline(unet, parts, scheduler, guidance_scale=2.0)) <= 1
    assert levels_apart(mine, drawn) > 30


def test_guidance_and_negative_prompt(unet: Any, parts: Parts, drawn: np.ndarray) -> None:
    for call in ({"guidance": 1.0}, {"guidance": 7.5}, {"guidance": 3.0, "negative": "a blue square"}):
        mine = sample(unet, parts, PROMPTS, seed=SEED, steps=STEPS, size=SIDE, **call)
        theirs: dict[str, Any] = {"guidance_scale": call["guidance"]}
        if "negative" in call:
            theirs["negative_prompt"] = [call["negative"]] * len(PROMPTS)
        assert levels_apart(mine, by_pipeline(unet, parts, None, **theirs)) <= 1
        assert levels_apart(mine, drawn) > 1


def test_size(unet: Any, parts: Parts) -> None:
    mine = sample(unet, parts, PROMPTS, seed=SEED, steps=STEPS, size=(24, 16))
    assert mine.shape == (3, 24, 16, 3)
    assert levels_apart(mine, by_pipeline(unet, parts, None, guidance_scale=2.0, height=24, width=16)) <= 1


@pytest.mark.parametrize("scheduler", ["ddim", "euler-a", "pndm"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_batch_changes_nothing(unet: Any, parts: Parts, scheduler: str, batch: int) -> None:
    together = sample(unet, parts, PROMPTS, seed=SEED, steps=STEPS, size=SIDE, scheduler=scheduler, batch=8)
    apart = sample(unet, parts, PROMPTS, seed=SEED, steps=STEPS, size=SIDE, scheduler=scheduler, batch=batch)
    assert levels_apart(together, apart) <= 1


def test_the_order_and_the_share_of_a_process_change_nothing(unet: Any, parts: Parts, drawn: np.ndarray) -> None:
    """What two processes draw, one of them backwards, is what one draws."""
    for indices in ([0], [2, 1]):
        share = sample(unet, parts, [PROMPTS[k] for k in indices], seed=SEED, steps=STEPS, size=SIDE, indices=indices)
        assert levels_apart(share, drawn[indices]) <= 1
    other_seed = sample(unet, parts, PROMPTS, seed=SEED + 1, steps=STEPS, size=SIDE)
    assert levels_apart(other_seed, drawn) > 30


@given(seed=st.integers(-(2**70), 2**70), indices=st.lists(st.integers(0, 2**32 - 1), max_size=8, unique=True))
def test_no_two_prompts_share_their_noise(seed: int, indices: list[int]) -> None:
    assert len({generator.initial_seed() for generator in generators(seed, indices)}) == len(indices)
    again = [generator.initial_seed() for generator in generators(seed, indices)]
    assert again == [generators(seed, [index])[0].initial_seed() for index in indices]


def test_start_noise_is_normal_and_stays_the_same() -> None:
    noise = start_noise(generators(0, range(64)), (4, 16, 16))
    assert noise.shape == (64, 4, 16, 16)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    between = torch.corrcoef(noise.flatten(1)).fill_diagonal_(0)
    assert between.abs().max() < 0.15  # 1/√1024 is 0.03: five of those
    assert noise[0, 0, 0, :3].tolist() == pytest.approx(GOLDEN, abs=1e-6)


GOLDEN = [-1.7748717, -0.3746656, 0.9244488]


def test_drawing_leaves_training_alone(unet: Any, parts: Parts, drawn: np.ndarray) -> None:
    unet.train()
    unet.mid_block.eval()
    modes = [module.training for module in unet.modules()]
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    try:
        pictures = sample(unet, parts, PROMPTS, seed=SEED, steps=STEPS, size=SIDE, scheduler="ddim")
        sample(unet, parts, PROMPTS, seed=SEED, steps=2, scheduler="euler-a")
        assert [module.training for module in unet.modules()] == modes
    finally:
        unet.eval()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert levels_apart(pictures, drawn) == 0
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in unet.parameters())


def test_modes_come_back_after_an_error(unet: Any, parts: Parts) -> None:
    unet.train()
    broken = dataclasses.replace(parts, tokenizer=None)
    try:
        with pytest.raises(AttributeError):
            sample(unet, broken, PROMPTS, seed=0, steps=1)
        assert unet.training
    finally:
        unet.eval()


def test_the_models_own_scheduler(unet: Any, parts: Parts) -> None:
    assert type(make_scheduler(parts.scheduler_config, None)).__name__ == "DDIMScheduler"
    euler = with_config(parts, _class_name="EulerDiscreteScheduler").scheduler_config
    assert type(make_scheduler(euler, None)).__name__ == "EulerDiscreteScheduler"
    with pytest.raises(UsageError, match="no scheduler of the class"):
        make_scheduler({"_class_name": "UNet2DModel"}, None)
    with pytest.raises(UsageError, match="did you mean euler"):
        make_scheduler(euler, "eulr")


def test_clipping_of_samples_is_corrected() -> None:
    """A config of PNDM says nothing of clip_sample, and DDIM's own default would clip latents to −1 … 1."""
    config = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 0}
    made = make_scheduler(config, "ddim").config
    assert (made.clip_sample, made.steps_offset, made.beta_schedule) == (False, 1, "scaled_linear")


def test_other_dtypes(unet: Any, parts: Parts, drawn: np.ndarray) -> None:
    autocast = sample(unet, parts, PROMPTS, seed=SEED, steps=STEPS, size=SIDE, dtype=torch.bfloat16)
    assert levels_apart(autocast, drawn) > 0
    assert np.abs(autocast.astype(int) - drawn.astype(int)).mean() < 8
    half = type(unet).from_config(unet.config).to(torch.bfloat16)
    half.load_state_dict(unet.state_dict())
    pure = sample(half.eval(), parts, PROMPTS, seed=SEED, steps=STEPS, size=SIDE)
    assert np.abs(pure.astype(int) - drawn.astype(int)).mean() < 8
    with pytest.raises(UsageError, match="only an fp32 U-Net"):
        sample(half, parts, PROMPTS, seed=SEED, steps=STEPS, size=SIDE, dtype=torch.float32)


def test_progress_and_nothing_to_draw(unet: Any, parts: Parts) -> None:
    seen: list[tuple[int, int]] = []
    sample(
        unet,
        parts,
        PROMPTS,
        seed=0,
        steps=1,
        size=SIDE,
        batch=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 3), (3, 3)]
    assert sample(unet, parts, [], seed=0).shape == (0, 32, 32, 3)  # of the model's own size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "one text"}, "a sequence of texts"),
        ({"indices": [1]}, "one index"),
        ({"steps": 0}, "steps must be"),
        ({"batch": 0}, "batch must be"),
        ({"size": 33}, "multiples of 2"),
        ({"size": (0, 32)}, "multiples of 2"),
        ({"scheduler": "DDIM2"}, "no scheduler"),
    ],
)
def test_wrong_arguments(unet: Any, parts: Parts, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sample(unet, parts, **{"prompts": PROMPTS, "seed": 0, **arguments})


def test_a_unet_of_another_family(parts: Parts, unet_folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        sample(load_unet(unet_folders["sd1"]), parts, PROMPTS, seed=0)


def test_what_is_not_finite_is_an_error_that_names_the_prompts(unet: Any, parts: Parts) -> None:
    latents = torch.zeros(3, 4, 4, 4)
    latents[1, 0, 0, 0] = torch.nan
    with pytest.raises(VerificationError, match=r"prompt indices 17\b"):
        decode(parts.vae, latents, batch=1, indices=[9, 17, 25])
    broken = type(unet).from_config(unet.config).eval()
    torch.nn.init.constant_(broken.conv_out.bias, torch.inf)
    with pytest.raises(VerificationError, match="the latents of 2 pictures.*\n.*7, 8"):
        sample(broken, parts, PROMPTS[:2], seed=0, steps=1, indices=[7, 8])
