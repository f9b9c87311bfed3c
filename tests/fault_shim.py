"""What stands between Python and the system calls that change files, and makes one of them fail.

``HOOKS`` lists where Python meets these calls, ``FAULTS`` what may happen to a call of each kind: the process is killed
before, inside (half of the bytes are written) or after it; it fails; it does less than asked; it is interrupted; it is
refused as unsupported; a signal arrives before or after it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from unet_surgery.checkpoint import disk

__all__ = ["FAULTS", "Call", "Shim", "expected"]


@dataclass(frozen=True)
class Call:
    """One call that changes a file: its number in the run, its kind, and what it was made on."""

    index: int
    kind: str
    where: str


def _kind_of_open(path: Any, flags: int, *_: Any, **__: Any) -> str | None:
    return "create" if flags & (os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_RDWR) else None


def _kind_of_fsync(fd: int) -> str:
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        return "fsync"
    return "fsync folder" if ".unet-surgery" in os.readlink(f"/proc/self/fd/{fd}") else "fsync parent"


def _kind_of_renameat2(_source: Path, _target: Path, flags: int) -> str:
    return "swap" if flags == disk.RENAME_EXCHANGE else "rename"


# Owner, name, and the kind of the call.
HOOKS: tuple[tuple[Any, str, str | Callable[..., str | None]], ...] = (
    (os, "open", _kind_of_open),
    (os, "write", "write"),
    (os, "copy_file_range", "copy"),
    (fcntl, "ioctl", "reflink"),
    (disk, "_sync_file_range", "writeback"),
    (os, "fsync", _kind_of_fsync),
    (os, "mkdir", "mkdir"),
    (os, "link", "link"),
    (disk, "_renameat2", _kind_of_renameat2),
    (os, "rename", "rename"),
    (os, "replace", "rename"),
    (os, "unlink", "unlink"),
    (os, "remove", "unlink"),
    (os, "rmdir", "rmdir"),
    *(
        (os, name, "other")  # not used today; if they are, they are swept
        for name in ("pwrite", "writev", "sendfile", "splice", "truncate", "ftruncate", "symlink", "chmod", "fchmod",
                     "chown", "utime", "mknod", "mkfifo", "posix_fallocate", "fdatasync", "setxattr")
    ),
)  # fmt: skip

KILLS = ("kill before", "kill after")
SIGNALS = ("SIGTERM before", "SIGINT after", "SIGTERM after", "SIGINT before", "SIGTERM on")
LATE = "SIGTERM after EIO"  # this call fails, and at every later one, which clears away, the signal arrives

# "on" is this call and all that follow it; ENOSPC only those that need room, ENOSYS only those of the same kind.
FAULTS: dict[str, tuple[str, ...]] = {
    "create": (*KILLS, "ENOSPC", "EIO", "EINTR", *SIGNALS, "EDQUOT", "EROFS", "EIO on", "ENOSPC on", LATE),
    "write": ("kill before", "kill inside", "ENOSPC", "short", "EINTR", "EIO", *SIGNALS, "zero", "EDQUOT", "ENOSPC on",
              LATE),
    "copy": ("kill before", "kill inside", "ENOSPC", "short", "EINTR", "EIO", *SIGNALS, "zero", "EDQUOT", "ENOSPC on",
             LATE, "ENOSYS", "EXDEV", "EINVAL", "EOPNOTSUPP", "ENOSYS on"),
    "reflink": ("kill before", "EINTR", "EIO", *SIGNALS, "ENOTTY", "EXDEV", "EINVAL", "ENOSPC"),
    "writeback": ("kill before", "EINTR", "EIO", "ENOSYS", *SIGNALS),
    "fsync": (*KILLS, "EIO", "EINTR", *SIGNALS, "ENOSPC", "EDQUOT", "EIO on", LATE),
    "fsync folder": (*KILLS, "EIO", "EINTR", *SIGNALS, "ENOSPC", "EINVAL", "EIO on", LATE),
    "fsync parent": (*KILLS, "EIO", "EINTR", *SIGNALS, "ENOSPC", "EINVAL", "EIO on"),
    "mkdir": (*KILLS, "ENOSPC", "EIO", "EINTR", *SIGNALS, "EDQUOT", "EROFS"),
    "link": (*KILLS, "ENOSPC", "EIO", "EINTR", *SIGNALS, "EMLINK", "EXDEV"),
    "rename": (*KILLS, "EIO", "EINTR", "EINTR done", *SIGNALS, "ENOSPC", "EROFS", "EIO on"),
    "swap": (*KILLS, "EIO", "EINTR", "EINTR done", *SIGNALS, "ENOSPC", "EROFS", "EIO on", "ENOSYS", "EINVAL", "EXDEV"),
    "unlink": (*KILLS, "EIO", "EINTR", *SIGNALS, "EROFS", "EIO on"),
    "rmdir": (*KILLS, "EIO", "EINTR", *SIGNALS, "EROFS", "EIO on"),
    "other": (*KILLS, "EIO", "EINTR", *SIGNALS),
}  # fmt: skip
NEED_ROOM = {"create", "write", "copy", "mkdir", "link", "other"}
REFUSALS = {"ENOSYS", "EXDEV", "EINVAL", "EOPNOTSUPP", "ENOTTY", "ENOSYS on"}
HAVE_FALLBACK = {"copy", "reflink", "swap", "fsync folder", "fsync parent"}

# Python's own report of what changes files, to find what does not come through the hooks.
AUDITED = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.setxattr", "os.posix_spawn", "os.system", "subprocess.Popen", "os.exec", "os.fork",
}  # fmt: skip


def expected(kind: str, fault: str) -> str:
    """Return how a run with this fault must end: done, failed, killed or signalled."""
    act = fault.split(maxsplit=1)[0]
    if act == "kill":
        return "killed"
    if act.startswith("SIG"):
        return "signalled"
    harmless = kind == "writeback" or act in ("short", "EINTR") or (kind == "copy" and act == "zero")
    return "done" if harmless or (fault in REFUSALS and kind in HAVE_FALLBACK) else "failed"


@dataclass
class Shim:
    """Takes the hooks' places with ``install``, in a child; does ``fault`` at call number ``index``.

    ``swap`` False is a system without renameat2. ``on_first`` is called before the first call of all.
    """

    swap: bool = True
    index: int = -1
    fault: str = ""
    on_first: Callable[[], object] | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    inside: bool = False

    def install(self) -> None:
        # Small, so that what is done for gigabytes is done for small teachers too.
        disk.CHUNK_BYTES, disk.BUFFER_BYTES, disk.WRITEBACK_BYTES = 1 << 15, 1 << 13, 1 << 15
        for owner, name, kind in HOOKS:
            real = getattr(owner, name)
            if name == "fsync":
                real = _no_fsync
            elif name == "_renameat2" and not self.swap:
                real = _refuse
            setattr(owner, name, self._hook(real, kind))

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook: note what changes a file and does not come through the hooks."""
        if self.inside:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and path != os.devnull:
                self.strays.append(f"open {path}")
        elif event in AUDITED:
            self.strays.append(f"{event} {args}")

    def _hook(self, real: Callable[..., Any], kind: str | Callable[..., str | None]) -> Callable[..., Any]:
        def hooked(*args: Any, **kwargs: Any) -> Any:
            found = kind if isinstance(kind, str) else kind(*args, **kwargs)
            if found is None or self.inside:
                return real(*args, **kwargs)
            self.inside = True
            try:
                if self.on_first is not None and not self.calls:
                    self.on_first()
                self.calls.append((found, _where(args)))
                if self._is_hit(found):
                    return self._do(found, lambda *a: real(*(a or args), **kwargs), args)
                return real(*args, **kwargs)
            finally:
                self.inside = False

        return hooked

    def _is_hit(self, kind: str) -> bool:
        number, act = len(self.calls) - 1, self.fault.split()
        if number <= self.index or not (self.fault == LATE or self.fault.endswith(" on")):
            return number == self.index
        return {"ENOSPC": kind in NEED_ROOM, "ENOSYS": kind == self.calls[self.index][0]}.get(act[0], True)

    def _do(self, kind: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Do the fault; ``real`` makes the call, with other arguments if it is given any."""
        act, _, how = self.fault.partition(" ")
        if self.fault == LATE:
            act, how = ("EIO", "") if len(self.calls) - 1 == self.index else ("SIGTERM", "before")
        if act == "zero":
            return 0
        if act == "short":
            return real(*_half(kind, args))
        if how == "inside":
            real(*_half(kind, args))
        done = _attempt(real) if how in ("after", "done") else real
        if act.startswith("E"):
            raise _os_error(act)
        os.kill(os.getpid(), signal.SIGKILL if act == "kill" else signal.Signals[act])
        return done()  # the signal's handler did not raise


def _attempt(call: Callable[[], Any]) -> Callable[[], Any]:
    """Make a call now; return what gives its result, or raises its error, later."""
    try:
        result = call()
    except OSError as error:
        failure = error
    else:
        return lambda: result

    def fail() -> NoReturn:
        raise failure

    return fail


def _half(kind: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a write or a copy for half of its bytes."""
    if kind == "write":
        fd, data = args
        return fd, data[: len(data) // 2]
    source, target, count, offset = args
    return source, target, count // 2, offset


def _where(args: tuple[Any, ...]) -> str:
    names = []
    for arg in args[:2]:
        try:
            path = os.readlink(f"/proc/self/fd/{arg}") if isinstance(arg, int) else arg
        except OSError:
            continue
        if isinstance(path, str | Path):
            names.append(Path(path).name)
    return " → ".join(names)


def _os_error(name: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


def _refuse(*_: object) -> NoReturn:
    raise _os_error("ENOSYS")


def _no_fsync(_: int) -> None:
    """Nothing: a killed process loses nothing that the kernel has, and waiting for the disk is most of the time."""
