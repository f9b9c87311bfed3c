"""MS-COCO's captions: ``captions_….json`` lists images, and annotations of which each image has five or so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from unet_surgery.errors import DataError, printable

__all__ = ["first_captions"]


def first_captions(data: Mapping[str, Any], where: str) -> Iterator[tuple[Mapping[str, Any], str | None]]:
    """Yield each image, as they are listed, with its first caption (None: it has none), without white space around.

    Raises:
        DataError: these are no captions of COCO.
    """
    first: dict[Any, str] = {}
    try:
        for entry in data["annotations"]:
            first.setdefault(entry["image_id"], entry["caption"].strip())
        for image in data["images"]:
            yield image, first.get(image["id"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError("these are no captions of COCO", where=where, found=printable(repr(error))) from error
