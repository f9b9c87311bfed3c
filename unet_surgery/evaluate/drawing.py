"""Drawing a picture of each prompt into a folder, resumable, and shared by any number of processes.

The prompts are cut into blocks of one batch each, and the prompts dealt to the processes. A block is always drawn
whole, also where some of its pictures are there already or are another process's: so whatever is interrupted or shared,
every picture is drawn in the company it would have had, and comes out the same to the last bit on the same machine and
threads, if all have the same batch.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unet_surgery.checkpoint.disk import Progress
from unet_surgery.checkpoint.target import check_space
from unet_surgery.data.given import GivenPictures
from unet_surgery.data.prompts import PromptSet
from unet_surgery.data.shards import choose_device
from unet_surgery.errors import printable
from unet_surgery.evaluate.drawers import Drawer, choose_dtype, load_drawer
from unet_surgery.evaluate.grids import check_teacher, draw_grids
from unet_surgery.evaluate.job import Job, noise_of_blocks
from unet_surgery.evaluate.request import GenerateRequest, GenerateResult, Protocol
from unet_surgery.evaluate.writers import Writers
from unet_surgery.sample.generated import GENERATION_FILE, GeneratedFolder

__all__ = ["draw_prompts"]

log = logging.getLogger(__name__)

BYTES_A_PIXEL = 3


def draw_prompts(
    request: GenerateRequest,
    protocol: Protocol,
    prompts: PromptSet,
    given: tuple[GivenPictures | None, GivenPictures | None],
    progress: Progress,
    fetching: Progress | None,
) -> GenerateResult:
    """Draw what is missing of this process's part, and finish the folder if nothing is missing then.

    ``given`` are the pictures to start from and their masks; the rest is as :func:`unet_surgery.evaluate.generate`
    says, which checked all of it.

    Raises:
        SurgeryError: as :func:`unet_surgery.evaluate.generate.generate`.
    """
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    log.info("loading %s …", printable(request.model))
    drawer = load_drawer(
        request.model,
        request.base,
        device=device,
        dtype=dtype,
        compiled=request.compiled,
        channels_last=request.channels_last,
        fetching=fetching,
    )
    check_teacher(request, protocol, drawer, dtype, fetching)
    job = Job.of(request, protocol, prompts, given, drawer, device)
    settings = job.settings(drawer)
    if note := job.far_from_own_size(drawer):
        log.warning("note: %s", note)
    folders = _folders(request, protocol, prompts, job, settings)
    was_finished = (request.out / GENERATION_FILE).is_file()
    for folder in folders:
        folder.begin()
    begun = time.perf_counter()
    with folders[0].part(*request.part):
        num_drawn = _draw_part(job, drawer, folders, progress)
    seconds = time.perf_counter() - begun
    missing = sum(len(folder.missing()) for folder in folders)
    count = len(prompts.texts)
    if missing:
        return GenerateResult(request.out, False, count, count - len(folders[0].missing()), num_drawn, seconds)
    facts = {"images": count, "seconds": round(seconds, 3) if num_drawn == count else None}
    for folder in folders[1:]:
        folder.finish(facts)
    is_first = folders[0].finish(facts)
    is_mine = is_first or (was_finished and request.part[0] == 0)
    grids = draw_grids(job, drawer, folders[0]) if is_mine else []
    return GenerateResult(request.out, True, count, count, num_drawn, seconds, tuple(grids))


def _draw_part(job: Job, drawer: Drawer, folders: Sequence[GeneratedFolder], progress: Progress) -> int:
    """Draw the pictures of this process that are missing; return how many were."""
    blocks, mine = job.blocks(), job.share()
    missing = set(mine).intersection(set().union(*(folder.missing() for folder in folders)))
    todo = {number for number, block in enumerate(blocks) if missing.intersection(block)}
    num_todo, total = len(missing), len(mine)
    _check_room(folders, num_todo)
    if todo:
        facts = _own_facts(job)
        for folder in folders:
            folder.drawn_by(facts)
    if todo and num_todo < total:
        log.info("going on: %d of %d pictures of this part are there", total - num_todo, total)
    progress(total - num_todo, total)
    how = job.sampling(drawer)
    num_drawn = 0
    with Writers(folders, job.protocol.keeping) as writers:
        for number, noise in noise_of_blocks(job, drawer, blocks, todo):
            wanted = missing.intersection(blocks[number])
            for picture_index, picture in zip(
                blocks[number], job.draw(drawer, how, blocks[number], noise), strict=True
            ):
                if picture_index in wanted:
                    writers.write(picture_index, picture)
            num_drawn += len(wanted)
            progress(total - num_todo + num_drawn, total)
    return num_drawn


def _check_room(folders: Sequence[GeneratedFolder], num_pictures: int) -> None:
    """Ask each disk for what all folders on it take together."""
    needed: dict[int, tuple[Path, int]] = {}
    for folder in folders:
        device = os.stat(folder.root).st_dev
        root, num_bytes = needed.get(device, (folder.root, 0))
        needed[device] = root, num_bytes + num_pictures * folder.size[0] * folder.size[1] * BYTES_A_PIXEL
    for root, num_bytes in needed.values():
        check_space(root, num_bytes)


def _folders(
    request: GenerateRequest, protocol: Protocol, prompts: PromptSet, job: Job, settings: dict[str, Any]
) -> list[GeneratedFolder]:
    """Return the folder of the pictures that are kept, and if wanted the one of those as they were drawn."""
    keeping = protocol.keeping
    folders = [GeneratedFolder(request.out, prompts.texts, keeping.size or job.drawn_size, settings)]
    if request.full_size is not None:
        width, height = job.drawn_size
        full = {**settings, "width": width, "height": height, "resize": None}
        folders.append(GeneratedFolder(request.full_size, prompts.texts, job.drawn_size, full))
    return folders


def _own_facts(job: Job) -> dict[str, Any]:
    """Return what generation.json says of a process that drew pictures, and another may have otherwise."""
    request = job.request
    packages = ("torch", "diffusers", "transformers", "numpy", "pillow")
    return {
        "batch": request.batch,
        "device": _device_name(job.device),
        "compile": request.compiled,
        "channels_last": request.channels_last,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def _device_name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
