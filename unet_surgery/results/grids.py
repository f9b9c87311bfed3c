"""Pictures of several models side by side: columns matched by the prompt's place, as large as the page has room for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from unet_surgery.checkpoint.jsonfile import read_regular
from unet_surgery.data.pictures import MAX_PICTURE_BYTES, PictureLimits, decode_whole
from unet_surgery.data.reasons import BadSampleError
from unet_surgery.errors import DataError, TeacherError
from unet_surgery.pages.page import Encoded, Pictures
from unet_surgery.results.protocol import changed, drawn_as
from unet_surgery.results.read import Drawn

__all__ = ["MAX_PICTURES", "ROOM_BYTES", "picture_sections"]

ROOM_BYTES = 7 << 20
"""What the pictures of a page may take, base64 included: it stays under 10 MB whatever else is on it."""
MAX_PICTURES = 1200
MAX_COLUMNS = 6
SIDES = (320, 256, 192, 144, 112, 88, 64)
PIXEL_ART = 64
"""Pictures up to this side are shown as they are, each pixel a square; larger ones as JPEG."""
QUALITY = 85
BASE64 = 4 / 3
LIMITS = PictureLimits(min_side=1, max_aspect=64.0)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Folders of the same prompts; of each, the pictures of the first rows."""

    folders: Sequence[Drawn]
    titles: Sequence[str]
    prompts: Sequence[str]

    def first(self, rows: int) -> _Grid:
        return _Grid(self.folders, self.titles, self.prompts[:rows])


def picture_sections(
    drawn: Sequence[Drawn], titles: Sequence[str], *, heading: str, room: int = ROOM_BYTES
) -> tuple[list[Pictures], list[str]]:
    """Return a grid for each set of prompts, columns in the order given, and in words what was left out.

    Pictures become smaller, and where that is not enough fewer, until all fit into ``room`` bytes.

    Raises:
        DataError: a picture is missing or damaged; names it.
    """
    grids, left_out = _limited(_grids(drawn, titles))
    fitted = _fitted(grids, room)
    while fitted is None and any(len(grid.prompts) > 1 for grid in grids):
        grids = [grid.first(max(1, len(grid.prompts) // 2)) for grid in grids]
        left_out = ["rows of pictures, which the page has no room for"]
        fitted = _fitted(grids, room)
    if fitted is None:
        return [], [f"{len(grids)} grids of pictures, which the page has no room for"]
    side, encoded = fitted
    sections = [
        Pictures(
            heading if len(grids) == 1 else f"{heading} {number}: {', '.join(grid.titles)}",
            dict(zip(grid.titles, columns, strict=True)),
            grid.prompts,
            note=_note(grid, side),
        )
        for number, (grid, columns) in enumerate(zip(grids, encoded, strict=True), 1)
    ]
    return sections, left_out


def _fitted(grids: Sequence[_Grid], room: int) -> tuple[int, list[list[list[Encoded]]]] | None:
    """Return the largest side at which all pictures fit into ``room``, and their files; None: at no side."""
    for side in SIDES:
        if _guess(grids, side) > 1.2 * room:
            continue
        left = room
        encoded: list[list[list[Encoded]]] = []
        for grid in grids:
            encoded.append([])
            for folder in grid.folders:
                column = [_encoded(folder, row, side) for row in range(len(grid.prompts))]
                left -= round(sum(len(file.data) for file in column) * BASE64)
                encoded[-1].append(column)
                if left < 0:
                    break
            if left < 0:
                break
        if left >= 0:
            return side, encoded
    return None


def _guess(grids: Sequence[_Grid], side: int) -> float:
    """Return about how many bytes all pictures take, going by the first row of each grid."""
    firsts = ((grid, _encoded(folder, 0, side)) for grid in grids for folder in grid.folders)
    return sum(len(file.data) * BASE64 * len(grid.prompts) for grid, file in firsts)


def _grids(drawn: Sequence[Drawn], titles: Sequence[str]) -> list[_Grid]:
    """Put folders together whose shown prompts are the same; more than a page is wide go into several grids."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for k, folder in enumerate(drawn):
        prompts = folder.generation.prompts
        captions = tuple(caption for _, caption in folder.rows)
        groups.setdefault((prompts.sha256, captions), []).append(k)
    return [
        _Grid([drawn[k] for k in part], [titles[k] for k in part], [caption for _, caption in drawn[part[0]].rows])
        for group in groups.values()
        for part in (group[i : i + MAX_COLUMNS] for i in range(0, len(group), MAX_COLUMNS))
        if drawn[part[0]].rows
    ]


def _limited(grids: Sequence[_Grid]) -> tuple[list[_Grid], list[str]]:
    """Keep the first grids and rows, so that there are at most MAX_PICTURES."""
    num_columns = sum(len(grid.folders) for grid in grids)
    kept = list(grids)
    left_out = []
    if num_columns > MAX_PICTURES:
        kept = kept[: MAX_PICTURES // MAX_COLUMNS]
        left_out.append(f"{len(grids) - len(kept)} grids of pictures")
        num_columns = sum(len(grid.folders) for grid in kept)
    rows = max(1, MAX_PICTURES // max(1, num_columns))
    if any(len(grid.prompts) > rows for grid in kept):
        left_out.append(f"pictures of all but the first {rows} prompts of each grid")
    return [grid.first(rows) for grid in kept], left_out


def _encoded(folder: Drawn, row: int, side: int) -> Encoded:
    """Return a picture's file: small ones as they are, others at most ``side`` wide and high."""
    path = folder.root / folder.rows[row][0]
    try:
        pixels = decode_whole(read_regular(path, MAX_PICTURE_BYTES), LIMITS)
    except TeacherError as error:
        raise DataError(error.what, where=error.where, expected="a picture", found=error.found) from error
    except BadSampleError as error:
        raise DataError(
            "a picture cannot be read",
            where=str(path),
            found=f"{error.reason}: {error.found}" if error.found else error.reason,
        ) from error
    picture = Image.fromarray(pixels)
    file = io.BytesIO()
    if max(picture.size) <= PIXEL_ART:
        picture.save(file, format="PNG", optimize=True)
        return Encoded(file.getvalue(), "png", picture.width, picture.height)
    if max(picture.size) > side:
        factor = side / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    picture.save(file, format="JPEG", quality=QUALITY)
    return Encoded(file.getvalue(), "jpeg", picture.width, picture.height, smooth=True)


def _note(grid: _Grid, side: int) -> str:
    """Return which rows are shown, whether pictures were made smaller, and what else differs between columns."""
    parts = []
    first = grid.folders[0]
    count = first.generation.prompts.count or first.generation.images
    if count is not None and count > len(grid.prompts):
        parts.append(f"The first {len(grid.prompts)} of {count:,} prompts.")
    larger = [f.generation for f in grid.folders if max(f.generation.width, f.generation.height) > side]
    if larger:
        parts.append(f"Pictures of {larger[0].width}×{larger[0].height} pixels are shown at {side}, as JPEG.")
    before = drawn_as(first.generation)
    others: dict[str, list[str]] = {}
    for folder, title in zip(grid.folders[1:], grid.titles[1:], strict=True):
        others.setdefault(changed(before, drawn_as(folder.generation)), []).append(title)
    others.pop("", None)
    parts += [f"Not drawn as {grid.titles[0]}: {', '.join(titles)} ({differs})." for differs, titles in others.items()]
    return " ".join(parts)
