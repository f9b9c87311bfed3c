"""The toy world's own score: how many pictures show what their captions say, by its checker."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unet_surgery.errors import DataError, first_few
from unet_surgery.evaluate.pictures import PictureFolder
from unet_surgery.toyworld.checker import Verdict, judge
from unet_surgery.toyworld.draw import SIDE
from unet_surgery.toyworld.grammar import parse

__all__ = ["check_toy", "shares", "verdicts"]


def check_toy(pictures: PictureFolder, captions: Sequence[str]) -> None:
    """Refuse pictures and captions that are not the toy world's.

    Raises:
        DataError: the pictures are of another size, or captions are not of its grammar (names the first few).
    """
    if (pictures.width, pictures.height) != (SIDE, SIDE):
        raise DataError(
            "these are no pictures of the toy world",
            where=str(pictures.folder),
            expected=f"{SIDE}×{SIDE}",
            found=f"{pictures.width}×{pictures.height}",
        )
    wrong = [caption for caption in captions if not _is_toy(caption)]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(captions)} captions are not of the toy world",
            where=str(pictures.folder),
            expected="sentences such as: a small red circle at the left on a white background",
            found=first_few(wrong),
            hint="docs/evaluate.md has the grammar",
        )


def verdicts(pictures_NHW3: NDArray[np.uint8], captions: Sequence[str]) -> list[Verdict]:
    """Return what the checker says of each picture and its caption."""
    return [judge(picture, caption) for picture, caption in zip(pictures_NHW3, captions, strict=True)]


def shares(found: Sequence[Verdict]) -> dict[str, float]:
    """Return for each attribute the share of pictures that have it right."""
    return {name: float(np.mean([v.attributes[name] for v in found])) for name in found[0].attributes}


def _is_toy(caption: str) -> bool:
    try:
        parse(caption)
    except ValueError:
        return False
    return True
