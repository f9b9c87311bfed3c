"""Student folders under ``check``: plans, recipes and files that somebody edited; what ``--force`` makes of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.container import read_container, write_container
from hostile.judge import ACCEPTED, CHECK, OUTPUT_FAULT, STUDENT_FAULT, Case
from hostile.layout import LFS, PAGE, fifo, loop, remove, replace, written
from hostile.recipe import alias_bomb
from hostile.templates import WEIGHTS, Build, copy, edit_json

WHOLE = ("check", "student", "--teacher", "teacher")
FORCED = ("prune", "--recipe", "bk_base", "--teacher", "teacher", "--out", "student", "--force")
MIB = 1 << 20


def student(change: Build, name: str = "student") -> Build:
    def build(work: Path) -> None:
        copy("unet" if name == "student" else "pipeline", work / "teacher")
        change(copy(name, work / "student"))

    return build


def plan(change: Callable[[dict[str, Any]], object]) -> Build:
    return student(lambda folder: edit_json(folder / "plan.json", change))


def replaced(name: str, make: Callable[[Path], object]) -> Build:
    return student(replace(name, make))


def byte(name: str, offset: int) -> Build:
    """Flip one bit."""

    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[offset] ^= 1
        (folder / name).write_bytes(data)

    return student(change)


def swap_names(folder: Path) -> None:
    """Two tensors of one shape under each other's name: every law of shapes holds, and the network is another."""
    header, data = read_container(folder / WEIGHTS)
    one, other = "down_blocks.0.resnets.0.norm1.weight", "down_blocks.0.resnets.0.norm1.bias"
    header[one]["data_offsets"], header[other]["data_offsets"] = (
        header[other]["data_offsets"],
        header[one]["data_offsets"],
    )
    write_container(folder / WEIGHTS, header, data)


def swap_sources(data: dict[str, Any]) -> None:
    weights = data["weights"]
    one, other = "down_blocks.0.resnets.0.norm1.weight", "down_blocks.0.resnets.0.norm1.bias"
    weights[one], weights[other] = weights[other], weights[one]


def refused(name: str, build: Build, *says: str, argv: tuple[str, ...] = CHECK) -> Case:
    return Case("student", name, build, says, code=STUDENT_FAULT, argv=argv)


