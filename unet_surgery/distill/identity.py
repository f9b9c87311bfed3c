"""What a run depends on, by content: so that a resume notices when teacher, student or data became others."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unet_surgery.checkpoint.check import unet_folder
from unet_surgery.checkpoint.student import CONFIG, PLAN
from unet_surgery.distill.config import RunConfig
from unet_surgery.distill.networks import Folders
from unet_surgery.errors import RunError, brief

__all__ = ["breaking_changes", "fingerprint", "flat", "identity", "refuse_changes"]

NUM_SAMPLES = 64
SAMPLE_BYTES = 64 << 10

# What may change between two parts of a run: it moves nothing but rounding, time, memory or what is shown.
FREE = {"output", "micro_batch", "save", "log", "pictures", "trouble"}
FREE_BELOW = {
    "speed": {"compile", "channels_last", "autotune", "deterministic", "checkpointing"},
    "data": {"workers", "max_bad"},
}
# Folders may be moved: what is in them is compared.
BY_CONTENT = {"student", "base"}
DATA_BY_CONTENT = {"cache", "images"}


def fingerprint(folder: Path) -> str:
    """Return a digest of the configs and weights in a folder: of each weights file, 64 samples of 64 KiB.

    Two finetunes of one architecture have equal headers and sizes; hashing all their gigabytes would cost more than
    some runs' first hundred steps. The text of a tokenizer is among what is looked at.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= NUM_SAMPLES * SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for i in range(NUM_SAMPLES):
                file.seek((size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def identity(config: RunConfig, folders: Folders, data: str) -> dict[str, Any]:
    """Return what a run depends on beside its run file, as JSON data."""
    student = unet_folder(folders.student)
    parts = [folders.base / part for part in ("text_encoder", "tokenizer", "scheduler")]
    parts += [folders.base / "vae"] if config.data.images is not None else []  # a cache says its own VAE
    is_new = config.init == "random"
    return {
        "student": _of_file(student / CONFIG) if is_new else fingerprint(student),
        "plan": _of_file(folders.student / PLAN),
        "base": [fingerprint(part) for part in parts],
        "teachers": [None if folder is None else fingerprint(unet_folder(folder)) for folder in folders.teachers],
        "data": data,
    }


def _of_file(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def breaking_changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys of two resolved runs that differ where a resume would be another run: key → (before, after)."""
    old, new = flat(_pinned(before)), flat(_pinned(after))
    missing = "(absent)"
    pairs = {key: (old.get(key, missing), new.get(key, missing)) for key in sorted(old.keys() | new.keys())}
    return {key: both for name, pair in pairs.items() for key, both in _differing(name, *pair).items()}


def _differing(key: str, old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Return what of a key differs: of two lists of one length, such as the hashes of the parts, only those values."""
    if old == new:
        return {}
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return {f"{key}.{i}": pair for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]}
    return {key: (old, new)}


def refuse_changes(before: dict[str, Any], after: dict[str, Any], where: str) -> None:
    """Refuse to continue a run as another one. Keys that an older version did not know count as their defaults.

    Raises:
        RunError: names the keys that differ, with both values.
    """
    known = {key: value for key, value in before.items() if key != "identity"}
    with contextlib.suppress(ValidationError):  # then its keys differ, and are named
        before = {**before, **RunConfig.model_validate(known).model_dump(mode="json")}
    changes = breaking_changes(before, after)
    if any(key.startswith("data.") for key in changes):
        changes.pop("identity.data", None)  # other data is other content: the keys say more
    if changes:
        shown = "; ".join(f"{key}: {brief(old)} → {brief(new)}" for key, (old, new) in list(changes.items())[:6])
        raise RunError(
            f"the run in this folder was begun with other settings ({len(changes)} differ{'s' * (len(changes) == 1)})",
            where=where,
            expected="the settings it was begun with",
            found=shown,
            hint="undo the change, or choose another output: for a new run",
        )


def _pinned(run: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in run.items() if key not in FREE | BY_CONTENT}
    below = {**FREE_BELOW, "data": FREE_BELOW["data"] | DATA_BY_CONTENT}
    for key, names in below.items():
        kept[key] = {name: value for name, value in run.get(key, {}).items() if name not in names}
    stages = [{key: value for key, value in stage.items() if key != "teacher"} for stage in run.get("stages", ())]
    if stages and stages[-1].get("optimizer", {}).get("schedule") == "constant":
        del stages[-1]["steps"]  # a run may be made longer where nothing depends on where it ends
    return {**kept, "stages": stages}


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested data as dotted keys; only lists that hold no mappings remain lists."""
    if isinstance(data, dict):
        return {k: v for name, value in data.items() for k, v in flat(value, f"{prefix}{name}.").items()}
    if isinstance(data, list) and any(isinstance(item, dict) for item in data):
        return {k: v for i, item in enumerate(data) for k, v in flat(item, f"{prefix}{i}.").items()}
    return {prefix.removesuffix("."): data}
