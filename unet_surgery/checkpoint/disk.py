"""Every call that changes a file goes through this module, so that one shim can fail each of them in tests.

Loops honour short counts, and a call that a signal interrupts is made again. Modes are left to the umask.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

__all__ = [
    "OnBytes",
    "Progress",
    "copy_file",
    "copy_range",
    "counting",
    "create",
    "exchange",
    "free_bytes",
    "fsync",
    "fsync_folder",
    "hard_link",
    "make_folder",
    "make_folders",
    "open_for_update",
    "remove_file",
    "remove_folder",
    "remove_tree",
    "rename_new",
    "replace_file",
    "start_writeback",
    "sync_all",
    "truncate",
    "write",
    "write_at",
    "write_file",
]

CHUNK_BYTES = 8 << 20
WRITEBACK_BYTES = 32 << 20
BUFFER_BYTES = 1 << 20
FICLONE = 0x40049409
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
SYNC_FILE_RANGE_WRITE = 2
AT_FDCWD = -100

P = ParamSpec("P")
R = TypeVar("R")

# What says "this file system or kernel can't do that here", not "that failed".
UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.ENOTTY,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EXDEV,
    errno.ETXTBSY,
}

OnBytes = Callable[[int], None]
"""Called with the number of bytes just written."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def counting(progress: Progress, total: int, done: int = 0) -> OnBytes:
    """Return a callback that adds up the bytes it is told of, and passes them on with the ``total``."""

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return on_bytes


def _ignore(_: int) -> None:
    pass


