"""What says that two pipelines have the same VAE, or tokenizer: the contents of their files, not where they lie."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.layout import UNET_BASE, choose_weights, component_files, component_weights
from unet_surgery.checkpoint.reader import open_weights

__all__ = ["network_sha256", "tokenizer_sha256", "vae_sha256"]

BLOCK_BYTES = 8 << 20


def vae_sha256(pipeline: Path) -> str:
    """Return the sha256 of a pipeline's VAE, as :func:`network_sha256`."""
    return network_sha256(pipeline / "vae")


def network_sha256(folder: Path) -> str:
    """Return the sha256 of a network's folder: its config but for remarks (``_…``), and every tensor by name.

    So a copy in other shards, or under a variant's name, is the same network; another dtype is not.

    Raises:
        TeacherError: a file is missing or damaged.
    """
    config = {key: value for key, value in read_object(folder / "config.json").items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    names = os.listdir(folder)
    choice = component_weights(names, None) or choose_weights(names, None, where=str(folder), base=UNET_BASE)
    with open_weights(folder, choice) as weights:
        for name in sorted(weights):
            file, info, _ = weights.locate(name)
            digest.update(f"\0{name}\0{info.dtype}\0{info.shape}\0".encode())
            offset, end = info.offset, info.offset + info.num_bytes
            while offset < end:
                block = os.pread(file.fd, min(BLOCK_BYTES, end - offset), offset)
                if not block:
                    file.check_unchanged()
                    raise OSError(f"{file.path} ends early")
                digest.update(block)
                offset += len(block)
    return digest.hexdigest()


def tokenizer_sha256(pipeline: Path) -> str:
    """Return the sha256 of the files of a pipeline's tokenizer, names and contents."""
    folder = pipeline / "tokenizer"
    digest = hashlib.sha256()
    for name in component_files(sorted(p.name for p in folder.iterdir() if p.is_file()), None):
        content = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        digest.update(f"{name}\0{content}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
