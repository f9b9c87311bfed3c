"""Where output goes: refused before any work, with room for it, and apart from what it is made of.

A file is written whole or not at all here; :mod:`unet_surgery.checkpoint.staging` does the same for folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.errors import OutputBusyError, OutputError, UsageError

__all__ = ["check_apart", "check_new_file", "check_space", "check_target", "write_target"]

SPARE_BYTES = 4 << 20
SUFFIX = ".safetensors"


def check_target(target: Path, source: Path, *, force: bool) -> None:
    """Check that ``target`` may be written: it is not there, or is a file that ``force`` replaces, and not ``source``.

    Raises:
        OutputError: it may not.
        UsageError: it is not named as a safetensors file.
    """
    if not str(target).strip() or target.name in ("", ".", ".."):
        raise OutputError("the output is no file's name", where=str(target) or "--out", hint="choose another --out")
    if target.exists() and target.samefile(source):
        raise OutputError("the output is the input", where=str(target), hint="choose another --out")
    check_new_file(target, force=force)
    if target.suffix != SUFFIX:
        raise UsageError(
            "the output is not a safetensors file", where=str(target), expected=f"a name that ends in {SUFFIX}"
        )


def check_new_file(target: Path, *, force: bool) -> None:
    """Check that a file may be written at ``target``, before the work that it is to hold: minutes, or hours.

    Raises:
        OutputError: it is a folder, it exists (without ``force``), or there is no folder for it.
    """
    if target.is_dir():
        raise OutputError("the output is a folder", where=str(target), expected="a file, or nothing")
    if os.path.lexists(target) and not (force and target.is_file()):
        hint = "choose another --out, or --force to replace it" if target.is_file() else "choose another --out"
        raise OutputError("the output exists", where=str(target), hint=hint)
    if not target.parent.is_dir():
        raise OutputError(
            "the folder that should hold the output does not exist",
            where=str(target.parent),
            hint=f"mkdir -p {target.parent}",
        )


def write_target(target: Path, write: bytes | Callable[[int], None], *, force: bool) -> None:
    """Write ``target``, bytes or by a function that gets a descriptor: it is there whole afterwards, or as it was.

    Raises:
        OutputError: it appeared meanwhile (without ``force``), another process is writing it, or the disk refuses.
    """
    try:
        disk.replace_file(target, write, force=force)
    except FileExistsError:
        raise OutputError("the output appeared meanwhile", where=str(target), hint="choose another --out") from None
    except BlockingIOError as error:
        raise OutputBusyError(
            "another process is writing this file", where=str(target), hint="wait for it, or choose another --out"
        ) from error
    except OSError as error:
        raise OutputError("the file cannot be written", where=str(target), found=error.strerror) from error


def check_apart(out: Path, root: Path, whose: str) -> None:
    """Check that the folder ``out`` is not ``root``, inside it, or around it: by device and inode, not by name.

    Raises:
        OutputError: it is; ``whose`` is what the message calls ``root``.
    """
    real, top = Path(os.path.realpath(out)), Path(os.path.realpath(root))
    here = [p for p in (real, *real.parents) if p.exists()]
    inside = any(p.samefile(top) for p in here)
    around = real.exists() and any(p.samefile(real) for p in top.parents)
    if inside or around:
        raise OutputError(
            f"the output is the {whose}'s folder, inside it or around it", where=str(out), hint="choose another --out"
        )


def check_space(folder: Path, num_bytes: int) -> None:
    """Check that ``num_bytes`` more fit on the disk of ``folder``.

    Raises:
        OutputError: they do not.
    """
    free = disk.free_bytes(folder)
    if free < num_bytes + SPARE_BYTES:
        raise OutputError(
            "there is not enough room on the disk",
            where=str(folder),
            expected=f"{num_bytes / 1e6:,.1f} MB",
            found=f"{free / 1e6:,.1f} MB free",
            hint="free some, or write to another disk (--out; output: in a run file)",
        )
