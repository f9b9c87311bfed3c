"""The first prompts of a generation drawn by a teacher too, from the same noise: student and teacher side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unet_surgery.checkpoint import disk
from unet_surgery.evaluate.drawers import Drawer, load_drawer
from unet_surgery.evaluate.job import Job, noise_of_blocks
from unet_surgery.sample.draw import check_unet
from unet_surgery.sample.generated import GeneratedFolder
from unet_surgery.sample.grid import grid

__all__ = ["draw_grids"]

ROWS_A_GRID = 8


def draw_grids(job: Job, drawer: Drawer, folder: GeneratedFolder) -> list[Path]:
    """Draw the first prompts by the teacher too, from the same noise, and write both side by side."""
    request = job.request
    if request.teacher is None:
        return []
    where = folder.root.with_name(f"{folder.root.name}-grids")
    dtype = next(drawer.unet.parameters()).dtype
    teacher = load_drawer(
        request.teacher,
        None,
        fallback=request.base or request.model,  # a teacher that is a U-Net alone has no parts of its own
        device=job.device,
        dtype=dtype,
        channels_last=request.channels_last,
    )
    check_unet(teacher.unet.config, teacher.parts, masks=job.masks is not None)
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
    disk.make_folders(where)
    for start in range(0, count, ROWS_A_GRID):
        rows = range(start, min(start + ROWS_A_GRID, count))
        columns = {
            f"teacher: {teacher.name}": pictures[rows.start : rows.stop],
            drawer.name: np.stack([_read(folder.path(index)) for index in rows]),
        }
        path = where / f"grid-{folder.path(start).name}"
        disk.replace_file(path, grid(columns, [job.prompts.texts[index] for index in rows]), force=True)
        paths.append(path)
    return paths


def _read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path, formats=["PNG"]) as picture:
        return np.array(picture.convert("RGB"))
