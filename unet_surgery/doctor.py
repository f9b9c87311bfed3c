"""``doctor``: what is installed, what imports and why not, where files go, and what to do about what is wrong.

Nothing here imports the packages that it looks at: a child process does, one after the other, so that one that crashes
or hangs is a line of the report and not its end.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint import disk
from unet_surgery.errors import printable
from unet_surgery.hub import cache_folder
from unet_surgery.version import __version__

__all__ = ["Diagnosis", "Package", "Place", "diagnose"]

DISTRIBUTION = "unet-surgery"
TORCHVISION = "torchvision"
LOW_BYTES = 5 * 10**9  # a full-size teacher and a student
TIMEOUT_SECONDS = 180
NOT_FOR_USERS = ("dev",)

# What stands for a package's working: importing diffusers alone proves nothing, its parts are loaded when first used.
_STATEMENTS = {
    "pillow": "from PIL import Image",
    "pyyaml": "import yaml",
    "diffusers": "from diffusers import StableDiffusionPipeline, UNet2DConditionModel",
    "transformers": "from transformers import CLIPTextModel, CLIPTokenizer",
}

_MARK = "@unet-surgery@"
_PROBE = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
def say(what):
    sys.stdout.write("\\n@unet-surgery@" + json.dumps(what) + "\\n")
    sys.stdout.flush()
for name, statement in json.loads(sys.argv[1]):
    start, error = time.perf_counter(), None
    try:
        exec(statement, {})
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"
    say([name, error, time.perf_counter() - start])
try:
    torch = sys.modules.get("torch")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices += ["Apple GPU (mps)"] if torch.backends.mps.is_available() else []
    say(["devices", devices, torch.version.cuda])
except Exception:
    pass
"""


@dataclass(frozen=True, slots=True)
class Package:
    """A dependency: the extra that wants it (None: all need it), what is wanted and there, and why it fails, if so."""

    name: str
    extra: str | None
    wanted: str
    version: str | None
    error: str | None
    seconds: float | None = None

    @property
    def works(self) -> bool:
        return self.version is not None and self.error is None


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that is written to: what for, whether it can be, and the room on its disk."""

    purpose: str
    path: str
    writable: bool
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything ``doctor`` found. ``problems`` are what is broken; a missing extra is none, ``advice`` names it."""

    version: str
    python: str
    system: str
    cores: int
    devices: tuple[str, ...]
    packages: tuple[Package, ...]
    places: tuple[Place, ...]
    hub: Mapping[str, str]
    problems: tuple[str, ...]
    advice: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at this installation. Imports what is installed in a child process, which takes some seconds with torch."""
    packages, devices = _packages()
    places = tuple(_places())
    problems = [*_broken(packages), *(f"{p.path} cannot be written ({p.purpose})" for p in places if not p.writable)]
    advice = [*_missing(packages)]
    advice += [
        f"{place.path}: {place.free_bytes / 1e9:.1f} GB free ({place.purpose}); a full-size teacher takes 3.4 GB"
        for place in places
        if place.free_bytes < LOW_BYTES
    ]
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        devices=devices,
        packages=packages,
        places=places,
        hub=_hub(),
        problems=tuple(problems),
        advice=tuple(advice),
    )


def _packages() -> tuple[tuple[Package, ...], tuple[str, ...]]:
    """Return the dependencies that this package's own metadata names, and torchvision where it is installed."""
    from packaging.requirements import Requirement

    found: list[Package] = []
    wanted = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    extras = [_extra(str(requirement.marker or "")) for requirement in wanted]
    sizes = Counter(extras)
    # What an extra takes from another is listed with the smallest, and what all need before any.
    order = sorted(range(len(wanted)), key=lambda k: (extras[k] is not None, sizes[extras[k]]))
    for requirement, extra in ((wanted[k], extras[k]) for k in order):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra or ""}):
            continue  # for another system
        if extra not in NOT_FOR_USERS and not any(p.name == requirement.name for p in found):
            found.append(Package(requirement.name, extra, str(requirement.specifier), _version(requirement.name), None))
    if _version(TORCHVISION) is not None:
        found.append(Package(TORCHVISION, "not needed", "", _version(TORCHVISION), None))
    # torch first: what imports it in passing would be charged with its seconds
    results, devices = _probe(
        sorted((p.name for p in found if p.version is not None), key=lambda name: name != "torch")
    )
    return tuple(_judged(package, results) for package in found), devices