def _again(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Make a call, again when a signal interrupts it: Python itself does so for some calls only (PEP 475)."""
    while True:
        with contextlib.suppress(InterruptedError):
            return call(*args, **kwargs)


def create(path: Path) -> int:
    """Create ``path``, which must not exist, and return a descriptor open for writing."""
    return _again(os.open, path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)


def open_for_update(path: Path) -> int:
    """Return a descriptor of ``path`` open for reading and writing; an empty file is made where there is none."""
    return _again(os.open, path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def truncate(fd: int, num_bytes: int) -> None:
    """Give a file this size; what is added to it is a hole, read as zeros."""
    _again(os.ftruncate, fd, num_bytes)


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Write all of ``data`` at ``offset``, wherever the descriptor stands."""
    view = memoryview(data)
    while view:
        count = _again(os.pwrite, fd, view, offset)
        if count == 0:
            raise OSError(errno.EIO, "the disk takes no more bytes, and does not say why")
        view, offset = view[count:], offset + count


def write(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data``."""
    view = memoryview(data)
    while view:
        count = _again(os.write, fd, view)
        if count == 0:
            raise OSError(errno.EIO, "the disk takes no more bytes, and does not say why")
        view = view[count:]


def write_file(path: Path, data: bytes) -> None:
    """Write a new small file and force it to disk."""
    fd = create(path)
    try:
        write(fd, data)
        fsync(fd)
    finally:
        os.close(fd)


def fsync(fd: int) -> None:
    """Force a file's bytes to the disk."""
    _again(os.fsync, fd)


def fsync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, where its file system knows how to (network ones do not all)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def sync_all() -> None:
    """Force all that was written to the disks: for so many small files that an fsync of each would take hours."""
    os.sync()


def copy_range(source_fd: int, offset: int, length: int, target_fd: int, on_bytes: OnBytes = _ignore) -> None:
    """Append ``length`` bytes of ``source_fd`` from ``offset`` to ``target_fd``, in the kernel where it can.

    The disk starts to write while copying goes on, so that little is left for the fsync that follows.

    Raises:
        EOFError: the source ends early.
    """
    unsent = 0
    while length:
        try:
            count = _again(os.copy_file_range, source_fd, target_fd, min(length, CHUNK_BYTES), offset)
        except AttributeError:
            break
        except OSError as error:
            if error.errno in UNSUPPORTED:
                break
            raise
        if count == 0:
            break  # the end, or a file system that cannot: reading tells
        offset, length, unsent = offset + count, length - count, unsent + count
        on_bytes(count)
        if unsent >= WRITEBACK_BYTES:
            start_writeback(target_fd)
            unsent = 0
    while length:
        data = os.pread(source_fd, min(length, BUFFER_BYTES), offset)
        if not data:
            raise EOFError
        write(target_fd, data)
        offset, length = offset + len(data), length - len(data)
        on_bytes(len(data))


def start_writeback(fd: int) -> None:
    """Ask the kernel to start writing a file's changed pages, without waiting; a hint, so nothing can fail."""
    with contextlib.suppress(OSError):
        _sync_file_range(fd, SYNC_FILE_RANGE_WRITE)


def copy_file(source: Path, target: Path, on_bytes: OnBytes = _ignore) -> None:
    """Copy a file byte for byte and force it to disk; shares its blocks where the file system can (reflink)."""
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target_fd = create(target)
        try:
            size = os.fstat(source_fd).st_size
            try:
                _again(fcntl.ioctl, target_fd, FICLONE, source_fd)
                on_bytes(size)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                copy_range(source_fd, 0, size, target_fd, on_bytes)
            fsync(target_fd)
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def hard_link(source: Path, target: Path) -> None:
    """Give the file behind ``source`` a second name; ``source`` may be a symbolic link to it."""
    _again(os.link, os.path.realpath(source), target)


def make_folder(path: Path) -> None:
    """Create one folder."""
    _again(os.mkdir, path)


def make_folders(path: Path) -> None:
    """Create a folder and what is missing above it; nothing is done where it exists."""
    _again(os.makedirs, path, exist_ok=True)


def rename_new(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``, atomically.

    Raises:
        FileExistsError: ``target`` exists.
    """
    try:
        _rename(source, target, lambda: _renameat2(source, target, RENAME_NOREPLACE))
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        _rename(source, target, lambda: os.rename(source, target))


def exchange(source: Path, target: Path) -> bool:
    """Swap the two names atomically; False where the system cannot (nothing has happened then)."""
    try:
        _rename(source, target, lambda: _renameat2(source, target, RENAME_EXCHANGE))
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it; nothing is done where there is none."""
    while os.path.lexists(path):
        # Somebody else may remove the same, or a signal interrupt it: both leave less to do.
        with contextlib.suppress(FileNotFoundError, InterruptedError):
            shutil.rmtree(path)


def remove_file(path: Path) -> None:
    """Remove one file or link."""
    _again(os.unlink, path)


def remove_folder(path: Path) -> None:
    """Remove one empty folder."""
    _again(os.rmdir, path)


def replace_file(path: Path, content: bytes | Callable[[int], None], *, force: bool = False) -> None:
    """Write a file that is there whole or not at all, by way of a locked sibling ``.NAME.unet-surgery``.

    ``content`` is what the file holds, or a function that writes it to the descriptor it is given.

    What a dead run left of that name is written over. With ``force`` an existing file, or the link to one, is replaced.

    Raises:
        FileExistsError: ``path`` exists, without ``force``.
        BlockingIOError: another process is writing it.
    """
    staged = path.parent / f".{path.name}.unet-surgery"
    fd = _open_alone(staged)
    try:
        try:
            truncate(fd, 0)
            if isinstance(content, bytes):
                write(fd, content)
            else:
                content(fd)
            fsync(fd)
            if force:
                _rename(staged, path, lambda: os.replace(staged, path))
            else:
                rename_new(staged, path)
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong before is what must be heard of
                remove_file(staged)
            raise
    finally:
        os.close(fd)
    fsync_folder(path.parent)


def _open_alone(path: Path) -> int:
    """Open ``path`` for writing and lock it, making it where it is missing."""
    while True:
        fd = _again(os.open, path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
                return fd
        except FileNotFoundError:
            pass  # its owner put it in place or removed it between opening and locking
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def free_bytes(folder: Path) -> int:
    """Return how many bytes may still be written to the file system of ``folder``."""
    return shutil.disk_usage(folder).free


def _rename(source: Path, target: Path, call: Callable[[], None]) -> None:
    """Make ``call``, which renames; again when a signal interrupts it, but not if it was done all the same.

    (A network file system may do it and then report the interruption. To swap twice is not to swap at all.)
    """
    moved = os.lstat(source)
    while True:
        try:
            return call()
        except InterruptedError:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(moved, os.lstat(target)):
                    return None


def _renameat2(source: Path, target: Path, flags: int) -> None:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source), None, str(target))


def _sync_file_range(fd: int, flags: int) -> None:
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (AttributeError, OSError, TypeError):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if call(ctypes.c_int(fd), ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(flags)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
