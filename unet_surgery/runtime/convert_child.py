"""The process that opens a pickle: ``python -m unet_surgery.runtime.convert_child FILE DESCRIPTOR PARENT``.

It is started by :mod:`unet_surgery.runtime.convert` with nothing of the user's environment, writes a safetensors file
to an inherited descriptor, and says on stdout, in JSON, what it did or why it did not. torch's restricted unpickler
(``weights_only=True``) knows tensors and plain containers; what asks for more is refused, never run.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import re
import resource
import signal
import sys
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.header import encode_header
from unet_surgery.checkpoint.tensorfile import METADATA, OutTensor, in_file_order
from unet_surgery.errors import escaped, first_few, printable

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

__all__ = ["attempt", "main"]

SAFE_TORCH = "2.6"
"""Older ones could be made to run code in spite of ``weights_only`` (CVE-2025-32434)."""

WRAPPERS = ("model", "module", "ema")
MAX_WRAPPERS = 4
MAX_NAMES = 200
EXPANSION = 16
SPARE_BYTES = 64 << 20
TORCH_BYTES = 16 << 30
PR_SET_PDEATHSIG = 1

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


class RefusedError(Exception):
    """The file cannot be converted; the fields are those of a SurgeryError."""

    def __init__(self, what: str, kind: str = "file", **fields: str | None) -> None:
        super().__init__(what)
        self.report = {"kind": kind, "what": what, **fields}


def main(words: list[str]) -> None:
    """Convert the file named by ``words``, and report on stdout; the exit status is 0 if a report was made."""
    source, fd, parent = words[0], int(words[1]), int(words[2])
    _die_with(parent)
    channel = os.dup(1)
    os.dup2(2, 1)  # whatever libraries say is no report
    size = os.stat(source).st_size
    _limit(size)
    disk.write(channel, json.dumps(attempt(source, fd, size)).encode())


def attempt(source: str, fd: int, size: int) -> dict[str, Any]:
    """Write the tensors in the file ``source``, of ``size`` bytes, to ``fd``; return what was done, or why not."""
    try:
        return _convert(source, fd, size)
    except RefusedError as refusal:
        return {"error": refusal.report}
    except MemoryError:
        return {"error": {"kind": "job", "what": "there is not enough memory to convert the file"}}
    except OSError as error:  # of writing: what reading raises is refused above
        return {"error": {"kind": "disk", "what": error.strerror or str(error), "errno": error.errno}}


def _die_with(parent: int) -> None:
    """Ask the kernel, where it can, to end this process with the one that started it."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (AttributeError, OSError, TypeError):
        return
    if os.getppid() != parent:
        sys.exit(1)


def _limit(size: int) -> None:
    """Bound what a hostile file can take: time, memory, and what is written; no core file of somebody's weights."""
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: 600 + size // 10_000_000,
        resource.RLIMIT_FSIZE: EXPANSION * size + SPARE_BYTES,
        resource.RLIMIT_DATA: EXPANSION * size + TORCH_BYTES,
    }
    for kind, most in wanted.items():
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _convert(source: str, fd: int, size: int) -> dict[str, Any]:
    loaded = _load(source, size)
    tensors, wrapper, dropped = _unwrap(loaded)
    out = _checked(tensors, size)
    shared = _shared(tensors)
    disk.write(fd, encode_header([(t.name, t.dtype, t.shape) for t in out], METADATA))
    for tensor in out:
        _write(fd, tensors[tensor.name])
    return {
        "num_tensors": len(out),
        "num_bytes": sum(tensor.num_bytes for tensor in out),
        "wrapper": wrapper,
        "dropped": dropped[:MAX_NAMES],
        "num_dropped": len(dropped),
        "shared": shared[:MAX_NAMES],
        "num_shared": len(shared),
    }


def _can_be_mapped(source: str, size: int) -> bool:
    """True for an archive, of ``size`` bytes, whose records lie in it as they are; False for one of the old format.

    Raises:
        RefusedError: its records are implausibly larger than the archive.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
    total = sum(record.file_size for record in records)
    if total > EXPANSION * size:
        raise RefusedError(
            "the records of the archive are implausibly larger than the file",
            expected=f"at most {EXPANSION * size} bytes",
            found=f"{total} bytes",
            hint="repack it without compression if you trust it",
        )
    return bool(records) and all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _load(source: str, size: int) -> object:
    try:
        import torch
        from packaging.version import Version
    except (ImportError, RuntimeError, OSError) as error:
        raise RefusedError("torch is needed for this, and does not import", "missing", found=_line(error)) from error
    if Version(torch.__version__) < Version(SAFE_TORCH):
        raise RefusedError(
            "this torch cannot open a pickle safely",
            "missing",
            expected=f"{SAFE_TORCH} or newer",
            found=str(torch.__version__),
            hint=f"pip install 'torch>={SAFE_TORCH}'",
        )
    try:
        # torch does not look whether an archive is compressed: mapped, it takes the compressed bytes for the numbers
        return torch.load(source, map_location="cpu", weights_only=True, mmap=_can_be_mapped(source, size))
    except (MemoryError, RefusedError):
        raise
    except pickle.UnpicklingError as error:
        raise _wants_more(error) from error
    except Exception as error:  # torch raises whatever a damaged file makes it stumble over
        raise _unreadable(error) from error


def _wants_more(error: Exception) -> RefusedError:
    named = _GLOBAL.search(str(error))
    if named is None:
        return RefusedError(
            "the file is no checkpoint that torch can open without running code",
            expected="what torch.save writes of tensors",
            found=printable(_last_reason(str(error))),
        )
    return RefusedError(
        "the file asks for code to be run, which is never done",
        expected="tensors and plain containers",
        found=printable(named[1]),
        hint="ask its author for safetensors; many checkpoints hold a training state that can be left out",
    )


def _last_reason(text: str) -> str:
    """Return the line of torch's long message that says what went wrong."""
    found = re.search(r"WeightsUnpickler error: ([^\n]*)", text)
    return found[1] if found else text.partition("\n")[0]


