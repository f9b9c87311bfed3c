"""Make a trained toy pipeline what the package ships: weights in half precision, plain files, a card with its scores.

    python examples/toy_world/bundle.py toy-teacher/student unet_surgery/_teachers/toy

Every stored value is compared with the original's nearest half, the result is loaded strictly, and both are scored on
the same held-out captions with the same noise. The exit code is 1 where the scores are below the bars.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from score import captions_of, drawing, load_pipeline, score

from unet_surgery.checkpoint.cast import cast
from unet_surgery.errors import SurgeryError

__all__ = ["MAX_BYTES", "bundle", "write_card"]

MAX_BYTES = 25_000_000
MIN_RIGHT = {"one": 0.90, "two": 0.70}
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
TOKENIZER = ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")
COPIED = ("model_index.json", "scheduler/scheduler_config.json", *(f"tokenizer/{name}" for name in TOKENIZER))
OLD_LAYOUT = "text_model."
"""What transformers 5 leaves out of a text encoder's names, and earlier versions look for."""
PRIVATE = "_name_or_path"  # a folder of the machine that trained it

Scores = dict[str, Any]


def main() -> int:
    options = parse_options()
    try:
        largest = bundle(options.student, options.out)
        before, after = (measured(folder, options) for folder in (options.student, options.out))
    except (SurgeryError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (options.out / "README.md").write_text(write_card(options.student, before, after, options), "utf-8")
    num_bytes = _size(options.out)
    print(json.dumps({"before": before, "after": after, "bytes": num_bytes, "largest_change": largest}, indent=2))
    if num_bytes > MAX_BYTES:
        print(f"error: with its card it has {num_bytes:,} bytes, and {MAX_BYTES:,} are allowed", file=sys.stderr)
        return 1
    below = [kind for kind, least in MIN_RIGHT.items() if after[kind]["right"] < least]
    for kind in below:
        print(f"below the bar: {kind}: {after[kind]['right']:.1%} right, {MIN_RIGHT[kind]:.0%} wanted", file=sys.stderr)
    return 1 if below else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("student", type=Path, help="the finished pipeline of a run")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--captions", type=int, default=500, help="of one object, and as many of two")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def bundle(student: Path, out: Path, max_bytes: int = MAX_BYTES) -> float:
    """Write the pipeline ``student`` to ``out`` in half precision; return the largest change of a value.

    That change is relative to the largest value of its tensor.

    Raises:
        SurgeryError: a value is too large for half precision, or the result does not load.
        ValueError: it would be larger than ``max_bytes``, or was not stored as it should be.
        OSError: a file is missing, or ``out`` exists.
    """
    out.mkdir(parents=True)
    for name in COPIED:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(student / name, out / name)
    changes = []
    for component, file in WEIGHTS.items():
        (out / component).mkdir()
        config = json.loads((student / component / "config.json").read_text("utf-8"))
        config.pop(PRIVATE, None)
        if component == "text_encoder":  # else transformers 5 loads it as it is stored, and diffusers the rest in fp32
            config["torch_dtype"] = "float32"
        (out / component / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        tensors = load_file(student / component / file)
        if component == "text_encoder":
            tensors = {_old_name(name): tensor for name, tensor in tensors.items()}
        halves = {name: _halved(name, tensor) for name, tensor in tensors.items()}
        save_file(halves, out / component / file, metadata={"format": "pt"})
        changes.append(_compared(tensors, load_file(out / component / file)))
    if (num_bytes := _size(out)) > max_bytes:
        raise ValueError(f"{out} has {num_bytes:,} bytes, and {max_bytes:,} are allowed")
    load_pipeline(str(out))
    return max(changes)


def _old_name(name: str) -> str:
    return name if name.startswith(OLD_LAYOUT) else OLD_LAYOUT + name


def _halved(name: str, tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a tensor in half precision, rounded to nearest; SurgeryError names it where a value is too large."""
    wide = np.ascontiguousarray(tensor, dtype="<f4")
    try:
        return np.frombuffer(cast(wide.tobytes(), "F32", "F16"), dtype="<f2").reshape(tensor.shape)
    except SurgeryError as error:
        raise error.at(name) from None


def _compared(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Return how far the farthest value moved, relative to its tensor's largest; ValueError if one is not right."""
    if before.keys() != after.keys():
        raise ValueError("the stored tensors have other names")
    largest = 0.0
    for name, old in before.items():
        new, right = after[name], old.astype(np.float16)
        if new.dtype != np.float16 or new.shape != old.shape or not np.array_equal(new.view("<u2"), right.view("<u2")):
            raise ValueError(f"{name} was not stored as it should be")
        moved = np.abs(new.astype(np.float64) - old).max() / max(float(np.abs(old).max()), 1e-30)
        largest = max(largest, float(moved))
    return largest


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measured(folder: Path, options: argparse.Namespace) -> Scores:
    """Return the scores of a pipeline on held-out captions of one and of two objects."""
    unet, parts = load_pipeline(str(folder), options.device)
    captions = captions_of("one", options.captions) + captions_of("two", options.captions)
    draw = drawing(unet, parts, steps=options.steps, guidance=options.guidance)
    found: Scores = score(draw, captions, [options.seed])
    return found


def write_card(student: Path, before: Scores, after: Scores, options: argparse.Namespace) -> str:
    """Return the card of the shipped pipeline: what it is, what it can do, and how it was made."""
    rows = [
        f"| {title} | {_cell(before[kind])} | {_cell(after[kind])} |"
        for kind, title in (("one", "one object"), ("two", "two objects"))
    ]
    num_one, num_two = (len(set(captions_of(kind, options.captions))) for kind in ("one", "two"))
    attributes = [
        f"| {name} | {after['one']['attributes'][name]:.1%} | {after['two']['attributes'][name]:.1%} |"
        for name in after["one"]["attributes"]
    ]
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [unet-surgery]
---

# The toy teacher of unet-surgery

A whole Stable Diffusion pipeline in miniature: a U-Net of four levels, a VAE and a CLIP text encoder, trained from
random weights to draw one or two coloured shapes, 32 × 32 pixels, from captions of one small grammar. It exists so that
pruning and distillation can be tried, and judged, on two CPU cores and without a network:

```console
$ unet-surgery prune --recipe bk_tiny --teacher toy
```

## How well it draws

Pictures that are right in all that the caption says, on captions that no training saw: {options.captions} pictures of
each kind (of {num_one} and {num_two} different captions), DDIM, {options.steps} steps, guidance {options.guidance:g},
seed {options.seed}; in brackets the 95 % Wilson interval. What is shipped are the weights rounded to half precision.

| | as trained, fp32 | as shipped, fp16 |
|---|---:|---:|
{chr(10).join(rows)}

| as shipped | one object | two objects |
|---|---:|---:|
{chr(10).join(attributes)}

## How it was made

{_training(student)}
`examples/toy_world` of the repository has the scripts, which draw their own pictures: `train_parts.py` for VAE and text
encoder, `teacher.yaml` for the U-Net, `bundle.py` for these files.

## Limits

It knows nothing but that grammar: other words are noise to it.
"""


def _cell(scores: dict[str, Any]) -> str:
    low, high = scores["interval"]
    return f"{scores['right']:.1%} ({low:.1%} to {high:.1%})"


def _training(student: Path) -> str:
    path = student / "training.json"
    if not path.is_file():
        return "The U-Net was trained by this project's own trainer."
    stages = json.loads(path.read_text("utf-8"))["run"]["stages"]
    steps, images = sum(s["steps"] for s in stages), sum(s["steps"] * s["batch"] for s in stages)
    return f"The U-Net was trained by this project's own trainer: {steps:,} steps, {images:,} samples."


if __name__ == "__main__":
    raise SystemExit(main())
