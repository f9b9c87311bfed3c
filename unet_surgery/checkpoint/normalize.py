"""Old-layout faults of the parts that are copied, and their mending: names and extra files, never a value.

transformers 5 saves a ``CLIPTextModel`` without the ``text_model.`` that every earlier version and most other runtimes
look for (earlier ones then initialise it anew, with a warning), and CLIP tokenizers as ``tokenizer.json`` alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.components import Component
from unet_surgery.checkpoint.header import encode_header
from unet_surgery.checkpoint.jsonfile import read_object, read_regular
from unet_surgery.checkpoint.layout import component_weights
from unet_surgery.checkpoint.reader import OpenFile, open_weights
from unet_surgery.errors import SurgeryError

__all__ = ["Content", "Mending", "mendings"]

PREFIX = "text_model."
TOKEN_EMBEDDING = "embeddings.token_embedding.weight"  # noqa: S105  # a tensor's name
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
MAX_TOKENIZER_BYTES = 16 << 20  # CLIP's has 2.2 MB, 49,000 merges
MAX_CONTAINERS, MAX_COMMAS = 150_000, 1_000_000


@dataclass(frozen=True, slots=True)
class Content:
    """What a mended file holds: ``head``, then ``source`` from ``offset`` to its end."""

    head: bytes
    source: Path | None = None
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Mending:
    """A fault of one component, in words, and target file name → what it should hold (some of them new files)."""

    component: str
    fault: str
    files: Mapping[str, Content]


def mendings(components: Sequence[Component], variant: str | None, *, max_header_bytes: int) -> tuple[Mending, ...]:
    """Return what could be mended in ``components``.

    Raises:
        TeacherError: a file that it looks into is damaged.
    """
    found = []
    for component in components:
        if component.kind == "CLIPTextModel":
            found.append(_text_encoder(component, variant, max_header_bytes))
        elif component.kind in TOKENIZERS:
            found.append(_tokenizer(component))
    return tuple(mending for mending in found if mending is not None)


def _text_encoder(component: Component, variant: str | None, max_header_bytes: int) -> Mending | None:
    chosen = component_weights(os.listdir(component.folder), variant)
    if chosen is None:
        return None
    with open_weights(component.folder, chosen, max_header_bytes=max_header_bytes) as weights:
        if TOKEN_EMBEDDING not in weights:
            return None
        files = {component.files[file.path.name]: _prefixed(file) for file in weights.files}
    if chosen.sharded:
        index = read_object(component.folder / chosen.file)
        index["weight_map"] = {PREFIX + name: shard for name, shard in index["weight_map"].items()}
        files[component.files[chosen.file]] = Content((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    return Mending(
        component.name, f"its tensors' names lack {PREFIX!r}: older transformers initialise it anew, silently", files
    )


def _prefixed(file: OpenFile) -> Content:
    """Return the file with longer names: the same data in the same order behind a new header."""
    tensors = sorted(file.header.tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes))
    head = encode_header([(PREFIX + name, info.dtype, info.shape) for name, info in tensors], file.header.metadata)
    return Content(head, file.path, file.header.data_start)


def _tokenizer(component: Component) -> Mending | None:
    path = component.folder / "tokenizer.json"
    if path.name not in component.files or {"vocab.json", "merges.txt"} <= component.files.keys():
        return None
    try:
        raw = read_regular(path, MAX_TOKENIZER_BYTES)
        if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS or raw.count(b",") > MAX_COMMAS:
            return None
        files = _vocabulary(json.loads(raw))
    except (SurgeryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # of a form that is not known here; it is copied as it is
    missing = {name: content for name, content in files.items() if name not in component.files}
    return Mending(
        component.name, f"it is tokenizer.json alone: older readers want {' and '.join(sorted(missing))}", missing
    )


def _vocabulary(tokenizer: Any) -> dict[str, Content]:
    """Return ``vocab.json`` and ``merges.txt`` as the slow CLIP tokenizer has them."""
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError("not a byte pair encoding")
    vocab = dict(model["vocab"])
    for token in tokenizer.get("added_tokens") or ():
        vocab.setdefault(token["content"], token["id"])
    # a pair was one text in tokenizers before 0.20
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    text = "\n".join(["#version: 0.2", *merges]) + "\n"
    return {
        "vocab.json": Content(json.dumps(vocab, ensure_ascii=False).encode("utf-8")),
        "merges.txt": Content(text.encode("utf-8")),
    }
