"""How fast pictures are drawn: ``generate`` beside diffusers' pipeline in a plain loop; and how far a batch moves them.

    python benchmarks/generation.py --size tiny --device cpu
    python benchmarks/generation.py --size sd1 --device cuda --dtype fp16 --channels-last --compile --json rows.jsonl
    python benchmarks/generation.py --drift

Both draw the same prompts by the same networks (random weights) with the same sampler, and write every picture as a
PNG; ours also makes each file safe on the disk, and writes metadata.csv and generation.json. Rounds alternate in one
process; what is printed are medians of rounds, and ratios of medians, also of the process's CPU seconds, which say more
where a machine is shared. --drift draws in fp32 with batches of 1, 2, 4
and 8, and compares pixels with those of batch 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as of_diffusers
from measure import machine
from torch import nn
from training_sizes import make_parts, make_unets, size_named

from unet_surgery.checkpoint.bundled import bundled_folder
from unet_surgery.evaluate import drawing
from unet_surgery.evaluate.drawers import DTYPES, Drawer
from unet_surgery.evaluate.generate import generate
from unet_surgery.runtime.parts import Parts
from unet_surgery.sample.draw import sample
from unet_surgery.sample.schedulers import make_scheduler

SCHEDULER, GUIDANCE, SEED = "pndm", 7.5, 1234
PROMPTS = (
    "a red circle above a blue square",
    "two dogs on a beach",
    "a bowl of fruit",
    "a street at night in the rain",
)

Seconds = tuple[float, float]
"""Of the clock, and of the CPU."""

Draw = Callable[[int], Seconds]
"""Draw all prompts in batches of this size, write them, and return what it took."""


def since(begun: Seconds) -> Seconds:
    """Return what passed since ``begun``; (0, 0) for now."""
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def make_drawer(size: str, recipe: str | None, device: torch.device, dtype: torch.dtype) -> Drawer:
    """Return networks of random weights: the teacher's, or with a recipe the student's."""
    from transformers import CLIPTokenizer

    sizes = size_named(size, recipe or "bk_tiny")
    student, teacher = make_unets(sizes, device)
    unet = (student if recipe else teacher).eval().requires_grad_(False)
    parts = make_parts(sizes, device, dtype=dtype, vae_dtype=dtype)
    words = bundled_folder("toy" if size == "toy" else "tiny-random") / "tokenizer"  # of 24 tokens, or of 77
    tokenizer = CLIPTokenizer.from_pretrained(str(words))
    parts = Parts(tokenizer, parts.text_encoder, parts.vae, {"_class_name": "PNDMScheduler", **sizes.noise}, Path())
    return Drawer(
        size, nn.Module.to(unet, dtype=dtype), parts, {"model": {"name": size, "sha256": "", "parameters": 0}}
    )


def ours(drawer: Drawer, prompts: Path, steps: int, **options: Any) -> Draw:
    """Return ``generate`` itself, given networks in place of folders."""

    def draw(batch: int) -> Seconds:
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(drawing, "load_drawer", return_value=drawer),
        ):
            begun = since((0, 0))
            generate(
                "tiny-random",
                prompts,
                Path(folder) / "out",
                batch=batch,
                steps=steps,
                guidance=GUIDANCE,
                scheduler=SCHEDULER,
                seed=SEED,
                device=str(drawer.parts.vae.device),
                dtype=next(name for name, kind in DTYPES.items() if kind == drawer.parts.vae.dtype),
                **options,
            )
            return since(begun)

    return draw


def plain(drawer: Drawer, prompts: Sequence[str], steps: int) -> Draw:
    """Return the loop that evaluation scripts have: the pipeline, a batch after the other, and each picture saved."""
    parts = drawer.parts
    pipeline: Any = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=drawer.unet,
        scheduler=make_scheduler(parts.scheduler_config, SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def draw(batch: int) -> Seconds:
        with tempfile.TemporaryDirectory() as folder:
            begun = since((0, 0))
            generator = torch.Generator(device=parts.vae.device).manual_seed(SEED)
            for start in range(0, len(prompts), batch):
                some = list(prompts[start : start + batch])
                images = pipeline(some, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator).images
                for index, image in enumerate(images, start):
                    image.save(Path(folder) / f"{index:05d}.png")
            return since(begun)

    return draw


def compare(arguments: argparse.Namespace) -> None:
    """Print pictures a second of all rows, and each row's ratio to the plain loop at the same batch."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    drawer = make_drawer(arguments.size, arguments.recipe, device, dtype)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(arguments.pictures)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.json"
        path.write_text(json.dumps(prompts))
        rows: dict[str, Draw] = {
            "plain loop": plain(drawer, prompts, arguments.steps),
            "generate": ours(drawer, path, arguments.steps),
        }
        if arguments.channels_last:
            rows["generate, channels last"] = ours(_changed(drawer, last=True), path, arguments.steps)
        if arguments.compile:
            compiled = _changed(drawer, last=arguments.channels_last, compiled=True)
            rows["generate, compiled"] = ours(compiled, path, arguments.steps, compiled=True)
        for batch in arguments.batches:
            _measure(rows, batch, arguments)
            torch._dynamo.reset()  # so that the next size is compiled for itself, as in a process of its own


