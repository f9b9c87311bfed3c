"""A folder that appears whole or not at all.

Everything is written into a sibling, ``.NAME.unet-surgery``, which is locked while a process works in it;
one rename puts it in place. A sibling left by a process that died is cleared by the next run.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from unet_surgery.checkpoint import disk
from unet_surgery.errors import OutputBusyError, OutputError

__all__ = ["Staging"]

log = logging.getLogger(__name__)

SUFFIX = ".unet-surgery"


class Staging:
    """A context manager: write below ``folder``, then :meth:`commit`; anything else leaves nothing behind.

    An existing target is replaced only with ``replace``, which is called with it and raises if it must stay.

    Raises:
        OutputError: the target exists, cannot be created, or another process is writing it.
    """

    def __init__(self, target: Path, *, replace: Callable[[Path], None] | None = None) -> None:
        self.target = Path(os.path.abspath(target))
        self.replace = replace
        self.folder = self.target.parent / f".{self.target.name}{SUFFIX}"
        self._aside = self.target.parent / f".{self.target.name}.replaced{SUFFIX}"
        self._lock_fds: list[int] = []

    def __enter__(self) -> Staging:
        try:
            self._recover_aside()
            self._check_target()
            self._make_folder()
        except OSError as error:
            raise OutputError(
                "the output folder cannot be made", where=str(self.target), found=error.strerror or str(error)
            ) from error
        return self

    def commit(self) -> None:
        """Force the staged folders to disk and put the whole in place."""
        for root, _, _ in os.walk(self.folder, topdown=False):
            disk.fsync_folder(Path(root))
        if self.replace is not None and os.path.lexists(self.target):
            self._check_target()
            self._replace()
        else:
            try:
                disk.rename_new(self.folder, self.target)
            except FileExistsError:
                raise OutputError(
                    "the output appeared while it was being written",
                    where=str(self.target),
                    hint="choose another --out, or --force to replace it",
                ) from None
        try:
            disk.fsync_folder(self.target.parent)
        except OSError as error:
            raise OutputError(
                "the output is in place and whole, but the disk did not confirm its name",
                where=str(self.target),
                found=error.strerror,
                hint="check the disk; after a power cut the output may be gone",
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if any(self._is_named(fd) for fd in self._lock_fds):  # else it is renamed, or another process's
                disk.remove_tree(self.folder)
        finally:
            for fd in self._lock_fds:
                os.close(fd)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(
                "the output could not be written; nothing was left at its path",
                where=str(self.target),
                found=error.strerror or str(error),
            ) from error

    def _check_target(self) -> None:
        target = self.target
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise OutputError(
                "the output path is a link or a file",
                where=str(target),
                expected="a folder, or nothing",
                hint="choose another --out",
            )
        if target.exists():
            if self.replace is None:
                raise OutputError(
                    "the output folder exists", where=str(target), hint="choose another --out, or --force to replace it"
                )
            self.replace(target)
        if not target.parent.is_dir():
            raise OutputError(
                "the folder that should hold the output does not exist",
                where=str(target.parent),
                hint=f"mkdir -p {target.parent}",
            )

    def _make_folder(self) -> None:
        """Make the staging folder and lock it; clear a dead run's, refuse a living one's."""
        while not self._lock_fds:
            with contextlib.suppress(FileExistsError):
                disk.make_folder(self.folder)
            try:
                fd = self._lock(self.folder)
            except FileNotFoundError:
                continue  # its owner finished just now
            if self._is_named(fd):
                self._lock_fds.append(fd)
            else:
                os.close(fd)
        leftovers = list(self.folder.iterdir())
        if leftovers:
            log.warning("clearing what an interrupted run left in %s", self.folder.name)
            for entry in leftovers:
                if entry.is_dir() and not entry.is_symlink():
                    disk.remove_tree(entry)
                else:
                    disk.remove_file(entry)

    def _lock(self, folder: Path) -> int:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise OutputBusyError(
                "another process is writing this output",
                where=str(self.target),
                found=f"{folder.name} is locked",
                hint="wait for it, or choose another --out",
            ) from error
        return fd

    def _is_named(self, fd: int) -> bool:
        """True if this locked folder still has the staging name: its owner may have renamed it before letting go."""
        try:
            named = os.stat(self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(fd))

    def _replace(self) -> None:
        # What is replaced gets the staging name, so it must be locked before it does.
        self._lock_fds.append(self._lock(self.target))
        if disk.exchange(self.folder, self.target):
            return
        log.warning("this file system cannot swap folders: replacing %s is not atomic", self.target.name)
        disk.rename_new(self.target, self._aside)
        try:
            disk.rename_new(self.folder, self.target)
        except BaseException:
            disk.rename_new(self._aside, self.target)
            raise
        disk.remove_tree(self._aside)

    def _recover_aside(self) -> None:
        """Where folders cannot be swapped, a run may have died between its two renames: put the old one back."""
        if not self._aside.is_dir():
            return
        if os.path.lexists(self.target):
            log.warning("clearing %s, which an interrupted run replaced", self._aside.name)
            disk.remove_tree(self._aside)
        else:
            log.warning("restoring %s, which an interrupted run had set aside", self.target.name)
            disk.rename_new(self._aside, self.target)
