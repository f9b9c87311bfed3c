"""Folders: what lies where a file should, shards and their index, pipelines and their parts, and where to write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from hostile.judge import ACCEPTED, OUTPUT_FAULT, PRUNE, Case
from hostile.templates import INDEX, SHARDS, WEIGHTS, Build, copy, edit_json, pipeline, sharded, unet

FIRST, SECOND = SHARDS
MIB = 1 << 20
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
PAGE = b"<!DOCTYPE html>\n<html><title>Sign in</title></html>" + b" " * 2000

Make = Callable[[Path], object]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def folder(path: Path) -> None:
    path.mkdir()


def written(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


STRANGE: dict[str, Make] = {
    "a FIFO": fifo,
    "a device": device,
    "a link to itself": loop,
    "a link to nowhere": nowhere,
    "a folder": folder,
}


def replace(name: str, make: Make) -> Make:
    """Put something else where a file was."""

    def change(teacher: Path) -> None:
        path = teacher / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        make(path)

    return change


def remove(name: str) -> Make:
    return replace(name, lambda _: None)


def index_map(change: Callable[[dict[str, Any]], object]) -> Build:
    return sharded(lambda teacher: edit_json(teacher / INDEX, lambda data: change(data["weight_map"])))


def in_both(teacher: Path) -> None:
    both = load_file(teacher / FIRST) | load_file(teacher / SECOND)
    for name in SHARDS:
        save_file({**load_file(teacher / name), "conv_in.bias": both["conv_in.bias"]}, teacher / name)


def swapped(weight_map: dict[str, str]) -> None:
    weight_map["conv_in.bias"] = SECOND if weight_map["conv_in.bias"] == FIRST else FIRST


def many_shards(weight_map: dict[str, str]) -> None:
    weight_map.update({f"x{i}": f"shard-{i}.safetensors" for i in range(5000)})


def components(change: Callable[[dict[str, Any]], object]) -> Build:
    """Change model_index.json."""
    return pipeline(lambda teacher: edit_json(teacher / "model_index.json", change))


def shard_component(teacher: Path, shards: tuple[str, str], listed: tuple[str, str]) -> None:
    """Store the text encoder in two files named ``shards``, which the index calls ``listed``."""
    part = teacher / "text_encoder"
    tensors = sorted(load_file(part / "model.safetensors").items())
    (part / "model.safetensors").unlink()
    weight_map = {}
    for k, (name, called) in enumerate(zip(shards, listed, strict=True)):
        save_file(dict(tensors[k::2]), part / name, metadata={"format": "pt"})
        weight_map |= {tensor: called for tensor, _ in tensors[k::2]}
    (part / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


GOOD = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def linked(work: Path) -> None:
    """Every file a link to another folder, as in the Hub's cache."""
    copy("pipeline", work / "blobs")
    for path in sorted((work / "blobs").rglob("*")):
        link = work / "teacher" / path.relative_to(work / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            link.symlink_to(os.path.relpath(path, link.parent))


def with_code(teacher: Path) -> None:
    """Code beside a component, and classes of nobody's: text to carry, nothing to import."""
    (teacher / "vae" / "evil.py").write_text("import os\nos.system('touch \"$CANARY\"')\n")
    edit_json(teacher / "model_index.json", lambda index: index.update(vae=["evil", "Evil"], _class_name="os.system"))


def refused(name: str, build: Build, *says: str, argv: tuple[str, ...] = PRUNE) -> Case:
    return Case("layout", name, build, says, argv=argv)


def accepted(name: str, build: Build, argv: tuple[str, ...] = PRUNE) -> Case:
    return Case("layout", name, build, code=ACCEPTED, argv=argv)


def output(name: str, build: Build, *says: str, out: str = "out", options: tuple[str, ...] = ()) -> Case:
    argv = ("prune", "--recipe", "bk_tiny", "--teacher", "teacher", "--out", out, *options)
    return Case("output", name, build, says, code=OUTPUT_FAULT, argv=argv)


def teacher_and(make: Make) -> Build:
    """The good teacher, and something at ``out``."""

    def build(work: Path) -> None:
        copy("unet", work / "teacher")
        make(work / "out")

    return build


def own_files(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("precious")


def two_variants(teacher: Path) -> None:
    for variant in ("a", "b"):
        shutil.copy(teacher / WEIGHTS, teacher / WEIGHTS.replace(".s", f".{variant}.s"))
    (teacher / WEIGHTS).unlink()


LAYOUT_CASES = (
    # --- the teacher ---
    refused("an empty folder", lambda work: (work / "teacher").mkdir(), "no U-Net", "an empty folder"),
    *(
        refused(f"{what} as the teacher", lambda work, make=make: make(work / "teacher"), "teacher")
        for what, make in STRANGE.items()
        if what not in ("a folder", "a link to itself", "a link to nowhere")
    ),
    *(
        refused(f"{what} as config.json", unet(replace("config.json", make)), "config.json")
        for what, make in STRANGE.items()
    ),
    *(refused(f"{what} as the weights", unet(replace(WEIGHTS, make)), WEIGHTS) for what, make in STRANGE.items()),
    refused("no weights", unet(remove(WEIGHTS)), "no safetensors weights"),
    refused(
        "a pickle alone",
        unet(lambda t: (t / WEIGHTS).rename(t / "diffusion_pytorch_model.bin")),
        "diffusion_pytorch_model.bin, a pickle, which is never opened",
        "unet-surgery convert",
    ),
    refused(
        "two variants and no word which",
        unet(two_variants),
        "several variants",
        "--variant a, --variant b",
    ),
    # --- the index and its shards ---
    refused("a shard missing", sharded(remove(SECOND)), SECOND, "cannot be opened"),
    *(refused(f"{what} as a shard", sharded(replace(SECOND, make)), SECOND) for what, make in STRANGE.items()),
    refused("a pointer as a shard", sharded(replace(SECOND, written(LFS))), SECOND, "LFS pointer"),
    refused("a page as the index", sharded(replace(INDEX, written(PAGE))), INDEX, "HTML"),
    refused("a pointer as the index", sharded(replace(INDEX, written(LFS))), INDEX, "LFS pointer"),
    refused("a FIFO as the index", sharded(replace(INDEX, fifo)), INDEX, "a FIFO"),
    refused("an index that is a list", sharded(replace(INDEX, written(b"[]"))), INDEX, "not an object"),
    refused("an index without a map", sharded(replace(INDEX, written(b"{}"))), INDEX, "no weight_map"),
    refused("an empty map", sharded(replace(INDEX, written(b'{"weight_map": {}}'))), INDEX, "no weight_map"),
    refused("a map of numbers", sharded(replace(INDEX, written(b'{"weight_map": {"a": 1}}'))), INDEX, "no weight_map"),
    refused("a key twice", sharded(replace(INDEX, written(b'{"weight_map": {"a": "b", "a": "c"}}'))), "stands twice"),
    refused("an index of 9 MiB", sharded(replace(INDEX, written(b"{" + b" " * (9 * MIB) + b"}"))), "implausibly large"),
    refused("a shard above the folder", index_map(lambda m: m.update(x="../teacher/" + FIRST)), "outside its folder"),
    refused("a shard at an absolute path", index_map(lambda m: m.update(x="/etc/hostname")), "outside its folder"),
    refused("a shard called ..", index_map(lambda m: m.update(x="..")), "outside its folder"),
    refused("a shard without a name", index_map(lambda m: m.update(x="")), "outside its folder"),
    refused("a shard with NUL in its name", index_map(lambda m: m.update(x="a\0b")), "outside its folder"),
    refused("a shard with terminal codes", index_map(lambda m: m.update(x="\x1b[2Ja")), "outside its folder"),
    refused("5000 shards", index_map(many_shards), "implausibly many shards"),
    refused("a tensor in another shard", index_map(swapped), "index and the shards disagree", "conv_in.bias"),
    refused("a tensor in no shard", index_map(lambda m: m.update(x=FIRST)), "tensor x", "in no shard"),
    refused("a tensor that is not listed", index_map(lambda m: m.pop("conv_in.bias")), "does not list", "conv_in.bias"),
    refused("a tensor in two shards", sharded(in_both), "stands in two shards", "conv_in.bias"),
    refused("a shard of the wrong half", sharded(lambda t: shutil.copy(t / FIRST, t / SECOND)), "two shards"),
    accepted("shards as they are", sharded(lambda teacher: None)),
    # --- a pipeline's parts ---
    refused("an index of no pipeline", pipeline(replace("model_index.json", written(b"[]"))), "not an object"),
    refused("a page as model_index.json", pipeline(replace("model_index.json", written(PAGE))), "HTML"),
    *(
        refused(f"{what} as model_index.json", pipeline(replace("model_index.json", make)), "model_index.json")
        for what, make in STRANGE.items()
    ),
    refused("a pipeline without a U-Net", components(lambda i: i.pop("unet")), "names no U-Net"),
    refused(
        "a part called ..", components(lambda i: i.update({"..": ["a", "b"]})), "cannot be a folder", "found:    .."
    ),
    refused(
        "a part called ../teacher", components(lambda i: i.update({"../teacher": ["a", "b"]})), "cannot be a folder"
    ),
    refused("a part at an absolute path", components(lambda i: i.update({"/etc": ["a", "b"]})), "cannot be a folder"),
    refused("a part without a name", components(lambda i: i.update({"": ["a", "b"]})), "cannot be a folder"),
    refused("a part called plan.json", components(lambda i: i.update({"plan.json": ["a", "b"]})), "cannot be a folder"),
    refused("a part that is not there", pipeline(remove("vae")), "vae/", "--unet-only"),
    refused("a part that is a file", pipeline(replace("vae", written(b"x"))), "vae/", "--unet-only"),
    refused("an empty part", pipeline(replace("tokenizer", folder)), "tokenizer"),
    refused("a part without weights", pipeline(remove(f"vae/{WEIGHTS}")), "weights beside config.json"),
    refused("a part without config", pipeline(remove("vae/config.json")), "config.json beside the weights"),
    refused("a part's weights cut", pipeline(lambda t: os.truncate(t / "vae" / WEIGHTS, 5000)), "cut short", "vae"),
    refused("a part's weights empty", pipeline(lambda t: os.truncate(t / "vae" / WEIGHTS, 0)), "too short", "vae"),
    refused("a pointer as a part's weights", pipeline(replace(f"vae/{WEIGHTS}", written(LFS))), "LFS pointer", "vae"),
    refused("a page as a part's weights", pipeline(replace(f"vae/{WEIGHTS}", written(PAGE))), "HTML", "vae"),
    refused(
        "an empty pickle as a part's weights",
        pipeline(lambda t: ((t / "vae" / WEIGHTS).unlink(), (t / "vae" / "diffusion_pytorch_model.bin").touch())),
        "an empty file",
    ),
    refused(
        "a page as a part's config", pipeline(replace("vae/config.json", written(PAGE))), "HTML", "vae/config.json"
    ),
    refused("a part's config cut", pipeline(lambda t: os.truncate(t / "vae" / "config.json", 50)), "vae/config.json"),
    refused("a page as merges.txt", pipeline(replace("tokenizer/merges.txt", written(PAGE))), "merges.txt", "HTML"),
    *(
        refused(f"{what} in a part", pipeline(replace("scheduler/scheduler_config.json", make)), "scheduler")
        for what, make in STRANGE.items()
        if what != "a folder"
    ),
    refused(
        "a part's shard missing",
        pipeline(lambda t: (shard_component(t, GOOD, GOOD), (t / "text_encoder" / GOOD[1]).unlink())),
        GOOD[1],
    ),
    refused("a part's shard outside", pipeline(lambda t: shard_component(t, GOOD, (GOOD[0], "../x"))), "outside"),
    refused(
        "a part's shards under odd names",
        pipeline(lambda t: shard_component(t, ("a.safetensors", GOOD[1]), ("a.safetensors", GOOD[1]))),
        "named as diffusers",
    ),
    accepted("a part in shards", pipeline(lambda t: shard_component(t, GOOD, GOOD))),
    accepted("a pipeline of links", linked),
    accepted("code and made-up classes, carried and never run", pipeline(with_code)),
    accepted("more folders than the index names", pipeline(lambda t: (t / "notes").mkdir())),
    accepted("a part that is null", components(lambda i: i.update(safety_checker=[None, None]))),
    # --- where to write ---
    output("an output that exists", teacher_and(own_files), "the output folder exists"),
    output("an output that is no student, and --force", teacher_and(own_files), "students only", options=("--force",)),
    output("an output that is a file", teacher_and(written(b"x")), "a link or a file", options=("--force",)),
    output("an output that is a link", teacher_and(nowhere), "a link or a file", options=("--force",)),
    output("an output that is a FIFO", teacher_and(fifo), "a link or a file", options=("--force",)),
    output("an output in no folder", teacher_and(lambda out: None), "does not exist", "mkdir -p", out="no/such/out"),
    output("an output below a file", teacher_and(written(b"x")), "out", out="out/below"),
    output(
        "the teacher as the output",
        teacher_and(lambda out: None),
        "the teacher's folder",
        out="teacher",
        options=("--force",),
    ),
    output("an output inside the teacher", teacher_and(lambda out: None), "the teacher's folder", out="teacher/out"),
    output("an output without a name", teacher_and(lambda out: None), "the working directory", out=""),
)
