"""A folder of pictures to be scored: which there are, that they are of one size, and their pixels in batches.

Shapes: B batch; pictures are [B, height, width, 3].
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from unet_surgery.checkpoint.jsonfile import open_regular, read_regular
from unet_surgery.data.captions import check_caption
from unet_surgery.data.imagefolder import FolderSource, find_metadata
from unet_surgery.data.pictures import FORMATS, MAX_PICTURE_BYTES, PictureLimits, decode_whole, size_of_picture
from unet_surgery.data.reasons import BadSampleError
from unet_surgery.errors import DataError, TeacherError, first_few, printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Change", "PictureFolder", "batches", "captions_of", "survey"]

# pytorch-fid's list: a folder has as many pictures here as there.
EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
Found = TypeVar("Found")

HEADER_BYTES = 64 << 10
FINAL = ("bomb", "too-small", "extreme-aspect", "lfs-pointer", "html")
"""Reasons that more of the file would not change."""
LIMITS = PictureLimits(min_side=1, max_aspect=float("inf"))


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to every picture first: squeezed to ``side`` × ``side`` by PIL's bicubic filter, then JPEG.

    ``jpeg`` is the quality with which it is stored and read again; None: it is not. A picture whose file is ``grey``
    stays so: JPEG stores it in another way than a colour picture of the same greys.
    """

    side: int | None = None
    jpeg: int | None = None

    def __call__(self, picture: NDArray[np.uint8], *, grey: bool = False) -> NDArray[np.uint8]:
        if self.side is None and self.jpeg is None:
            return picture
        image = Image.fromarray(picture)
        if grey:
            image = image.convert("L")
        if self.side is not None:
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        if self.jpeg is not None:
            stored = io.BytesIO()
            image.save(stored, "JPEG", quality=self.jpeg)
            image = Image.open(stored)
        return np.array(image.convert("RGB"), dtype=np.uint8)

    @property
    def words(self) -> str | None:
        """How a protocol names it; None where nothing is done."""
        parts = [f"bicubic to {self.side}×{self.side}"] if self.side is not None else []
        parts += [f"JPEG of quality {self.jpeg}"] if self.jpeg is not None else []
        return ", ".join(parts) or None


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """The pictures of a folder, by name, all ``width`` × ``height`` once ``change`` is done to them."""

    folder: Path
    names: tuple[str, ...]
    width: int
    height: int
    change: Change = Change()

    def __len__(self) -> int:
        return len(self.names)


def survey(folder: Path, *, change: Change | None = None, decoders: int = 4) -> PictureFolder:
    """Return the pictures that lie in ``folder`` itself, by their names' order; only their headers are read.

    A picture whose first 64 KB are not enough for that is read whole.

    Raises:
        DataError: there are none, or some cannot be read or are of another size than most (names the first few).
    """
    change = change or Change()
    try:
        entries = sorted(entry.name for entry in os.scandir(folder) if _is_picture(entry))
    except OSError as error:
        raise DataError(
            "the folder of pictures cannot be read", where=str(folder), found=error.strerror or str(error)
        ) from error
    if not entries:
        raise DataError(
            "there are no pictures in this folder",
            where=str(folder),
            expected="files such as 00000.png, in the folder itself",
        )
    with ThreadPoolExecutor(decoders) as pool:
        sizes = list(pool.map(lambda name: _size(folder / name), entries))
    broken = {name: size for name, size in zip(entries, sizes, strict=True) if isinstance(size, BadSampleError)}
    if broken:
        raise _unreadable(folder, broken)
    if change.side is not None:
        return PictureFolder(folder, tuple(entries), change.side, change.side, change)
    counted = {size: sizes.count(size) for size in dict.fromkeys(sizes)}
    usual = max(counted, key=counted.__getitem__)
    assert not isinstance(usual, BadSampleError)
    others = [f"{name} ({_shown(size)})" for name, size in zip(entries, sizes, strict=True) if size != usual]
    if others:
        raise DataError(
            f"{len(others)} of {len(entries)} pictures have another size than the others",
            where=str(folder),
            expected=_shown(usual),
            found=first_few(others),
            hint="scores of mixed sizes mean nothing; unet-surgery stats --resize brings references to one size",
        )
    return PictureFolder(folder, tuple(entries), *usual, change)