def _unreadable(error: Exception) -> RefusedError:
    text = str(error)
    if "TorchScript" in text:
        return RefusedError("the file is a TorchScript program, not weights", hint="ask its author for the weights")
    if ".tar format" in text:
        return RefusedError(
            "the file is in the tar format of torch before 0.2", hint="save it again with a newer torch"
        )
    return RefusedError(
        "the file cannot be read: it is cut short, damaged, or something else",
        expected="what torch.save writes",
        found=f"{type(error).__name__}: {_line(error)}",
        hint="download it again",
    )


def _line(error: Exception) -> str:
    return printable(str(error).partition("\n")[0])


def _unwrap(loaded: object) -> tuple[Tensors, str | None, list[str]]:
    """Return the tensors by name, the keys that they stood behind, and the names of what else was there.

    Raises:
        RefusedError: there are no named tensors, or several sets of them.
    """
    import torch

    if not isinstance(loaded, Mapping):
        raise RefusedError("the file holds no named tensors", expected="a state dict", found=type(loaded).__name__)
    path: list[str] = []
    dropped: list[str] = []
    level: Mapping[Any, Any] = loaded
    while len(path) < MAX_WRAPPERS and (key := _wrapper(level, path)) is not None:
        dropped += [_named([*path, name]) for name in level if name != key]
        path.append(key)
        level = level[key]
    tensors = {n: t for n, t in level.items() if isinstance(n, str) and isinstance(t, torch.Tensor)}
    dropped += [_named([*path, name]) for name in level if name not in tensors]
    if not tensors:
        names = [str(name) for name in level]
        raise RefusedError(
            "the file holds no named tensors", expected="a state dict", found=first_few(names) or "nothing"
        )
    return tensors, ".".join(path) or None, dropped


def _wrapper(level: Mapping[Any, Any], path: list[str]) -> str | None:
    """Return the key behind which the tensors stand; None where they are here, or nowhere."""
    import torch

    if _holds_tensors(level.get("state_dict")):
        return "state_dict"
    inner = [key for key in WRAPPERS if _holds_tensors(level.get(key))]
    own = [str(n) for n, value in level.items() if isinstance(value, torch.Tensor) and value.dim() > 0]
    sets = [*inner, *own[:1]] if inner else []
    if len(sets) > 1:
        raise RefusedError(
            "the file holds several sets of tensors, and which is meant is not clear",
            where=f"key {_named(path)}" if path else None,
            expected="one of " + ", ".join(("state_dict", *WRAPPERS)),
            found=first_few(sets),
            hint="save the one you mean on its own",
        )
    return inner[0] if inner else None


def _holds_tensors(value: object, depth: int = 0) -> bool:
    import torch

    if not isinstance(value, Mapping) or depth >= MAX_WRAPPERS:
        return False
    return any(isinstance(item, torch.Tensor) for item in value.values()) or any(
        _holds_tensors(value.get(key), depth + 1) for key in ("state_dict", *WRAPPERS)
    )


def _named(path: list[Any]) -> str:
    return escaped(".".join(str(part) for part in path))[:MAX_NAMES]


def _checked(tensors: Tensors, size: int) -> list[OutTensor]:
    """Return what to write, in order.

    Raises:
        RefusedError: a name or a tensor cannot be stored in safetensors, or the tensors are far larger than the file.
    """
    import torch

    out = []
    for name, tensor in tensors.items():
        problem = None
        dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if not 0 < len(name) <= 512 or not name.isprintable() or name == "__metadata__":
            problem = "a name that safetensors cannot hold"
        elif tensor.is_quantized:
            problem = f"quantised ({tensor.dtype})"
        elif tensor.layout is not torch.strided or tensor.is_nested:
            problem = f"not dense ({'nested' if tensor.is_nested else tensor.layout})"
        elif tensor.device.type != "cpu":
            problem = f"without data (device {tensor.device})"
        elif dtype is None:
            problem = f"of a dtype that safetensors lacks ({tensor.dtype})"
        if problem is not None or dtype is None:
            raise RefusedError(
                "a tensor cannot be stored as safetensors",
                where=f"tensor {printable(name)}",
                expected="a dense tensor of plain numbers",
                found=problem,
            )
        out.append(OutTensor(name, dtype, tuple(tensor.shape), None))
    total = sum(tensor.num_bytes for tensor in out)
    if total > EXPANSION * size:
        raise RefusedError(
            "the tensors are implausibly larger than the file",
            expected=f"at most {EXPANSION * size} bytes",
            found=f"{total} bytes",
            hint="they show the same numbers many times over",
        )
    return in_file_order(out)


def _shared(tensors: Tensors) -> list[str]:
    """Return the names of tensors that lie in the same memory as one before them: each is written by itself."""
    seen: set[int] = set()
    names = []
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            names.append(name)
        seen.add(place)
    return names


def _write(fd: int, tensor: torch.Tensor) -> None:
    import torch

    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    disk.write(fd, memoryview(plain.reshape(-1).view(torch.uint8).numpy()))


if __name__ == "__main__":
    main(sys.argv[1:])
