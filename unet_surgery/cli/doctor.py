"""``unet-surgery doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from unet_surgery.cli.options import Json
from unet_surgery.cli.sink import command, show, show_json, table

if TYPE_CHECKING:
    from unet_surgery.doctor import Diagnosis, Package

__all__ = ["doctor"]


@command
def doctor(as_json: Json = False) -> None:
    """Look at this installation: versions, what imports and why not, caches, disk, and what to install.

    Takes some seconds where torch is installed, because it is imported. Exits with 1 if something is broken; an
    extra that is not installed is not.

    Example: unet-surgery doctor
    """
    from dataclasses import asdict

    from unet_surgery.doctor import diagnose

    found = diagnose()
    if as_json:
        show_json(asdict(found))
    else:
        _show(found)
    if found.problems:
        raise typer.Exit(1)


def _show(found: Diagnosis) -> None:
    from unet_surgery.cli.format import gigabytes

    show(f"unet-surgery {found.version}, Python {found.python}, {found.system}, {found.cores} cores")
    if found.devices:
        show("torch computes on: " + ", ".join(found.devices))
    rows = [(p.name, p.extra or "always", p.wanted, p.version or "–", _state(p)) for p in found.packages]
    show(table(("package", "for", "wanted", "installed", ""), rows))
    places = [(p.path, p.purpose, "yes" if p.writable else "no", gigabytes(p.free_bytes)) for p in found.places]
    show(table(("folder", "what for", "can be written", "free"), places, right=(3,)))
    show("Hub: " + ", ".join(f"{key} {value}" for key, value in found.hub.items()))
    for line in found.advice:
        show(f"note: {line}")
    for line in found.problems:
        show(f"broken: {line}")
    if not found.problems:
        show("nothing is broken")


def _state(package: Package) -> str:
    if package.version is None:
        return "not installed"
    if package.error is not None:
        return package.error
    return "works" if package.seconds is None else f"works, imported in {package.seconds:.1f} s"
