"""Samplers by class name, pictures to start from, masks, one stream of noise: each against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from unet_surgery.errors import MissingExtraError, UsageError
from unet_surgery.runtime.load import load_unet
from unet_surgery.runtime.parts import Parts, encode_prompts, load_parts
from unet_surgery.sample.draw import Sampling, check_unet, draw_batch, sample
from unet_surgery.sample.schedulers import (
    NOISY,
    OWN_NOISE,
    SAMPLERS,
    SCHEDULERS,
    draws_noise,
    make_scheduler,
    strength_steps,
)
from unet_surgery.sample.start import Source, generators, one_stream

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),  # of diffusers' KDPM2
]

PROMPTS = ["a red circle", "", "a small green square at the left"]
SEED, STEPS, SIDE, GUIDANCE = 3, 4, 16, 3.0
SHAPE = (4, SIDE // 2, SIDE // 2)
SHORT = {kind.class_name for kind in SCHEDULERS.values()}


@pytest.fixture(scope="module")
def parts(tiny: Path) -> Parts:
    return load_parts(tiny)


@pytest.fixture(scope="module")
def unet(tiny: Path) -> Any:
    return load_unet(tiny).eval()


@pytest.fixture(scope="module")
def inpainting(unet: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel.from_config({**unet.config, "in_channels": 9}).eval()


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Smooth, so that a VAE of random weights gives what differs between them."""
    y, x = np.mgrid[0:1:16j, 0:1:16j]
    waves = [np.stack([x, y, (x + k * y) % 1], -1) for k in range(3)]
    return (np.stack(waves) * 255).astype(np.uint8)


