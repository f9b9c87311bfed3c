"""The first prompts of a generation drawn by a teacher too, from the same noise: student and teacher side by side.

Whatever can be known to be wrong with the teacher, or where the grids go, is said before hours of drawing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.disk import Progress
from unet_surgery.errors import OutputError, UsageError, printable
from unet_surgery.evaluate.drawers import Drawer, load_drawer
from unet_surgery.evaluate.job import Job, noise_of_blocks
from unet_surgery.evaluate.request import GenerateRequest, Protocol, grids_folder
from unet_surgery.runtime.parts import pixels_per_latent
from unet_surgery.sample.draw import check_unet
from unet_surgery.sample.generated import GeneratedFolder
from unet_surgery.sample.grid import grid
from unet_surgery.sample.schedulers import check_steps, make_scheduler

__all__ = ["check_teacher", "draw_grids"]

ROWS_A_GRID = 8


def check_teacher(
    request: GenerateRequest, protocol: Protocol, student: Drawer, dtype: torch.dtype, fetching: Progress | None
) -> None:
    """Load the teacher once, if there is one, and let go of it: it is here and whole then, and fits its parts.

    Raises:
        SurgeryError: as :func:`unet_surgery.evaluate.drawers.load_drawer`, or it cannot draw these pictures.
    """
    if request.teacher is not None:
        teacher = _load(request, request.teacher, torch.device("cpu"), dtype, fetching)
        check_steps(make_scheduler(teacher.parts.scheduler_config, protocol.scheduler), protocol.steps)
        theirs, ours = (
            f"{drawer.parts.vae.config.latent_channels} channels of {pixels_per_latent(drawer.parts.vae)} pixels a side"
            for drawer in (teacher, student)
        )
        if theirs != ours:
            raise UsageError(
                "the teacher's latents are of another kind: the same noise makes no pictures of one size",
                where=printable(teacher.name),
                expected=ours,
                found=theirs,
                hint="leave --teacher out, or name the teacher that the model was made of",
            )


def draw_grids(job: Job, drawer: Drawer, folder: GeneratedFolder) -> list[Path]:
    """Draw the first prompts by the teacher too, from the same noise, and write both side by side."""
    request = job.request
    if request.teacher is None:
        return []
    where = grids_folder(request)
    teacher = _load(request, request.teacher, job.device, next(drawer.unet.parameters()).dtype)
    how = job.sampling(teacher)
    count = min(request.grids, len(job.prompts.texts))
    keeping, size = job.protocol.keeping, (folder.size[1], folder.size[0], 3)
    pictures = np.empty((count, *size), np.uint8)
    todo = set(range(-(-count // request.batch)))
    blocks = job.blocks()
    for number, noise in noise_of_blocks(job, teacher, blocks, todo):
        for index, picture in zip(blocks[number], job.draw(teacher, how, blocks[number], noise), strict=True):
            if index < count:
                pictures[index] = np.asarray(keeping.kept(picture))
    paths = []
    _make(where, lambda: disk.make_folders(where))
    for start in range(0, count, ROWS_A_GRID):
        rows = range(start, min(start + ROWS_A_GRID, count))
        columns = {
            f"teacher: {teacher.name}": pictures[rows.start : rows.stop],
            drawer.name: np.stack([_read(folder.path(index)) for index in rows]),
        }
        path = where / f"grid-{folder.path(start).name}"
        data = grid(columns, [job.prompts.texts[index] for index in rows])
        _make(path, lambda path=path, data=data: disk.replace_file(path, data, force=True))  # type: ignore[misc]
        paths.append(path)
    return paths


def _load(
    request: GenerateRequest, teacher: str, device: torch.device, dtype: torch.dtype, fetching: Progress | None = None
) -> Drawer:
    drawer = load_drawer(
        teacher,
        None,
        fallback=request.base or request.model,  # a teacher that is a U-Net alone has no parts of its own
        device=device,
        dtype=dtype,
        channels_last=request.channels_last,
        fetching=fetching,
    )
    check_unet(drawer.unet.config, drawer.parts, masks=request.masks is not None)
    return drawer


def _make(path: Path, make: Callable[[], None]) -> None:
    try:
        make()
    except OSError as error:
        raise OutputError(
            "the grids cannot be written; the pictures are there, and the same command draws only the grids again",
            where=str(path),
            found=error.strerror or str(error),
        ) from error


def _read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path, formats=["PNG"]) as picture:
        return np.array(picture.convert("RGB"))
