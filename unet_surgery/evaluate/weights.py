"""The weights that scores are defined by: which are the published ones, where they are found, and reading them safely.

A score has its name only with the published weights. They are known by their sha256; where that is not written down
here, by the hash that the Hub names of the file at the commit that is, which needs a network for a file given by path.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from unet_surgery.checkpoint.foreign import recognise
from unet_surgery.checkpoint.jsonfile import open_regular
from unet_surgery.errors import HubError, TeacherError, first_few, printable
from unet_surgery.hub.weightfile import fetch_files, named_sha256, torch_hub_file, torch_hub_folder

__all__ = ["CLIP", "HPS", "HPS_V21", "INCEPTION", "Known", "Weights", "find_inception", "find_weights", "read_tensors"]

MAX_FILE_BYTES = 16 << 30
SAFETENSORS = ".safetensors"


@dataclass(frozen=True, slots=True)
class Known:
    """Published weights: what they are called, where they are, the option that takes a path to them.

    ``files`` are what the repository may call them, the first being preferred; ``beside`` are small files that are
    fetched with them, from ``beside_repository`` if that is another. ``revision`` is the commit that holds them (None:
    the main branch), ``sha256`` the hash of the first of ``files``.
    """

    name: str
    option: str
    address: str
    sha256: str | None = None
    repository: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    beside_repository: str | None = None


TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_FILES = ("open_clip_pytorch_model.bin", "open_clip_model.safetensors")
HPS_COMMIT = "697403c78157020a1ae59d23f111aa58ced35b0a"
"""Of xswu/HPSv2, with both files: the snapshot that hpsv2 1.2.0 left in the caches of those who used it."""

INCEPTION = Known(
    "pt_inception-2015-12-05-6726825d.pth",
    "--inception",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    files=("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
)
CLIP = Known(
    "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    "--clip",
    "https://huggingface.co/laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    sha256="9ef136f407986fb607cd37a823eba38a3b6f95e8ec702b3d1687252985d84750",  # its blob's name in the Hub's cache
    repository="laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    files=OPEN_CLIP_FILES,
    beside=(OPEN_CLIP_CONFIG, *TOKENIZER_FILES),
)
HPS = Known(
    "xswu/HPSv2: HPS_v2_compressed.pt",
    "--hps",
    "https://huggingface.co/xswu/HPSv2/resolve/697403c78157020a1ae59d23f111aa58ced35b0a/HPS_v2_compressed.pt",
    repository="xswu/HPSv2",
    revision=HPS_COMMIT,
    files=("HPS_v2_compressed.pt",),
    beside=TOKENIZER_FILES,
    beside_repository="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
)
HPS_V21 = Known(
    "xswu/HPSv2: HPS_v2.1_compressed.pt",
    "--hps",
    "https://huggingface.co/xswu/HPSv2/resolve/697403c78157020a1ae59d23f111aa58ced35b0a/HPS_v2.1_compressed.pt",
    repository="xswu/HPSv2",
    revision=HPS_COMMIT,
    files=("HPS_v2.1_compressed.pt",),
    beside=TOKENIZER_FILES,
    beside_repository="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
)


@dataclass(frozen=True, slots=True)
class Weights:
    """A file of weights on this machine; ``folders`` are where the files that belong to it may lie.

    ``why`` says in words why it does not count as published, where it does not.
    """

    path: Path
    name: str
    sha256: str
    published: bool
    folders: tuple[Path, ...] = field(default=())
    why: str = "its weights are not the published ones"

    def beside(self, name: str) -> Path | None:
        """Return a file that belongs to the weights, None where there is none."""
        return next((folder / name for folder in self.folders if (folder / name).is_file()), None)


def find_inception(path: str | Path | None, *, sha256: str | None = None) -> Weights:
    """Find the Inception network's file: at ``path``, or where pytorch-fid or torch-fidelity have put it.

    Raises:
        TeacherError: it is in neither place, or its sha256 is neither the published one nor the given ``sha256``.
    """
    found = Path(path) if path is not None else torch_hub_file(*INCEPTION.files)
    if found is None:
        raise TeacherError(
            "the weights of the Inception network are not on this machine",
            where=str(torch_hub_folder() / INCEPTION.files[0]),
            expected=f"{INCEPTION.name} there, or where --inception PATH says",
            hint=f"curl -LO {INCEPTION.address}, then --inception {INCEPTION.files[0]}",
        )
    digest = _digest(found)
    published = digest == INCEPTION.sha256
    expected = sha256 or INCEPTION.sha256
    if digest != expected:
        raise TeacherError(
            "this file is not the one that was asked for" if sha256 else "this file is not the published one",
            where=str(found),
            expected=f"sha256 {expected}",
            found=digest,
            hint=f"download it again: {INCEPTION.address}; for other weights, --weights-sha256 says which",
        )
    return Weights(found, INCEPTION.name if published else found.name, digest, published, (found.parent,))


def find_weights(known: Known, path: str | Path | None, *, tokenizer: str | Path | None = None) -> Weights:
    """Find weights at ``path`` (a file, or the folder that holds them), else in their repository on the Hub.

    ``tokenizer`` is a folder with the tokenizer's files, where they do not lie beside the weights. A file at ``path``
    is the published one if its sha256 is written down here, or the Hub names it, where it can be asked.

    Raises:
        TeacherError: there is no such file at ``path``.
        HubError: the Hub refuses or cannot be reached; says what to download by hand, and the option for it.
    """
    own = () if tokenizer is None else (Path(tokenizer),)
    if path is not None:
        file = _file_at(known, Path(path))
        digest = _digest(file)
        why = _why_not(known, digest)
        return Weights(file, file.name if why else known.name, digest, not why, (*own, file.parent), why)
    assert known.repository is not None
    try:
        others = () if known.beside_repository else known.beside
        files = fetch_files(known.repository, known.files, others, revision=known.revision)
        folders = (*own, files.folder)
        if known.beside_repository is not None and tokenizer is None:
            folders += (fetch_files(known.beside_repository, known.beside[:1], known.beside[1:]).folder,)
    except HubError as error:
        raise HubError(
            f"the weights {known.name} are not on this machine, and did not come from the Hub: {error.what}",
            where=known.address,
            expected=" or ".join(known.files),
            found=error.found,
            hint=f"where there is a network: {_by_hand(known)}, and bring the Hub's cache; or give {known.option} PATH",
        ) from error
    file = files.folder / files.names[0]
    digest = _digest(file)  # the Hub's own hash of it was compared when it came
    other = known.sha256 is not None and files.names[0] == known.files[0] and digest != known.sha256
    why = f"its repository holds another file than was published, sha256 {digest}" if other else ""
    return Weights(file, known.name, digest, not why, folders, why)


def _by_hand(known: Known) -> str:
    words = ["hf download", str(known.repository), known.files[0]]
    return " ".join([*words, *(["--revision", known.revision] if known.revision else [])])


def _why_not(known: Known, digest: str) -> str:
    """Return in words why a file of this hash does not count as published; empty where it does."""
    if digest == known.sha256:
        return ""
    assert known.repository is not None
    named = named_sha256(known.repository, known.files, revision=known.revision)
    if digest in named:
        return ""
    if not named and known.sha256 is None:
        return "its weights could not be compared with the published ones, whose hash only the Hub names"
    return "its weights are not the published ones"


def _file_at(known: Known, path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        for name in (*known.files, *OPEN_CLIP_FILES):
            if (path / name).is_file():
                return path / name
    raise TeacherError(
        "there are no such weights",
        where=str(path),
        expected=f"a file, or a folder with {' or '.join(known.files)}",
        hint=f"they are at {known.address}",
    )


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, or of one that PyTorch saved; nothing but tensors is unpickled.

    Of a training checkpoint the tensors under ``state_dict`` are taken, and ``module.`` goes from before their names.

    Raises:
        TeacherError: it is neither, damaged, or holds other things.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise TeacherError("a file is implausibly large", where=str(path), found=f"{size} bytes")
    try:
        if path.suffix == SAFETENSORS:
            stored: Any = load_file(path)
        else:
            with warnings.catch_warnings():  # of formats that it reads all the same
                warnings.simplefilter("ignore")
                # Old files are no zip archives, and those cannot be mapped.
                stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (
        pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError,
        OSError, SafetensorError,
    ) as error:  # fmt: skip
        with path.open("rb") as file:
            what = recognise(file.read(64), size)
        raise TeacherError(
            "the weights cannot be read",
            where=str(path),
            expected="a safetensors file, or tensors that torch.save wrote",
            found=what or printable(str(error).split("\n", 1)[0]),
        ) from error
    return _tensors(stored, path)


def _tensors(stored: Any, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
        stored = stored["state_dict"]
    if not isinstance(stored, Mapping) or not stored:
        raise TeacherError("the file holds no tensors by name", where=str(path), found=printable(type(stored).__name__))
    others = [str(name) for name, value in stored.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise TeacherError("the file holds other things than tensors", where=str(path), found=first_few(others))
    wrapped = all(str(name).startswith("module.") for name in stored)
    return {str(name).removeprefix("module.") if wrapped else str(name): value for name, value in stored.items()}
