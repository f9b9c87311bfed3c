"""One file as output: refused before any work, written whole or not at all, and every refusal in words."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.errors import OutputBusyError, OutputError

__all__ = ["check_target", "write_target"]


def check_target(target: Path, source: Path, *, force: bool) -> None:
    """Check that ``target`` may be written: it is not there, or is a file that ``force`` replaces, and not ``source``.

    Raises:
        OutputError: it may not.
    """
    if not str(target).strip() or target.name in ("", ".", ".."):
        raise OutputError("the output is no file's name", where=str(target) or "--out", hint="choose another --out")
    if target.exists() and target.samefile(source):
        raise OutputError("the output is the input", where=str(target), hint="choose another --out")
    if os.path.lexists(target) and not (force and target.is_file()):
        hint = "choose another --out, or --force to replace it" if target.is_file() else "choose another --out"
        raise OutputError("the output exists", where=str(target), hint=hint)
    if not target.parent.is_dir():
        raise OutputError(
            "the folder that should hold the output does not exist",
            where=str(target.parent),
            hint=f"mkdir -p {target.parent}",
        )


def write_target(target: Path, write: Callable[[int], None], *, force: bool) -> None:
    """Write ``target`` by ``write``, which gets a descriptor: it is there whole afterwards, or as it was before.

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
