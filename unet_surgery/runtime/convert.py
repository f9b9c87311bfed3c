"""``convert``: a pickle of torch becomes safetensors, opened in a process of its own that can do little else.

This process never opens the pickle. The one that does has no token of the user's in its environment, runs no code that
the file names, and writes to a file that this one puts in place, whole, once all has gone well.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.foreign import recognise
from unet_surgery.checkpoint.jsonfile import kind_of
from unet_surgery.checkpoint.target import check_space, check_target, write_target
from unet_surgery.errors import MissingExtraError, SurgeryError, TeacherError, first_few, printable

__all__ = ["ConvertResult", "convert", "default_output"]

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "TZ")
"""What the other process gets of the environment: no token, no proxy, no home."""

TAR = (257, b"ustar")


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """A finished file. ``wrapper`` are the keys that the tensors stood behind, such as ``state_dict``.

    ``dropped`` is what else was in the pickle, ``shared`` the tensors that lay in another's memory and are now written
    each by itself; both name the first 200.
    """

    file: Path
    num_tensors: int
    num_bytes: int
    wrapper: str | None
    dropped: tuple[str, ...]
    num_dropped: int
    shared: tuple[str, ...]
    num_shared: int


def convert(file: str | Path, out: str | Path | None = None, *, force: bool = False) -> ConvertResult:
    """Write the tensors of a pickle (``.ckpt``, ``.bin``, ``.pt``, ``.pth``) to ``out`` as safetensors.

    ``out`` is beside it by default, under the name that diffusers and transformers look for. Values and dtypes stay.
    A state dict is found behind ``state_dict``, or behind ``model``, ``module`` or ``ema`` if nothing else could be
    meant.

    Raises:
        TeacherError: it is no such file, is damaged, asks for code, or holds what safetensors cannot.
        OutputError: ``out`` exists (without ``force``), has no room, or cannot be written.
        MissingExtraError: torch is missing, or too old to open a pickle safely.
    """
    source = Path(file)
    size = _check_source(source)
    target = default_output(source) if out is None else Path(out)
    check_target(target, source, force=force)
    check_space(target.parent, size)
    before = source.stat()
    report: dict[str, Any] = {}

    def write(fd: int) -> None:
        report.update(_run(source, fd))
        after = source.stat()
        if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
            raise TeacherError("the file changed while it was read", where=str(source), hint="run again")

    write_target(target, write, force=force)
    return ConvertResult(
        file=target,
        num_tensors=report["num_tensors"],
        num_bytes=report["num_bytes"],
        wrapper=report["wrapper"],
        dropped=tuple(report["dropped"]),
        num_dropped=report["num_dropped"],
        shared=tuple(report["shared"]),
        num_shared=report["num_shared"],
    )


def default_output(source: Path) -> Path:
    """Return the safetensors sibling of a pickle; transformers calls its ``pytorch_model.bin`` there ``model``."""
    base = source.name.removesuffix(source.suffix) if source.suffix in PICKLES else source.name
    if base == "pytorch_model" or base.startswith(("pytorch_model.", "pytorch_model-")):
        base = base.removeprefix("pytorch_")
    return source.with_name(f"{base}.safetensors")


def _check_source(source: Path) -> int:
    """Return the file's size, if its name and its first bytes are those of a pickle."""
    if not os.path.lexists(source):
        raise TeacherError("there is no such file", where=printable(str(source)))
    try:
        status = source.stat()
    except OSError as error:
        raise TeacherError("the file cannot be opened", where=str(source), found=error.strerror) from error
    if stat.S_ISDIR(status.st_mode):
        pickles = sorted(name for name in os.listdir(source) if name.endswith(PICKLES))
        raise TeacherError(
            "this is a folder", where=str(source), expected="one file", found=first_few(pickles) or "no pickle in it"
        )
    if not stat.S_ISREG(status.st_mode):
        raise TeacherError("this is not a regular file", where=str(source), found=kind_of(status.st_mode))
    if source.name.endswith(".index.json"):
        raise _sharded(source)
    try:
        with source.open("rb") as opened:
            start = opened.read(512)
    except OSError as error:
        raise TeacherError("the file cannot be read", where=str(source), found=error.strerror) from error
    found = _not_a_pickle(start, status.st_size)
    if found is not None:
        raise TeacherError(
            "this is not a pickle of torch",
            where=str(source),
            expected="what torch.save writes",
            found=found,
            hint="there is nothing to convert" if found.startswith("a safetensors") else None,
        )
    return status.st_size


def _not_a_pickle(start: bytes, size: int) -> str | None:
    what = recognise(start[:64], size)
    if what is not None:
        return None if what.endswith("a pickle") else what
    if not start:
        return "an empty file"
    if start[8:9] == b"{":
        return "a safetensors file already"
    if start[TAR[0] : TAR[0] + len(TAR[1])] == TAR[1]:
        return "a tar archive, as torch before 0.2 wrote"
    return f"bytes that begin with {printable(start[:8])}"


def _sharded(source: Path) -> TeacherError:
    name = source.name.removeprefix("pytorch_") if source.name.startswith("pytorch_model") else source.name
    name = name.replace(".bin.index", ".safetensors.index")
    rename = "s/pytorch_model-/model-/; " if name != source.name and source.name.startswith("pytorch_") else ""
    return TeacherError(
        "this is the index of a sharded checkpoint",
        where=str(source),
        expected="one file",
        hint=f"convert each shard by itself, then: sed '{rename}s/\\.bin\"/.safetensors\"/' {source.name} > {name}",
    )


def _run(source: Path, fd: int) -> dict[str, Any]:
    """Start the other process on ``source``, and return what it reports once it has written to ``fd``."""
    words = [sys.executable, "-P", "-m", "unet_surgery.runtime.convert_child"]
    words += [os.path.realpath(source), str(fd), str(os.getpid())]
    child = subprocess.Popen(  # noqa: S603  # this Python, a module of this package, and a path
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(),
        pass_fds=(fd,),
        cwd="/",
        start_new_session=True,
    )
    try:
        output, complaints = child.communicate()
    finally:
        if child.poll() is None:  # interrupted: nothing goes on behind the user's back
            child.kill()
            child.communicate()
    return _read_report(output, complaints, child.returncode, source)


def _environment() -> dict[str, str]:
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    own = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"}
    return {**own, **fixed, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, path))}


def _read_report(output: bytes, complaints: bytes, status: int, source: Path) -> dict[str, Any]:
    try:
        report = json.loads(output) if status == 0 else None
    except ValueError:
        report = None
    if not isinstance(report, dict):
        name = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        last = complaints.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise SurgeryError(
            "the process that opens the pickle did not finish",
            where=str(source),
            found=f"{name}{f': {printable(last)}' if last else ''}",
            hint="there may be too little memory; nothing was written",
        )
    return _accept(report, source)


def _accept(report: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return a report of success; raise what one of failure says."""
    error = report.get("error")
    if error is None:
        return report
    kind, what = error.pop("kind"), error.pop("what")
    if kind == "disk":
        raise OSError(error["errno"], what)
    tree: dict[str, type[SurgeryError]] = {"file": TeacherError, "missing": MissingExtraError, "job": SurgeryError}
    if kind == "missing":
        error.setdefault("hint", "unet-surgery doctor says why; where it is missing: pip install 'unet-surgery[torch]'")
    inside = error.pop("where", None)
    raise tree[kind](what, where=f"{source}, {inside}" if inside else str(source), **error)
