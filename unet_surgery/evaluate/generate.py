"""``generate``: a picture of each prompt into a folder, resumable, and shared by any number of processes.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unet_surgery.checkpoint.target import check_space
from unet_surgery.data.given import GivenPictures, open_given
from unet_surgery.data.prompts import PromptSet
from unet_surgery.data.shards import choose_device
from unet_surgery.errors import UsageError
from unet_surgery.evaluate.drawers import Drawer, choose_dtype, load_drawer
from unet_surgery.evaluate.grids import check_grids, check_teacher, draw_grids
from unet_surgery.evaluate.job import Job, noise_of_blocks
from unet_surgery.evaluate.request import GenerateRequest, Protocol, plan_prompts, plan_protocol
from unet_surgery.evaluate.writers import Writers
from unet_surgery.sample.generated import GENERATION_FILE, GeneratedFolder, check_output

__all__ = ["GenerateResult", "generate"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with pictures done and pictures in all, of this part; or with bytes, of a model that is fetched or made."""

BYTES_A_PIXEL = 3


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A generated folder: ``finished`` says whether all parts of it are there.

    ``num_there`` of ``num_pictures`` are; ``num_drawn`` of them were drawn by this call, in ``seconds``. ``grids`` are
    the files that show them beside the teacher's.
    """

    folder: Path
    finished: bool
    num_pictures: int
    num_there: int
    num_drawn: int
    seconds: float
    grids: tuple[Path, ...] = ()


def generate(
    model: str | Path,
    prompts: str | Path | None,
    out: str | Path,
    *,
    preset: str | None = None,
    base: str | Path | None = None,
    column: str | None = None,
    limit: int | None = None,
    size: int | tuple[int, int] | None = None,
    resize: int | tuple[int, int] | None = None,
    resize_filter: str = "bicubic",
    jpeg: int | None = None,
    full_size: str | Path | None = None,
    scheduler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    seed: int | None = None,
    seeding: str = "keyed",
    batch: int = 8,
    init: str | Path | None = None,
    masks: str | Path | None = None,
    strength: float | None = None,
    teacher: str | Path | None = None,
    grids: int = 8,
    device: str = "auto",
    dtype: str | None = None,
    compiled: bool = False,
    channels_last: bool = False,
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    fetching: Progress | None = None,
) -> GenerateResult:
    """Draw a picture of each prompt by ``model`` into the folder ``out``, or go on with it.

    ``model`` is a pipeline, or a U-Net with ``base`` to bring the other parts: a folder, a built-in name or a Hub id.
    ``prompts`` is what :func:`unet_surgery.data.prompts.read_prompts` reads, with ``column`` and ``limit``; if None,
    the captions of ``init``. ``preset`` names one of :data:`unet_surgery.sample.presets.PRESETS`, whose values stand
    for arguments that are None; without one, ``steps`` is 25, ``guidance`` 7.5, ``seed`` 0, and the model says its
    ``size`` and ``scheduler``. Sizes are a side or (height, width) in pixels.

    Pictures are drawn at ``size``, made smaller to ``resize`` by a filter of :data:`unet_surgery.sample.keep.FILTERS`,
    and passed through JPEG of a quality (0 for ``resize`` or ``jpeg``: not, whatever the preset says); ``full_size`` is
    a folder that keeps them as drawn as well. ``seeding`` is ``keyed`` (noise by seed and prompt number) or ``stream``
    (one generator on the device, batch after batch). ``init`` is a folder of pictures to start from, one a prompt, of
    which ``strength`` is drawn anew (0.8, with ``masks`` 1). ``teacher`` draws the first ``grids`` prompts too, beside
    the model's pictures, in ``out``-grids. ``dtype`` is fp32, bf16 or fp16 (None: fp16 on a GPU, else fp32), ``part``
    the (index, count) of processes that share the work. ``progress`` is called with pictures done and in all,
    ``fetching`` with bytes, before the first picture, where a model has to be made first; of what comes from the Hub
    its client shows bars of its own.

    Raises:
        UsageError: an argument has no sense.
        DataError: prompts or pictures to start from cannot be read, or are not of the right number.
        OutputError: ``out`` is something else, was begun with other settings, or the disk refuses.
        TeacherError, HubError, VerificationError: a model cannot be had or is not whole, or draws what is not finite.
        MissingExtraError: torch, diffusers or transformers is not installed.
    """
    request = GenerateRequest(
        model=str(model),
        prompts=prompts,
        out=_absolute(out),
        preset=preset,
        base=None if base is None else str(base),
        column=column,
        limit=limit,
        size=size,
        resize=resize,
        resize_filter=resize_filter,
        jpeg=jpeg,
        full_size=None if full_size is None else _absolute(full_size),
        scheduler=scheduler,
        steps=steps,
        guidance=guidance,
        negative=negative,
        seed=seed,
        seeding=seeding,
        batch=batch,
        init=None if init is None else _absolute(init),
        masks=None if masks is None else _absolute(masks),
        strength=strength,
        teacher=None if teacher is None else str(teacher),
        grids=grids,
        device=device,
        dtype=dtype,
        compiled=compiled,
        channels_last=channels_last,
        part=part,
    )
    return _run(request, progress or (lambda _done, _total: None), fetching)


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))


def _run(request: GenerateRequest, progress: Progress, fetching: Progress | None) -> GenerateResult:
    protocol = plan_protocol(request)
    prompts = plan_prompts(request)
    _check_outputs(request)
    given = _given(request, len(prompts.texts))
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    drawer = load_drawer(
        request.model,
        request.base,
        device=device,
        dtype=dtype,
        compiled=request.compiled,
        channels_last=request.channels_last,
        fetching=fetching,
    )
    check_teacher(request, dtype, fetching)
    job = Job.of(request, protocol, prompts, given, drawer, device)
    settings = job.settings(drawer)
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


def _check_outputs(request: GenerateRequest) -> None:
    models = [Path(text).expanduser() for text in (request.model, request.base, request.teacher) if text is not None]
    inputs = [*models, *(folder for folder in (request.init, request.masks) if folder is not None)]
    check_output(request.out, *inputs)
    if request.full_size is not None:
        check_output(request.full_size, *inputs)
        if request.full_size == request.out or request.out in request.full_size.parents:  # no other pictures in there
            raise UsageError("the pictures as drawn need a folder of their own", where=str(request.full_size))
    check_grids(request)


def _given(request: GenerateRequest, count: int) -> tuple[GivenPictures | None, GivenPictures | None]:
    limited = request.limit is not None
    init = None if request.init is None else open_given(request.init, count, limit=limited)
    return init, None if request.masks is None else open_given(request.masks, count, limit=limited)


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