STUDENT_CASES = (
    Case("student", "as it is", student(lambda folder: None), code=ACCEPTED, argv=WHOLE),
    Case("student", "a pipeline as it is", student(lambda f: None, "pipeline-student"), code=ACCEPTED, argv=WHOLE),
    # --- the plan ---
    refused("no plan", student(remove("plan.json")), "no readable plan.json"),
    refused("a FIFO as the plan", replaced("plan.json", fifo), "a FIFO"),
    refused("a loop as the plan", replaced("plan.json", loop), "plan.json"),
    refused("a plan that is not JSON", replaced("plan.json", written(b"{")), "not JSON"),
    refused("a plan that is a list", replaced("plan.json", written(b"[]")), "wrong value"),
    refused("a plan that is deep", replaced("plan.json", written(b'{"a":' * 200_000)), "not JSON"),
    refused("a plan of 20 MiB", replaced("plan.json", written(b" " * (20 * MIB))), "plan.json"),
    refused("a plan in UTF-16", replaced("plan.json", written("{}".encode("utf-16"))), "plan.json"),
    refused("a page as the plan", replaced("plan.json", written(PAGE)), "not JSON"),
    refused("a plan of tomorrow", plan(lambda p: p.update(format_version=99)), "format_version 99"),
    refused("a plan of another tool", plan(lambda p: p.update(format="terraform")), "terraform"),
    refused("a plan without a teacher", plan(lambda p: p.pop("teacher")), "teacher"),
    refused("a plan with other sizes", plan(lambda p: p["student"].update(params=5)), "sizes are not those"),
    refused("a plan with negative sizes", plan(lambda p: p["student"].update(params=-5)), "non-negative"),
    refused(
        "a plan with a wild config", plan(lambda p: p["teacher"]["config"].update(layers_per_block=10**9)), "config"
    ),
    refused("a plan with a config of no U-Net", plan(lambda p: p["student"].update(config={"a": 1})), "config"),
    refused("a map that lacks a tensor", plan(lambda p: p["weights"].popitem()), "follow from what it removes"),
    refused(
        "a map with a tensor too many",
        plan(lambda p: p["weights"].update({"\x1b[2J": None})),
        "follow from what it removes",
    ),
    refused("a map to numbers", plan(lambda p: p["weights"].update({"conv_in.bias": 5})), "weights"),
    refused(
        "a map to a wrong tensor",
        plan(lambda p: p["weights"].update({"conv_in.bias": "time_embedding.linear_1.bias"})),
        "conv_in.bias",
        argv=WHOLE,
    ),
    refused(
        "zeros that are not",
        plan(lambda p: p["weights"].update({"conv_in.bias": None})),
        "follow from what it removes",
        "conv_in",
    ),
    # --- the recipe ---
    refused("no recipe", student(remove("recipe.yaml")), "recipe cannot be read"),
    refused("another recipe", replaced("recipe.yaml", written(b"name: x\nremove: [mid]\n")), "not the plan's"),
    refused("an alias bomb as the recipe", replaced("recipe.yaml", written(alias_bomb().encode())), "recipe cannot"),
    refused("a FIFO as the recipe", replaced("recipe.yaml", fifo), "recipe cannot be read"),
    # --- config and weights ---
    refused(
        "another config",
        student(lambda f: edit_json(f / "config.json", lambda c: c.update(in_channels=9))),
        "in_channels",
    ),
    refused(
        "a number of another type",
        student(lambda f: edit_json(f / "config.json", lambda c: c.update(in_channels=4.0))),
        "in_channels",
    ),
    refused("no config", student(remove("config.json")), "config.json"),
    refused("no weights", student(remove(WEIGHTS)), "no safetensors weights"),
    refused("weights cut", student(lambda f: os.truncate(f / WEIGHTS, 90_000)), "cut short"),
    refused("a pointer as weights", replaced(WEIGHTS, written(LFS)), "LFS pointer"),
    refused("a bit flipped in a header", byte(WEIGHTS, 40), WEIGHTS),
    refused("the last bit of the weights flipped", byte(WEIGHTS, -1), "differ from the teacher's", argv=WHOLE),
    refused("two tensors under each other's name", student(swap_names), "differ from the teacher's", argv=WHOLE),
    refused(
        "a part's bit flipped",
        student(
            lambda f: (f / "vae" / "config.json").write_text((f / "vae" / "config.json").read_text() + " "),
            "pipeline-student",
        ),
        "vae/config.json",
        argv=WHOLE,
    ),
    refused(
        "a file beside a part's own",
        student(lambda f: (f / "vae" / "x.safetensors").write_bytes(b"x"), "pipeline-student"),
        "the teacher does not have",
        argv=WHOLE,
    ),
    refused("two entries of the map swapped", plan(swap_sources), "follow from what it removes"),
    refused("a plan that removes nothing", plan(lambda p: p.update(removed={})), "follow from what it removes"),
    refused("a part gone", student(remove("tokenizer"), "pipeline-student"), "tokenizer"),
    # --- --force ---
    Case(
        "student",
        "--force over a folder with a false plan",
        student(replace("plan.json", written(b'{"format": 1}'))),
        ("students only",),
        OUTPUT_FAULT,
        FORCED,
    ),
    Case(
        "student",
        "--force over a student with a file added",
        student(lambda f: (f / "notes.txt").touch()),
        ("prune did not write", "notes.txt"),
        OUTPUT_FAULT,
        FORCED,
    ),
    Case(
        "student",
        "--force over a deep plan",
        student(replace("plan.json", written(b'{"a":' * 200_000))),
        ("students only",),
        OUTPUT_FAULT,
        FORCED,
    ),
    Case(
        "student",
        "--force over a FIFO of a plan",
        student(replace("plan.json", fifo)),
        ("students only",),
        OUTPUT_FAULT,
        FORCED,
    ),
)
