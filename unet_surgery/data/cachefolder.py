"""A latent cache's folder: what lies in it while it is made, and what it is when it is whole.

While it is made, ``.unfinished`` holds the settings, and a file for each shard that is finished, so a run that was
killed goes on where it was. Whoever finds all shards finished writes the indices, and cache.json last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.target import check_apart
from unet_surgery.data.arrowfile import dataset_info, dataset_state
from unet_surgery.data.cacheplan import (
    FORMAT,
    BadSample,
    CacheFacts,
    CacheSettings,
    ShardFacts,
    check_same,
    shard_name,
    shard_ranges,
)
from unet_surgery.errors import DataError, OutputBusyError, OutputError, SurgeryError, printable

__all__ = [
    "CACHE_FILE",
    "UNFINISHED",
    "bad_counts",
    "begin_cache",
    "check_output",
    "finish_cache",
    "finish_shard",
    "finished_shards",
    "read_facts",
    "writing",
]

CACHE_FILE = "cache.json"
UNFINISHED = ".unfinished"
SETTINGS_FILE = "settings.json"
QUARANTINE = "quarantine.jsonl"
BUSY_TRIES = 100
MAX_CACHE_JSON_BYTES = 64 << 20


def check_output(out: Path, *inputs: Path) -> None:
    """Raise OutputError if ``out`` is something other than a cache or an empty folder, or not apart from ``inputs``."""
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError("the output path is a file", where=str(out), hint="choose another --out")
    if not out.parent.is_dir():
        raise OutputError(
            "the folder that should hold the output does not exist",
            where=str(out.parent),
            hint=f"mkdir -p {out.parent}",
        )
    is_ours = any((out / name).exists() for name in (CACHE_FILE, UNFINISHED))
    if out.is_dir() and any(out.iterdir()) and not is_ours:
        raise OutputError(
            "the output folder holds something else than a cache", where=str(out), hint="choose another --out"
        )
    for folder in inputs:
        if folder.is_dir():
            check_apart(out, folder, "input")


def begin_cache(out: Path, settings: CacheSettings) -> bool:
    """Make the folder, or find that it is ours; True if the cache is finished already.

    Raises:
        OutputError: it holds a cache of other settings, its settings are damaged, or it cannot be written.
        OutputBusyError: another process holds the file of the settings.
    """
    unfinished = out / UNFINISHED
    last: BaseException | None = None
    for _ in range(BUSY_TRIES):
        if (out / CACHE_FILE).is_file():
            check_same(read_facts(out).settings, settings, str(out))
            if unfinished.is_dir():  # its last run died between writing cache.json and removing this
                disk.remove_tree(unfinished)
            return True
        try:
            disk.make_folders(unfinished)
            with contextlib.suppress(FileExistsError):
                disk.replace_file(unfinished / SETTINGS_FILE, json.dumps(settings.to_json(), indent=2).encode())
            there = read_object(unfinished / SETTINGS_FILE)
        except (BlockingIOError, FileNotFoundError, SurgeryError) as error:  # another begins, or finishes, just now
            last = error
            time.sleep(0.1)
            continue
        except OSError as error:
            raise OutputError("the cache cannot be written", where=str(out), found=error.strerror) from error
        try:
            check_same(CacheSettings.from_json(there), settings, str(out))
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(unfinished, printable(repr(error))) from error
        return False
    if isinstance(last, SurgeryError):  # nobody holds it, or it would be locked
        raise _damaged(unfinished, f"{last.what}: {last.found}") from last
    raise OutputBusyError("another process is writing this cache", where=str(out), hint="wait for it")


def _damaged(unfinished: Path, found: str) -> OutputError:
    return OutputError(
        "the settings of this unfinished cache are damaged",
        where=str(unfinished / SETTINGS_FILE),
        found=found,
        hint="remove the cache's folder, and make it anew",
    )


def finish_shard(out: Path, name: str, facts: ShardFacts) -> None:
    """Note that a shard is there whole."""
    disk.replace_file(out / UNFINISHED / f"{name}.json", json.dumps(facts.to_json()).encode(), force=True)


def finished_shards(out: Path, settings: CacheSettings) -> dict[str, ShardFacts]:
    """Return the shards that are there whole, in order."""
    num_shards = len(shard_ranges(settings.num_samples, settings.shard_samples))
    done = {}
    for index in range(num_shards):
        name = shard_name(index, num_shards)
        try:
            facts = ShardFacts.from_json(json.loads((out / UNFINISHED / f"{name}.json").read_bytes()))
            if os.stat(out / name).st_size == facts.num_bytes:
                done[name] = facts
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return done


def finish_cache(out: Path, facts: CacheFacts, shards: Mapping[str, ShardFacts]) -> None:
    """Write the indices; cache.json, which says that all is there, is the last. Another process may do the same."""
    unfinished = out / UNFINISHED
    quarantine = "".join(_line(bad) for shard in shards.values() for bad in shard.bad)
    fingerprint = next(iter(facts.shards.values())).sha256[:16]
    files = {
        QUARANTINE: quarantine,
        "dataset_info.json": _json(dataset_info(facts.settings)),
        "state.json": _json(dataset_state(list(facts.shards), fingerprint)),
        CACHE_FILE: _json(facts.to_json()),
    }
    with writing(out), contextlib.ExitStack() as stack:
        try:
            lock = disk.open_for_update(unfinished / "lock")
        except FileNotFoundError:  # another process has finished
            return
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / CACHE_FILE).is_file():
            for name, content in files.items():
                disk.replace_file(out / name, content.encode("utf-8"), force=True)
            for name in shards.keys() - facts.shards.keys():  # without a row
                disk.remove_file(out / name)
        disk.remove_tree(unfinished)


def read_facts(folder: Path) -> CacheFacts:
    """Return what cache.json says.

    Raises:
        DataError: it is not there, because the cache is unfinished or no cache; or it is damaged.
    """
    path = folder / CACHE_FILE
    if not path.is_file():
        is_begun = (folder / UNFINISHED).is_dir()
        raise DataError(
            "the cache is not finished" if is_begun else "this is not a latent cache",
            where=str(folder),
            expected=CACHE_FILE,
            hint="run the same unet-surgery cache command again: it goes on where it was"
            if is_begun
            else "make one: unet-surgery cache SOURCE --model MODEL --out FOLDER",
        )
    try:
        data = read_object(path, MAX_CACHE_JSON_BYTES)
        if (version := data["settings"]["format"]) != FORMAT:
            raise DataError(
                "this cache is of another version", where=str(path), found=printable(version), hint="make it again"
            )
        return CacheFacts.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError("cache.json is damaged", where=str(path), found=printable(repr(error))) from error
    except SurgeryError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(error.what, where=error.where, found=error.found) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise what goes wrong with writing ``path`` as OutputError."""
    try:
        yield
    except BlockingIOError as error:
        raise OutputBusyError(
            "another process is writing this part of the cache", where=str(path), hint="wait for it"
        ) from error
    except OSError as error:
        raise OutputError(
            "the cache cannot be written; what is finished stays, and the same command goes on with it",
            where=str(path),
            found=error.strerror or str(error),
        ) from error


def bad_counts(shards: Mapping[str, ShardFacts]) -> Counter[str]:
    """Return how many samples were left out of these shards, by reason."""
    return Counter(bad.reason for shard in shards.values() for bad in shard.bad)


def _line(bad: BadSample) -> str:
    return json.dumps({"id": bad.id, "reason": bad.reason, "found": bad.found}) + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
