"""What a generation draws, block by block: its settings, its noise, and who draws.

Shapes: B pictures, C latent channels, H × W their latents' sides, T tokens, D text width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unet_surgery.data.given import GivenPictures
from unet_surgery.data.prompts import PromptSet
from unet_surgery.errors import UsageError, printable
from unet_surgery.evaluate.drawers import DTYPES, Drawer
from unet_surgery.evaluate.request import GenerateRequest, Protocol
from unet_surgery.runtime.parts import encode_prompts, pixels_per_latent
from unet_surgery.sample.draw import Sampling, check_unet, draw_batch, latent_sides
from unet_surgery.sample.schedulers import check_steps, draws_noise, make_scheduler
from unet_surgery.sample.start import Source, generators, one_stream

__all__ = ["Job", "noise_of_blocks"]


@dataclass(frozen=True, slots=True)
class Job:
    """All that drawing a block needs beside who draws it."""

    request: GenerateRequest
    protocol: Protocol
    prompts: PromptSet
    init: GivenPictures | None
    masks: GivenPictures | None
    device: torch.device
    shape_CHW: tuple[int, int, int]
    drawn_size: tuple[int, int]
    """(width, height) in pixels."""
    scheduler: Any
    """As the model has it; a teacher's may differ in what its own config says."""

    @classmethod
    def of(
        cls,
        request: GenerateRequest,
        protocol: Protocol,
        prompts: PromptSet,
        given: tuple[GivenPictures | None, GivenPictures | None],
        drawer: Drawer,
        device: torch.device,
    ) -> Job:
        vae = drawer.parts.vae
        check_unet(drawer.unet.config, drawer.parts, masks=given[1] is not None)
        height, width = latent_sides(drawer.unet.config, vae, protocol.size)
        factor = pixels_per_latent(vae)
        if given[0] is not None and height != width:
            raise UsageError("pictures to start from become squares", hint="give one --size")
        scheduler = make_scheduler(drawer.parts.scheduler_config, protocol.scheduler)
        check_steps(scheduler, protocol.steps)
        if request.seeding == "stream" and draws_noise(scheduler):
            raise UsageError(
                "one stream of noise is for samplers that draw none between steps",
                found=type(scheduler).__name__,
                hint="choose --seeding keyed, or a scheduler such as pndm, ddim or dpmsolver++",
            )
        shape_CHW = (vae.config.latent_channels, height, width)
        size = (width * factor, height * factor)
        return cls(request, protocol, prompts, *given, device, shape_CHW, size, scheduler)

    def settings(self, drawer: Drawer) -> dict[str, Any]:
        """Return what decides the pictures, as JSON has it: a run with others does not continue this one."""
        request, protocol, keeping = self.request, self.protocol, self.protocol.keeping
        config = sorted(self.scheduler.config.items())
        options = {key: _in_json(value) for key, value in config if not key.startswith("_")}
        width, height = keeping.size or self.drawn_size
        is_stream = request.seeding == "stream"
        settings = {
            **drawer.identity,
            "prompts": {"name": self.prompts.name, "sha256": self.prompts.sha256, "count": len(self.prompts.texts)},
            "preset": protocol.preset,
            "width": width,
            "height": height,
            "drawn_width": self.drawn_size[0],
            "drawn_height": self.drawn_size[1],
            "resize": None if keeping.size is None else keeping.filter,
            "jpeg": keeping.jpeg,
            "scheduler": {"class": type(self.scheduler).__name__, "options": options},
            "steps": protocol.steps,
            "guidance": protocol.guidance,
            "negative": request.negative,
            "seed": protocol.seed,
            "seeding": request.seeding,
            "stream": {"batch": request.batch, "device": self.device.type} if is_stream else None,
            "strength": protocol.strength,
            "init": None if self.init is None else self.init.fingerprint,
            "masks": None if self.masks is None else self.masks.fingerprint,
            "dtype": _dtype_name(next(drawer.unet.parameters()).dtype),
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        return plain

    def far_from_own_size(self, drawer: Drawer) -> str | None:
        """Return in words that pictures are less than half, or more than twice, as large as the U-Net's own."""
        if drawer.unet.config.sample_size is None:
            return None
        factor = pixels_per_latent(drawer.parts.vae)
        own_height, own_width = (factor * side for side in latent_sides(drawer.unet.config, drawer.parts.vae, None))
        width, height = self.drawn_size
        if all(own / 2 <= side <= 2 * own for own, side in ((own_width, width), (own_height, height))):
            return None
        name = printable(drawer.name)
        return f"pictures are drawn at {width}×{height}, and {name} was made for {own_width}×{own_height}"

    def blocks(self) -> list[list[int]]:
        count, batch = len(self.prompts.texts), self.request.batch
        return [list(range(start, min(start + batch, count))) for start in range(0, count, batch)]

    def share(self) -> range:
        """Return the numbers of the prompts that this process draws.

        They are cut by prompts, not by blocks: so every prompt is somebody's, whatever each one's batch is.
        """
        count, (index, parts) = len(self.prompts.texts), self.request.part
        return range(count * index // parts, count * (index + 1) // parts)

    def noise(self, block: Sequence[int]) -> list[torch.Generator]:
        return generators(self.protocol.seed, block)

    def sampling(self, drawer: Drawer) -> Sampling:
        protocol = self.protocol
        uncond_1TD = encode_prompts(drawer.parts, [self.request.negative]) if protocol.guidance > 1 else None
        scheduler = make_scheduler(drawer.parts.scheduler_config, protocol.scheduler)
        return Sampling(protocol.steps, protocol.guidance, scheduler, self.shape_CHW, uncond_1TD)

    def draw(
        self, drawer: Drawer, how: Sampling, block: Sequence[int], noise: Sequence[torch.Generator] | torch.Tensor
    ) -> NDArray[np.uint8]:
        """Draw a block: uint8 [B, height, width, 3]. A compiled U-Net is given whole batches, whatever is wanted."""
        short = self.request.batch - len(block) if self.request.compiled else 0
        padded = [*block, *[block[-1]] * short]
        if short and isinstance(noise, torch.Tensor):
            noise = torch.cat([noise, noise[-1:].expand(short, -1, -1, -1)])
        elif short:
            noise = self.noise(padded)
        texts = [self.prompts.texts[index] for index in padded]
        with torch.inference_mode():  # which small operators spend less in than in no_grad
            drawn = draw_batch(drawer.unet, drawer.parts, how, texts, padded, noise, self._source(padded))
        return drawn[: len(block)]

    def _source(self, block: Sequence[int]) -> Source | None:
        if self.init is None or self.protocol.strength is None:
            return None
        side = self.drawn_size[0]
        masks = None if self.masks is None else self.masks.read_masks(block, side)
        return Source(self.init.read(block, side), self.protocol.strength, masks)


def noise_of_blocks(
    job: Job, drawer: Drawer, blocks: Sequence[Sequence[int]], todo: set[int]
) -> Iterator[tuple[int, list[torch.Generator] | torch.Tensor]]:
    """Yield the numbers of the blocks that are to be drawn, each with its noise; a stream runs through all of them."""
    if job.request.seeding == "keyed":
        yield from ((number, job.noise(blocks[number])) for number in sorted(todo))
        return
    stream = torch.Generator(device=job.device).manual_seed(job.protocol.seed)
    dtype = next(drawer.unet.parameters()).dtype
    for number in range(max(todo, default=-1) + 1):
        noise_BCHW = one_stream(stream, len(blocks[number]), job.shape_CHW, dtype)
        if number in todo:
            yield number, noise_BCHW


def _in_json(value: Any) -> Any:
    """Return a scheduler's option as JSON can have it: −∞, such as dpmsolver++'s least λ, is none of its numbers."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, kind in DTYPES.items() if kind == dtype)