def pipeline(kind: Any, unet: Any, parts: Parts, scheduler: str | None) -> Any:
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    made = kind(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler=make_scheduler(parts.scheduler_config, scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    diffusers.utils.logging.set_verbosity(level)
    return made


def call(made: Any, **arguments: Any) -> np.ndarray:
    arguments = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np", **arguments}
    return np.asarray((made(PROMPTS, **arguments).images * 255).round().astype(np.uint8))


def draw(unet: Any, parts: Parts, scheduler: str | None, source: Source | None, noise: Any = None) -> np.ndarray:
    how = Sampling(
        STEPS, GUIDANCE, make_scheduler(parts.scheduler_config, scheduler), SHAPE, encode_prompts(parts, [""])
    )
    with torch.no_grad():
        return draw_batch(
            unet, parts, how, PROMPTS, [0, 1, 2], generators(SEED, range(3)) if noise is None else noise, source
        )


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("scheduler", sorted(set(SAMPLERS) - SHORT))
def test_samplers_by_class_name(unet: Any, parts: Parts, scheduler: str) -> None:
    if scheduler == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    mine = sample(unet, parts, PROMPTS, seed=SEED, steps=STEPS, size=SIDE, scheduler=scheduler, guidance=GUIDANCE)
    made = pipeline(StableDiffusionPipeline, unet, parts, scheduler)
    eta = 0.3 if scheduler == "TCDScheduler" else 0.0  # its own default, which the pipeline overrides with DDIM's
    theirs = call(made, generator=generators(SEED, range(3)), height=SIDE, width=SIDE, eta=eta)
    assert levels_apart(mine, theirs) <= 1
    assert min(levels_apart(mine[0], other) for other in mine[1:]) > 30


def test_which_samplers_there_are(parts: Parts) -> None:
    assert set(SAMPLERS) > SHORT
    assert set(NOISY) < set(SAMPLERS)
    for name in (
        "FlowMatchEulerDiscreteScheduler",
        "DDIMInverseScheduler",
        "EDMEulerScheduler",
        "UNet2DModel",
        "Nothing",
    ):
        with pytest.raises(UsageError, match="no scheduler"):
            make_scheduler(parts.scheduler_config, name)
    for name in OWN_NOISE:
        with pytest.raises(UsageError, match="noise of its own"):
            make_scheduler(parts.scheduler_config, name)
    with pytest.raises(UsageError, match="did you mean HeunDiscreteScheduler"):
        make_scheduler(parts.scheduler_config, "HeunDiscrete")


def test_a_sampler_that_needs_a_library(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("needs scipy")

    monkeypatch.setattr(diffusers.DDIMScheduler, "from_config", refuse)
    with pytest.raises(MissingExtraError, match="needs scipy"):
        make_scheduler(parts.scheduler_config, "ddim")


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_which_samplers_draw_noise(unet: Any, parts: Parts, scheduler: str) -> None:
    """A generator that was not touched between steps is where its start noise left it."""
    try:
        made = make_scheduler(parts.scheduler_config, scheduler)
    except MissingExtraError:
        pytest.skip("needs scipy")
    noise = generators(SEED, range(3))
    after_start = [g.get_state() for g in noise]
    for generator in noise:
        torch.randn(4, generator=generator)
    after_start = [generator.get_state() for generator in noise]
    made.set_timesteps(STEPS)
    latents = torch.zeros(3, 1, 2, 2)
    for timestep in made.timesteps:
        draws = {"generator": noise} if "generator" in made.step.__code__.co_varnames else {}
        latents = made.step(latents + 0.1, timestep, latents, return_dict=False, **draws)[0]
    touched = not all(torch.equal(g.get_state(), state) for g, state in zip(noise, after_start, strict=True))
    assert draws_noise(made) == touched


@pytest.mark.parametrize("scheduler", [None, "pndm", "dpmsolver++", "euler", "heun", "euler-a", "unipc"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(unet: Any, parts: Parts, pictures: np.ndarray, scheduler: str | None, strength: float) -> None:
    mine = draw(unet, parts, scheduler, Source(pictures, strength))
    made = pipeline(StableDiffusionImg2ImgPipeline, unet, parts, scheduler)
    images = [Image.fromarray(picture) for picture in pictures]
    theirs = call(made, image=images, strength=strength, generator=generators(SEED, range(3)))
    assert levels_apart(mine, theirs) <= 1
    assert levels_apart(mine, draw(unet, parts, scheduler, None)) > 30


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "dpmsolver++", "euler", "euler-a"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting(inpainting: Any, parts: Parts, pictures: np.ndarray, scheduler: str, strength: float) -> None:
    masks = np.zeros((3, SIDE, SIDE), bool)
    masks[0, 4:12, 2:9] = masks[1] = masks[2, :, 8:] = True
    mine = draw(inpainting, parts, scheduler, Source(pictures, strength, masks))
    made = pipeline(StableDiffusionInpaintPipeline, inpainting, parts, scheduler)
    theirs = call(
        made,
        image=[Image.fromarray(picture) for picture in pictures],
        mask_image=[Image.fromarray((mask * 255).astype(np.uint8)) for mask in masks],
        strength=strength,
        height=SIDE,
        width=SIDE,
        generator=generators(SEED, range(3)),
    )
    assert levels_apart(mine, theirs) <= 1
    others = draw(inpainting, parts, scheduler, Source(pictures, strength, ~masks))
    assert levels_apart(mine, others) > 5


def test_one_stream_is_the_pipelines(unet: Any, parts: Parts) -> None:
    """A plain loop over batches with one generator, as BK-SDM's script has it."""
    made = pipeline(StableDiffusionPipeline, unet, parts, "pndm")
    theirs_from, mine_from = torch.Generator().manual_seed(1234), torch.Generator().manual_seed(1234)
    for _ in range(3):
        theirs = call(made, generator=theirs_from, height=SIDE, width=SIDE)
        mine = draw(unet, parts, "pndm", None, one_stream(mine_from, 3, SHAPE))
        assert levels_apart(mine, theirs) <= 1
    assert torch.equal(theirs_from.get_state(), mine_from.get_state())


def test_strength_counts_as_diffusers_does() -> None:
    assert [strength_steps(20, s) for s in (0.05, 0.5, 0.799, 1)] == [1, 10, 15, 20]
    for steps, strength, what in ((10, 0.0, "no step"), (3, 0.3, "no step"), (3, 1.5, "share"), (3, -0.1, "share")):
        with pytest.raises(UsageError, match=what):
            strength_steps(steps, strength)


def test_which_unets_draw_from_what(unet: Any, inpainting: Any, parts: Parts) -> None:
    check_unet(unet.config, parts)
    check_unet(inpainting.config, parts, masks=True)
    with pytest.raises(UsageError, match="inpaints.*\n.*\n.*--masks"):
        check_unet(inpainting.config, parts)
    with pytest.raises(UsageError, match="masks are for inpainting"):
        check_unet(unet.config, parts, masks=True)