def captions_of(pictures: PictureFolder) -> list[str]:
    """Return the caption of each picture, from metadata.csv or .jsonl (``file_name`` and ``text`` or ``caption``).

    Raises:
        DataError: there is no such file, a row is broken, or pictures and captions are not one for one.
    """
    found = find_metadata(pictures.folder)
    if not found or found[0].parent != pictures.folder:
        raise DataError(
            "the pictures have no captions",
            where=str(pictures.folder),
            expected="a file metadata.csv with the columns file_name and caption",
            hint="unet-surgery generate writes it; or leave out the metrics that need captions",
        )
    source = FolderSource(pictures.folder, found[:1])
    captions: dict[str, str] = {}
    for index in range(len(source)):
        try:
            name, caption = source.entry(index)
            if name in captions:
                raise DataError("a picture has two captions", where=str(found[0]), found=printable(name))
            captions[name] = check_caption(caption)
        except BadSampleError as error:
            raise DataError(
                f"a caption cannot be used: {error.reason}",
                where=f"{found[0]}: {printable(source.id(index))}",
                found=error.found,
            ) from error
    missing, extra = sorted(set(pictures.names) - captions.keys()), sorted(captions.keys() - set(pictures.names))
    if missing or extra:
        counts = [f"{len(missing)} pictures without caption ({first_few(missing)})"] if missing else []
        counts += [f"{len(extra)} captions without picture ({first_few(extra)})"] if extra else []
        raise DataError(
            "pictures and captions do not belong together",
            where=str(found[0]),
            expected=f"one caption for each of the {len(pictures)} pictures",
            found="; ".join(counts),
        )
    return [captions[name] for name in pictures.names]


def batches(
    pictures: PictureFolder,
    batch: int,
    *,
    decoders: int = 4,
    each: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
    on_file: Callable[[bytes], None] = lambda _digest: None,
) -> Iterator[NDArray[np.uint8]]:
    """Yield the pictures in order, uint8 [B, height, width, 3], decoded by threads ahead of what is asked for.

    ``each`` is done to every picture in those threads. ``on_file`` is called with each file's sha256, in order.

    Raises:
        DataError: pictures cannot be decoded; after the last batch before the first of them, all others having been
            tried, so that the error can say how many there are.
    """

    def read(name: str) -> tuple[NDArray[np.uint8], bytes] | BadSampleError:
        try:
            data = _bytes_of(pictures.folder / name)
            picture = decode_whole(data, LIMITS)
        except BadSampleError as error:
            return error
        picture = pictures.change(picture, grey=pictures.change.words is not None and _is_grey(data, picture))
        if picture.shape[:2] != (pictures.height, pictures.width):
            return BadSampleError("unreadable", "changed since it was looked at")
        return picture if each is None else each(picture), hashlib.sha256(data).digest()

    broken: dict[str, BadSampleError] = {}
    ready: list[NDArray[np.uint8]] = []
    for name, found in _in_order(pictures.names, read, threads=decoders, ahead=2 * batch + decoders):
        if isinstance(found, BadSampleError):
            broken[name] = found
        elif not broken:
            ready.append(found[0])
            on_file(found[1])
            if len(ready) == batch:
                yield np.stack(ready)
                ready = []
    if broken:
        raise _unreadable(pictures.folder, broken)
    if ready:
        yield np.stack(ready)


def _in_order(
    names: Sequence[str], read: Callable[[str], Found], *, threads: int, ahead: int
) -> Iterator[tuple[str, Found]]:
    """Yield each name with what ``read`` makes of it in a thread, at most ``ahead`` of them before they are wanted."""
    rest = iter(names)
    waiting: deque[tuple[str, Future[Found]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            waiting.extend((name, pool.submit(read, name)) for name in itertools.islice(rest, ahead))
            while waiting:
                name, future = waiting.popleft()
                found = future.result()
                if (following := next(rest, None)) is not None:
                    waiting.append((following, pool.submit(read, following)))
                yield name, found
        finally:
            for _, future in waiting:
                future.cancel()


def _is_picture(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and Path(entry.name).suffix.lower() in EXTENSIONS and not entry.is_dir()


def _size(path: Path) -> tuple[int, int] | BadSampleError:
    try:
        with open_regular(path) as file:
            start = file.read(HEADER_BYTES)
        return size_of_picture(start, LIMITS)
    except TeacherError as error:
        return BadSampleError("unreadable", f"{error.what}: {error.found}")
    except BadSampleError as error:
        if error.reason in FINAL or len(start) < HEADER_BYTES:
            return error
    try:  # a header behind a large profile, or at the file's end, as TIFF may have it
        return size_of_picture(_bytes_of(path), LIMITS)
    except BadSampleError as error:
        return error


def _is_grey(data: bytes, picture: NDArray[np.uint8]) -> bool:
    """Tell whether a file that was decoded holds one channel; the file is asked only where its pixels are grey."""
    if (picture != picture[..., :1]).any():
        return False
    with Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        return image.mode == "L"


def _bytes_of(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_PICTURE_BYTES)
    except TeacherError as error:
        raise BadSampleError("unreadable", f"{error.what}: {error.found}") from error


def _unreadable(folder: Path, broken: dict[str, BadSampleError]) -> DataError:
    told = [f"{name} ({error.reason}{f': {error.found}' if error.found else ''})" for name, error in broken.items()]
    return DataError(
        f"{len(broken)} {'picture' if len(broken) == 1 else 'pictures'} cannot be read",
        where=str(folder),
        found=first_few(told),
        hint="draw or fetch them again: a score of fewer pictures is another score",
    )


def _shown(size: object) -> str:
    assert isinstance(size, tuple)
    return f"{size[0]}×{size[1]}"
