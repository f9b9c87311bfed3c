"""A folder that appears whole or not at all.

Everything is written into a sibling, ``.NAME.unet-surgery``, which is locked while a process works in it;
one rename puts it in place. A sibling left by a process that died is cleared by the next run.

Where folders cannot be swapped, ``.NAME.replaced.unet-surgery`` holds the old one between the two renames of a
replacement; the next run puts it back if the process died there.
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
from unet_surgery.checkpoint.interrupts import Interrupts
from unet_surgery.errors import OutputBusyError, OutputError, SurgeryError

__all__ = ["Staging"]

log = logging.getLogger(__name__)

SUFFIX = ".unet-surgery"


class Staging:
    """A context manager: write below ``folder``, then :meth:`commit`; anything else leaves nothing behind.

    An existing target is replaced only with ``replace``, which is called with it and raises if it must stay.
    A signal whose handler raises unwinds it as an error does, but waits while names are changed and folders removed.

    Raises:
        OutputError: the target exists, cannot be created, or another process is writing it; or something is left that
            could not be removed, and then the message says where.
    """

    def __init__(self, target: Path, *, replace: Callable[[Path], None] | None = None) -> None:
        self.target = Path(os.path.abspath(target))
        self.replace = replace
        self.folder = self.target.parent / f".{self.target.name}{SUFFIX}"
        self._aside = self.target.parent / f".{self.target.name}.replaced{SUFFIX}"
        self._is_placed = self._is_aside = False
        self._lock_fds: list[int] = []
        self._interrupts = Interrupts()

    def __enter__(self) -> Staging:
        try:
            self._interrupts.attach()
            self.refuse_early()
            self._interrupts.hold()  # until the lock is held, nobody could tell whose folder it is
            self._make_folder()
            self._recover_aside()
            self._interrupts.pause()
            self._clear_leftovers()
            self._check_target()  # now that nobody else can put one there
            return self
        except BaseException as error:
            self._leave(error)
            if isinstance(error, OSError):
                raise OutputError(
                    "the output folder cannot be made", where=str(self.target), found=_why(error)
                ) from error
            raise

    def commit(self) -> None:
        """Force the staged folders to disk and put the whole in place."""
        for root, _, _ in os.walk(self.folder, topdown=False):
            disk.fsync_folder(Path(root))
        self._interrupts.hold()
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
        self._is_placed = True
        try:
            disk.fsync_folder(self.target.parent)
        except OSError as error:
            raise OutputError(
                "the output is in place and whole, but the disk did not confirm its name",
                where=str(self.target),
                found=_why(error),
                hint="check the disk; after a power cut the output may be gone",
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error)
        if isinstance(error, OSError):
            kept = "what was there is as it was" if os.path.lexists(self.target) else "nothing was left at its path"
            raise OutputError(
                f"the output could not be written; {kept}", where=str(self.target), found=_why(error)
            ) from error

    def _leave(self, error: BaseException | None) -> None:
        """Remove what is not the output, let go of the locks, let signals through. ``error`` is already on its way."""
        self._interrupts.hold()
        try:
            self._remove_rest(error)
        finally:
            while self._lock_fds:
                os.close(self._lock_fds.pop())
            self._interrupts.release()

    def _remove_rest(self, error: BaseException | None) -> None:
        """Remove what was staged or, once the output is in place, what it replaced."""
        try:
            if self._is_aside:
                self._remove_aside()
            if any(self._is_named(fd) for fd in self._lock_fds):  # else it is renamed, or another process's
                disk.remove_tree(self.folder)
        except OSError as failure:
            rest = self._aside if self._is_aside else self.folder
            if error is not None:  # which is what must be heard of
                log.warning("%s could not be removed (%s); the next run does", rest, _why(failure))
                return
            raise OutputError(
                "the output is in place and whole, but what it replaced could not be removed"
                if self._is_placed
                else "what was staged could not be removed",
                where=str(rest),
                found=_why(failure),
                hint="remove it yourself; or the next run with this output and --force does",
            ) from failure

    def _remove_aside(self) -> None:
        try:
            # A half-removed folder must not look like one that was set aside and may be put back.
            disk.rename_new(self._aside, self.folder)
        except FileExistsError:  # another process begins; it will find this one locked
            disk.remove_tree(self._aside)
        self._is_aside = False

    def refuse_early(self) -> None:
        """Refuse before anything is made, or fetched for minutes.

        If another run's folders are there, what is seen may be about to change, and nothing is refused yet.
        """
        try:
            self._check_target()
        except (OSError, SurgeryError):
            if os.path.lexists(self.folder) or os.path.lexists(self._aside):
                return  # its lock tells, and then the target is checked again
            self._check_target()  # it may have finished just now

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
        """Make the staging folder, or take a dead run's, and lock it; refuse a living one's."""
        while not self._lock_fds:
            is_new = False
            with contextlib.suppress(FileExistsError):
                disk.make_folder(self.folder)
                is_new = True
            try:
                fd = self._lock(self.folder)
            except FileNotFoundError:
                continue  # its owner finished just now
            except OSError:
                if is_new:
                    disk.remove_folder(self.folder)
                raise
            self._lock_fds.append(fd)
            if not self._is_named(fd):
                os.close(self._lock_fds.pop())

    def _clear_leftovers(self) -> None:
        leftovers = list(self.folder.iterdir())
        if not leftovers:
            return
        log.warning("clearing what an interrupted run left in %s", self.folder.name)
        try:
            for entry in leftovers:
                if entry.is_dir() and not entry.is_symlink():
                    disk.remove_tree(entry)
                else:
                    disk.remove_file(entry)
        except OSError as error:
            raise OutputError(
                "what an interrupted run left cannot be cleared",
                where=str(self.folder),
                found=_why(error),
                hint="run again, or remove it yourself",
            ) from error

    def _lock(self, folder: Path) -> int:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise OutputBusyError(
                "another process is writing this output",
                where=str(self.target),
                found=f"{folder.name} is locked",
                hint="wait for it, or choose another --out",
            ) from error
        except BaseException:
            os.close(fd)
            raise
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
        except OSError:
            self._put_back()
            raise
        self._is_aside = True

    def _put_back(self) -> None:
        try:
            disk.rename_new(self._aside, self.target)
        except OSError as error:
            raise OutputError(
                "the output could not be put in place, nor the old one put back",
                where=str(self._aside),
                found=_why(error),
                hint=f"this is the old one: the next run puts it back, or rename it to {self.target.name} yourself",
            ) from error

    def _recover_aside(self) -> None:
        """Where folders cannot be swapped, a run may have died between its renames: put the old one back, or clear it.

        The staging folder is locked, so nobody else does the same; the folder set aside is locked if its run lives.
        """
        if not self._aside.is_dir():
            return
        fd = self._lock(self._aside)
        try:
            if os.path.lexists(self.target):
                disk.rename_new(self._aside, self.folder / self._aside.name)  # cleared with what else is left
            else:
                log.warning("restoring %s, which an interrupted run had set aside", self.target.name)
                disk.rename_new(self._aside, self.target)
        except OSError as error:
            raise OutputError(
                "what an interrupted run set aside cannot be put back or cleared",
                where=str(self._aside),
                found=_why(error),
                hint=f"run again; or rename it to {self.target.name} yourself, or remove it",
            ) from error
        finally:
            os.close(fd)


def _why(error: OSError) -> str:
    return error.strerror or str(error)
