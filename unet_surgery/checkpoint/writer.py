"""Writing the student's weights: which tensors, from where, in one file or in shards.

A single file is what ``save_pretrained`` would write, byte for byte. So equal students are equal files, however the
teacher was stored. Shards are filled in the same order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.layout import UNET_BASE
from unet_surgery.checkpoint.reader import MAX_SHARDS, Weights
from unet_surgery.checkpoint.tensorfile import OutTensor, in_file_order, write_tensors
from unet_surgery.errors import UsageError
from unet_surgery.lower import SurgeryPlan, replaced_tensor

__all__ = ["DEFAULT_SHARD_BYTES", "DTYPES", "student_tensors", "write_weights"]

DEFAULT_SHARD_BYTES = 10_000_000_000  # diffusers' own default
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""What users call a dtype → safetensors' name of it."""


def student_tensors(plan: SurgeryPlan, weights: Weights) -> list[OutTensor]:
    """Return the student's tensors in the order in which they are written."""
    tensors = []
    for name, source in plan.weights.items():
        located = weights.locate(source if source is not None else replaced_tensor(plan.weights, name))
        content = None if source is None else (located,)
        tensors.append(OutTensor(name, plan.dtype or located.info.dtype, located.info.shape, content))
    return in_file_order(tensors)


def write_weights(
    plan: SurgeryPlan,
    weights: Weights,
    folder: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_bytes: disk.OnBytes,
) -> None:
    """Write the student's weights into ``folder``: one file, or shards and their index above ``max_shard_bytes``.

    Raises:
        TeacherError: the teacher's file ends early, or a value overflows ``plan.dtype`` (names the tensor).
        OSError: the disk refuses; the caller's staging folder takes care of what is there.
    """
    shards = _shards(student_tensors(plan, weights), max_shard_bytes)
    if len(shards) > MAX_SHARDS:
        raise UsageError(
            "the shards would be too many to be read back",
            expected=f"at most {MAX_SHARDS}",
            found=str(len(shards)),
            hint="a larger --max-shard-size",
        )
    if len(shards) == 1:
        _write_file(folder / f"{UNET_BASE}.safetensors", shards[0], on_bytes)
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{UNET_BASE}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, on_bytes)
        index |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True) + "\n"
    disk.write_file(folder / f"{UNET_BASE}.safetensors.index.json", text.encode())


def _shards(tensors: Sequence[OutTensor], max_bytes: int) -> list[list[OutTensor]]:
    """Fill shards greedily, as huggingface_hub does: a tensor larger than a shard gets one of its own."""
    shards: list[list[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_file(path: Path, tensors: list[OutTensor], on_bytes: disk.OnBytes) -> None:
    fd = disk.create(path)
    try:
        write_tensors(fd, tensors, on_bytes)
    finally:
        os.close(fd)