def _judged(package: Package, results: Mapping[str, tuple[str | None, float]]) -> Package:
    from packaging.specifiers import SpecifierSet

    error, seconds = results.get(package.name, (None, None))
    if error is None and package.version is not None and package.version not in SpecifierSet(package.wanted):
        error = f"version {package.version} is not {package.wanted}"
    return Package(package.name, package.extra, package.wanted, package.version, error, seconds)


def _extra(marker: str) -> str | None:
    """Return the extra that a requirement's marker names: ``extra == "torch"``."""
    _, found, rest = marker.partition("extra ==")
    return rest.strip().strip("\"'").partition('"')[0].partition("'")[0] if found else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _probe(names: Sequence[str]) -> tuple[dict[str, tuple[str | None, float]], tuple[str, ...]]:
    """Import each package in a child; one that ends the child is told from those behind it, which get another."""
    left = list(dict.fromkeys(names))
    results: dict[str, tuple[str | None, float]] = {}
    devices: tuple[str, ...] = ()
    while left:
        for name, *values in _run_probe(left):
            if name == "devices":
                cuda = f"CUDA {values[1]}" if values[1] else "no CUDA"
                devices = tuple(values[0]) or (f"CPU only (torch built with {cuda})",)
            else:
                error = None if values[0] is None else printable(values[0].partition("\n")[0])
                results[name] = (error, values[1])
        rest = [name for name in left if name not in results]
        if rest:
            results[rest[0]] = ("importing it ended the process, or took minutes", 0.0)
        left = rest[1:]
    return results, devices


def _run_probe(names: Sequence[str]) -> Iterator[list[Any]]:
    statements = [(name, _STATEMENTS.get(name, f"import {name.replace('-', '_')}")) for name in names]
    # -P: the folder that one stands in may be a downloaded model's, and what lies there is not to be imported
    command = [sys.executable, "-P", "-c", _PROBE, json.dumps(statements)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(  # noqa: S603  # our own interpreter and our own text
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS, env=environment
        )
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode("utf-8", "replace") if isinstance(error.stdout, bytes) else error.stdout or ""
    for line in output.splitlines():
        if line.startswith(_MARK):  # packages print things of their own
            yield json.loads(line.removeprefix(_MARK))


def _broken(packages: Sequence[Package]) -> Iterator[str]:
    vision = next((p for p in packages if p.name == TORCHVISION), None)
    if vision is not None and not vision.works:
        torch = _version("torch")
        yield (
            f"torchvision {vision.version} does not work beside torch {torch} ({vision.error}): it is built for another"
            " torch, and as long as it is installed it breaks transformers' CLIP and diffusers' pipelines. Nothing here"
            " needs it: pip uninstall torchvision"
        )
    for package in packages:
        if package.name == TORCHVISION or package.works:
            continue
        if package.version is not None:
            yield f"{package.name} {package.version} does not work: {package.error}"
        elif package.extra is None:
            yield f"{package.name} is not installed: pip install 'unet-surgery'"


def _missing(packages: Sequence[Package]) -> Iterator[str]:
    extras = dict.fromkeys(p.extra for p in packages if p.extra is not None and p.name != TORCHVISION)
    uses = {
        "torch": "verify and load_unet",
        "png": "draw --out picture.png",
        "evaluate": "captions of score",
        "demo": "the page of demo",
    }
    for extra in extras:
        missing = [p.name for p in packages if p.extra == extra and p.version is None]
        if missing:
            use = f" ({uses[extra]})" if extra in uses else ""
            yield f"the extra {extra}{use} lacks {', '.join(missing)}: pip install 'unet-surgery[{extra}]'"


def _places() -> Iterator[Place]:
    from huggingface_hub import constants

    for purpose, path in (
        ("students, by default", _current_folder()),
        ("built-in teachers, UNET_SURGERY_CACHE", cache_folder()),
        ("the Hub's cache, HF_HOME", Path(constants.HF_HUB_CACHE)),
    ):
        there = next(p for p in (path, *path.parents, Path("/")) if p.exists())
        yield Place(purpose, str(path), os.access(there, os.W_OK | os.X_OK), disk.free_bytes(there))


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:  # removed under the shell
        return Path(os.environ.get("PWD", "/"))


def _hub() -> dict[str, str]:
    """Return how the Hub would be reached. Whether there is a token is said; the token never is."""
    from huggingface_hub import constants, get_token

    try:
        token = get_token() is not None
    except OSError:  # HF_HOME is no folder; the table of folders says so
        token = False
    endpoint = constants.ENDPOINT
    host = endpoint.rpartition("@")[2] if "@" in endpoint else endpoint.partition("://")[2]
    return {
        "endpoint": printable(host),
        "offline": "yes (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "no",
        "token": "there is one" if token else "none: private and gated models need hf auth login",
    }
