"""Who draws: a model's U-Net with the parts of its own pipeline, or of another's, ready on a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unet_surgery.checkpoint.check import unet_folder
from unet_surgery.checkpoint.components import INDEX
from unet_surgery.checkpoint.disk import Progress
from unet_surgery.checkpoint.identity import network_sha256, tokenizer_sha256, vae_sha256
from unet_surgery.errors import UsageError, printable
from unet_surgery.hub import fetch_teacher, resolve_teacher
from unet_surgery.hub.open import open_resolved
from unet_surgery.runtime.load import load_unet
from unet_surgery.runtime.parts import Parts, load_parts
from unet_surgery.sample.draw import check_conditions

__all__ = ["DTYPES", "Drawer", "choose_dtype", "default_dtype", "load_drawer"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Drawer:
    """A model that draws. ``identity`` is what generation.json says of it: names, and hashes of contents."""

    name: str
    unet: Any
    parts: Parts
    identity: dict[str, Any]

    @property
    def parameters(self) -> int:
        """How many the U-Net has."""
        return sum(parameter.numel() for parameter in self.unet.parameters())


def default_dtype(device: torch.device) -> str:
    """Return the name of the dtype that a device draws in where none is asked for: half the bits on CUDA alone."""
    return "fp16" if device.type == "cuda" else "fp32"


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype that is asked for by ``name``; that of :func:`default_dtype` if None.

    Raises:
        UsageError: there is none of that name.
    """
    if name is not None and name not in DTYPES:
        raise UsageError("there is no such dtype", expected=", ".join(DTYPES), found=printable(name))
    return DTYPES[name or default_dtype(device)]


def load_drawer(
    model: str,
    base: str | None,
    *,
    fallback: str | None = None,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    channels_last: bool = False,
    hashed: bool = True,
    fetching: Progress | None = None,
) -> Drawer:
    """Load a pipeline, or a U-Net alone with the other parts of the pipeline ``base``; ``base`` wins over own parts.

    ``fallback`` brings the parts where neither does. Not ``hashed``, its identity is names and a count alone: hashes
    are of all the weights, and reading these once more takes as long as loading. ``fetching`` is called with the bytes
    that came from the Hub, and all that are to come.

    Raises:
        UsageError: it is a single file, or a U-Net alone without ``base``.
        TeacherError, HubError, VerificationError: it cannot be had, or is not whole.
    """
    told = fetching or (lambda _done, _total: None)
    name, folder = _folder(model, told, parts_only=False)
    if base is None and not (folder / INDEX).is_file():
        base = fallback
    base_name, base_folder = (name, folder) if base is None else _folder(base, told, parts_only=True)
    if not (base_folder / INDEX).is_file():
        raise UsageError(
            "this is a U-Net alone: a VAE, a text encoder and a tokenizer are needed as well",
            where=str(base_folder),
            expected=f"a pipeline's folder, with {INDEX}",
            hint="name a pipeline that brings them: --base PIPELINE",
        )
    parts = load_parts(base_folder, device=device, dtype=dtype)  # the small part first: it may refuse
    unet: Any = load_unet(folder).eval().requires_grad_(False)
    unet = torch.nn.Module.to(unet, device=device, dtype=dtype)  # diffusers' own warns of nothing
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    if compiled:
        unet.compile()
    identity: dict[str, Any] = {"model": {"name": name}, "base": {"name": base_name}}
    if hashed:
        identity["model"]["sha256"] = network_sha256(unet_folder(folder))
        identity["base"] |= {
            "vae": vae_sha256(base_folder),
            "text_encoder": network_sha256(base_folder / "text_encoder"),
            "tokenizer": tokenizer_sha256(base_folder),
        }
    drawer = Drawer(name, unet, parts, identity)
    identity["model"]["parameters"] = drawer.parameters
    return drawer


def _folder(text: str, fetching: Progress, *, parts_only: bool) -> tuple[str, Path]:
    """Return a model's name, which is no path of this machine, and its folder, fetched where it is on the Hub."""
    found = resolve_teacher(text)
    if found.file is not None:
        raise UsageError(
            "a single file has no parts that can be used here",
            where=printable(text),
            expected="a folder, a Hub id or a built-in name",
            hint="unet-surgery prune --recipe … writes a folder from it",
        )
    if not parts_only:  # before gigabytes come, or are made
        check_conditions(open_resolved(found, config_only=True).config)
    found = fetch_teacher(found, parts_only=parts_only, full=not parts_only, progress=fetching)
    return found.teacher_id or found.name, found.folder
