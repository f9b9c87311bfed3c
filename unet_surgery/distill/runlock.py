"""The lock on a run's folder: one trainer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.jsonfile import parse_object
from unet_surgery.errors import OutputBusyError, OutputError, printable

__all__ = ["RunLock"]

LOCK = "run.lock"
MAX_LOCK_BYTES = 4096


class RunLock:
    """A context manager: this process alone trains in ``run``, a folder that is made where it is missing.

    The system lets go of the lock when the process ends, however it ends; a process that it forked holds it as well,
    until that ends too. The file stays: removing it would let two processes lock two files of one name.

    Raises:
        OutputBusyError: another process has the lock; names it by what it wrote into the file.
        OutputError: the folder or the file cannot be made.
    """

    def __init__(self, run: Path) -> None:
        self.run = Path(run)
        self._fd: int | None = None

    def __enter__(self) -> RunLock:
        try:
            if not self.run.is_dir():
                disk.make_folder(self.run)
            self._fd = disk.open_for_update(self.run / LOCK)
        except OSError as error:
            raise OutputError(
                "the run's folder cannot be made or locked", where=str(self.run), found=error.strerror or str(error)
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(self._fd)
            self._release()
            if not isinstance(error, BlockingIOError):
                raise OutputError("the run's folder cannot be locked", where=str(self.run), found=error.strerror) from (
                    error
                )
            raise OutputBusyError(
                "another process is training in this folder",
                where=str(self.run),
                found=owner,
                hint="wait for it or end it; or train into another folder",
            ) from error
        except BaseException:
            self._release()
            raise
        # What the file says is a courtesy, which a full disk may refuse: the lock is held all the same.
        with contextlib.suppress(OSError):
            text = json.dumps({"pid": os.getpid(), "host": os.uname().nodename}) + "\n"
            disk.truncate(self._fd, 0)
            disk.write_at(self._fd, text.encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _owner(fd: int) -> str:
    """Return in words whose lock it is, as the file open at ``fd`` says; it was written when that one began."""
    try:
        value = parse_object(os.pread(fd, MAX_LOCK_BYTES, 0))
        since = datetime.fromtimestamp(os.fstat(fd).st_mtime, UTC).isoformat(sep=" ", timespec="seconds")
    except (ValueError, OSError):
        return "it has not said which"
    return f"process {printable(value.get('pid'))} on {printable(value.get('host'))}, since {since}"