def _changed(drawer: Drawer, *, last: bool, compiled: bool = False) -> Drawer:
    unet = copy.deepcopy(drawer.unet)
    if last:
        unet = unet.to(memory_format=torch.channels_last)
    if compiled:
        unet.compile()
    return Drawer(drawer.name, unet, drawer.parts, drawer.identity)


def _measure(rows: dict[str, Draw], batch: int, arguments: argparse.Namespace) -> None:
    rounds: dict[str, list[Seconds]] = {name: [] for name in rows}
    for draw in rows.values():  # kernels are chosen, and compiled, once
        draw(batch)
    for _ in range(arguments.rounds):
        for name, draw in rows.items():
            rounds[name].append(draw(batch))
    reference = [statistics.median(values) for values in zip(*rounds["plain loop"], strict=True)]
    for name, times in rounds.items():
        clock, cpu = zip(*times, strict=True)
        median = statistics.median(clock)
        rate, low, high = (arguments.pictures / value for value in (median, max(clock), min(clock)))
        ratios = reference[0] / median, reference[1] / statistics.median(cpu)
        print(
            f"batch {batch}  {name:<26}{rate:9.3f} pictures/s ({low:.3f}–{high:.3f})  {ratios[0]:5.2f} x"
            f"   by CPU seconds {ratios[1]:5.2f} x",
            flush=True,
        )
        if arguments.json is not None:
            row = {"batch": batch, "row": name, "pictures_a_second": rate, "low": low, "high": high}
            row |= {"ratio": ratios[0], "cpu_ratio": ratios[1], "size": arguments.size, "dtype": arguments.dtype}
            row |= {"steps": arguments.steps, "device": arguments.device, "torch": torch.__version__}
            with arguments.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


def drift(arguments: argparse.Namespace) -> None:
    """Print how far pictures of batches of 2, 4 and 8 are from those of batches of 1, in levels of 0 … 255."""
    drawer = make_drawer("tiny", None, torch.device("cpu"), torch.float32)
    prompts = [f"{PROMPTS[i % len(PROMPTS)]}, number {i}" for i in range(arguments.pictures)]
    for scheduler in ("ddim", "pndm", "dpmsolver++", "euler-a"):
        drawn = {
            batch: sample(
                drawer.unet,
                drawer.parts,
                prompts,
                seed=SEED,
                steps=arguments.steps,
                guidance=GUIDANCE,
                scheduler=scheduler,
                batch=batch,
            ).astype(np.int16)
            for batch in (1, 2, 4, 8)
        }
        for batch in (2, 4, 8):
            apart = np.abs(drawn[batch] - drawn[1])
            print(
                f"{scheduler:<12} batch {batch} and 1: {apart.max()} at most, {apart.mean():.2e} on average, "
                f"{(apart > 0).mean():.2e} of the values differ",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "toy", "sd1"), default="tiny")
    parser.add_argument("--recipe", help="a student in place of the teacher")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--pictures", type=int, default=16, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--drift", action="store_true")
    arguments = parser.parse_args()
    of_diffusers.set_verbosity_error()
    logging.disable(logging.WARNING)
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else machine()
    print(f"{where}; torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.steps} steps")
    drift(arguments) if arguments.drift else compare(arguments)


if __name__ == "__main__":
    main()
