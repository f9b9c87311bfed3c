"""What is known of a published file of FID statistics that does not say it itself, in a small JSON file beside it.

pytorch-fid's ``.npz`` holds μ and Σ alone: not of how many pictures, nor of what resolution. The note names the sha256
of the file that it tells of, so that it is never taken for another's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.errors import DataError, SurgeryError, printable

__all__ = ["StatisticsNote", "note_bytes", "note_path", "read_note"]

FORMAT, FORMAT_VERSION = "unet-surgery-statistics-note", 1
MAX_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class StatisticsNote:
    """``resolution`` is (width, height) of the pictures; ``change`` is what was done to them before, in words."""

    name: str
    count: int
    resolution: tuple[int, int]
    change: str | None = None


def note_path(statistics: Path) -> Path:
    """Return where the note on a file lies: ``real_im256.json`` beside ``real_im256.npz``."""
    return statistics.with_suffix(".json")


def note_bytes(note: StatisticsNote, sha256: str) -> bytes:
    data = {"format": FORMAT, "format_version": FORMAT_VERSION, "sha256": sha256, **asdict(note)}
    return (json.dumps(data, indent=2) + "\n").encode()


def read_note(statistics: Path, sha256: str) -> StatisticsNote | None:
    """Return the note on a file of this sha256; None if there is none, or what lies there is something else.

    Raises:
        DataError: it is damaged, or tells of a file of another sha256.
    """
    path = note_path(statistics)
    if not path.is_file():
        return None
    try:
        data = read_object(path, MAX_BYTES)
    except SurgeryError as error:
        raise DataError(error.what, where=error.where, found=error.found, hint="remove it") from error
    if data.get("format") != FORMAT:
        return None
    resolution, count, change = data.get("resolution"), data.get("count"), data.get("change")
    is_sane = data.get("format_version") == FORMAT_VERSION and isinstance(data.get("name"), str)
    is_sane = is_sane and (change is None or isinstance(change, str))
    numbers = [count, *resolution] if is_sane and isinstance(resolution, list) else []
    if len(numbers) != 3 or not all(type(n) is int and 1 <= n < 1 << 31 for n in numbers):
        raise DataError("this note on statistics is damaged", where=str(path), hint="remove it, or fetch the set again")
    if data.get("sha256") != sha256:
        raise DataError(
            "the note beside these statistics tells of another file",
            where=str(path),
            expected=f"sha256 {printable(data.get('sha256'))}",
            found=f"sha256 {sha256}",
            hint="remove the note, or fetch the set again",
        )
    return StatisticsNote(printable(data["name"]), numbers[0], (numbers[1], numbers[2]), change and printable(change))
