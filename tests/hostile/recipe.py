"""Recipes: YAML that is more than data, bombs of several kinds, files that are none, and values that are not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hostile.judge import PRUNE, RECIPE_FAULT, Case
from hostile.templates import Build, copy

MIB = 1 << 20
FILE = ("prune", "--recipe", "r.yaml", "--teacher", "teacher", "--out", "out")

RUN = """name: x
remove: !!python/object/apply:os.system ['touch "$CANARY"']
"""


def recipe(text: str | bytes, **others: str) -> Build:
    """``r.yaml``, other recipe files beside it, and the good teacher."""

    def build(work: Path) -> None:
        copy("unet", work / "teacher")
        (work / "r.yaml").write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        for name, other in others.items():
            (work / f"{name}.yaml").write_text(other)

    return build


def special(make: str) -> Build:
    def build(work: Path) -> None:
        copy("unet", work / "teacher")
        path = work / "r.yaml"
        match make:
            case "fifo":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
            case "device":
                path.symlink_to("/dev/zero")
            case "loop":
                path.symlink_to("r.yaml")

    return build


def refused(name: str, build: Build, *says: str, argv: tuple[str, ...] = FILE) -> Case:
    return Case("recipe", name, build, says, code=RECIPE_FAULT, argv=argv)


def usage(name: str, says: str, *options: str) -> Case:
    """Good files, and an option with a wrong value."""
    return Case("option", name, lambda work: copy("unet", work / "teacher"), (says,), RECIPE_FAULT, (*PRUNE, *options))


def alias_bomb() -> str:
    return "\n".join(["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)])


def chain(number: int, per_file: int) -> Mapping[str, str]:
    """Recipes of which each extends the next one ``per_file`` times."""
    files = {f"c{i}": f"name: c{i}\nextends: [{', '.join([f'./c{i + 1}.yaml'] * per_file)}]\n" for i in range(number)}
    return {**files, f"c{number}": f"name: c{number}\nremove: [mid]\n"}


TEXTS = {
    "empty": ("", "r.yaml:1:1", "not a mapping"),
    "a list": ("- a\n", "r.yaml:1:1", "not a mapping"),
    "a number": ("3\n", "r.yaml:1:1", "not a mapping"),
    "a name and nothing else": ("name: x\n", "r.yaml:1:1", "needs remove: or extends:"),
    "no name": ("remove: [mid]\n", "r.yaml:1:1", "no 'name'"),
    "a misspelt key": ("name: x\nremov: [mid]\n", "r.yaml:2:1", "did you mean 'remove'?"),
    "a misspelt selector": ("name: x\nremove:\n  - dwon.1\n", "r.yaml:3:5", "'dwon'"),
    "a number as a selector": ("name: x\nremove:\n  - 5\n", "r.yaml:3:5", "quote it"),
    "an object as a selector": ("name: x\nremove:\n  - {a: b}\n", "r.yaml:3:5", "'remove' is wrong"),
    "a path as a name": ("name: ../../etc/x\nremove: [mid]\n", "r.yaml:1:1", "'name' is wrong"),
    "an anchor": ("name: &a x\nremove: [mid]\n", "r.yaml:1:7", "anchors"),
    "an alias": ("name: x\nremove:\n  - *mid\n", "r.yaml:3:5", "aliases"),
    "an alias bomb": (alias_bomb(), "r.yaml:1:5", "anchors"),
    "a merge key": ("name: x\n<<: {remove: [mid]}\n", "r.yaml:2:1", "merge keys"),
    "a tag": ("name: !!str x\nremove: [mid]\n", "r.yaml:1:7", "tags"),
    "a tag that runs a command": (RUN, "r.yaml:2:9", "tags"),
    "a tag that makes an object": ("name: !!python/name:os.system x\n", "r.yaml:1:7", "tags"),
    "a key twice": ("name: x\nremove: [mid]\nname: y\n", "r.yaml:3:1", "stands twice"),
    "a second document": ("name: x\nremove: [mid]\n---\nname: y\n", "r.yaml:3:1", "second YAML document"),
    "a list that does not end": ("name: x\nremove: [mid\n", "r.yaml:", "not valid YAML"),
    "a tab": ("name: x\n\tremove: [mid]\n", "r.yaml:2:1", "not valid YAML"),
    "a key that is a number": ("1: x\n", "r.yaml:1:1", "key that is not text"),
    "a key that is a list": ("[a, b]: x\n", "r.yaml:1:1", "key that is not text"),
    "a date": ("name: 2020-01-01\nremove: [mid]\n", "r.yaml:1:7", "quote it"),
    "30 levels": ("name: x\nremove: " + "[" * 30 + "]" * 30 + "\n", "r.yaml:2:", "nested too deeply"),
    "100,000 levels": ("name: x\nremove: " + "[" * 100_000 + "\n", "r.yaml:2:", "nested too deeply"),
    "170,000 selectors": ("name: x\nremove:\n" + "- mid\n" * 170_000, "r.yaml:", "too many values"),
    "half a million commas": ("name: x\nremove: [" + "a," * 500_000 + "]\n", "r.yaml:", "too many values"),
    "100,000 keys": ("".join(f"k{i}: 1\n" for i in range(90_000)), "r.yaml:", "too many values"),
    "a text of a megabyte": ("name: x\nremove: [mid]\nsummary: '" + "y" * 1_000_000 + "'\n", "r.yaml:3:1", "500 char"),
    "a selector of a megabyte": ("name: x\nremove: ['" + "down." * 200_000 + "']\n", "r.yaml:2:10", "selector"),
    "a range of a billion": ("name: x\nremove: [down.1-999999999]\n", "r.yaml:2:10", "index belongs"),
    "a range of 9999": ("name: x\nremove: [down.1-9999]\n", "r.yaml:2:10", "names nothing"),
    "2 MiB": ("name: x\nremove: [mid]\n# " + "y" * 2 * MIB, "r.yaml", "too large"),
    "NUL": ("name: x\0\nremove: [mid]\n", "r.yaml", "not valid YAML"),
    "terminal codes": ("name: x\nremove: ['\x1b[2J']\n", "r.yaml", "not valid YAML"),
    "terminal codes, escaped": ('name: x\nremove: ["\\e[2J"]\n', "r.yaml:2:10", "\\u001b[2J"),
    "an unknown family": ("name: x\nremove: [mid]\nfamilies: [sd3]\n", "r.yaml:3:1", "unknown family 'sd3'"),
    "a stage that is not there": ("name: x\nremove: [down.7]\n", "r.yaml:2:10", "names nothing"),
    "everything": ("name: x\nremove: ['down.*', 'up.*', mid]\n", "r.yaml:2:", "level 0"),
    "what stock diffusers cannot hold": ("name: x\nremove: [up.1.layers.1]\n", "r.yaml:2:10", "rule 1"),
    "a circle": ("name: x\nextends: ./r.yaml\n", "r.yaml:2:1", "circle"),
    "an unknown base": ("name: x\nextends: bk_tyny\n", "r.yaml:2:1", "did you mean 'bk_tiny'?"),
    "a base that is not there": ("name: x\nextends: ./no.yaml\n", "r.yaml:2:1", "no.yaml does not exist"),
    "a base that is a device": ("name: x\nextends: /dev/zero\n", "r.yaml:2:1", "is not a file"),
}

RECIPE_CASES = (
    *(refused(name, recipe(text), *says) for name, (text, *says) in TEXTS.items()),
    refused("not UTF-8", recipe(b"name: \xff\xfe\n"), "r.yaml", "UTF-8"),
    refused("a chain of 30 files", recipe("name: x\nextends: ./c0.yaml\n", **chain(30, 1)), "too deeply"),
    refused(
        "a chain that doubles 19 times",
        recipe("name: x\nextends: ./c0.yaml\nremove: [up.9]\n", **chain(18, 2)),
        "names nothing",
    ),
    *(
        refused(f"{what} as the recipe", special(what), "r.yaml", "is not a file")
        for what in ("fifo", "folder", "device")
    ),
    refused("a link to itself as the recipe", special("loop"), "r.yaml", "is not a file"),
    refused(
        "no such recipe",
        recipe("name: x\n"),
        "did you mean 'bk_tiny'?",
        argv=("prune", "--recipe", "bk_tiny2", "--teacher", "teacher", "--out", "out"),
    ),
    refused(
        "a recipe for another family",
        recipe("name: x\n"),
        "koala_700m",
        "'bk_small'",
        argv=("prune", "--recipe", "koala_700m", "--teacher", "teacher", "--out", "out"),
    ),
    refused(
        "a text of a megabyte, shown",
        recipe("name: x\nremove: [" + "a" * MIB + "]"),
        "too large",
        argv=("recipes", "show", "r.yaml"),
    ),
    refused("an alias bomb, checked", recipe(alias_bomb()), "anchors", argv=("recipes", "check", "r.yaml")),
    # --- options ---
    usage("an unknown dtype", "no dtype 'int8'", "--dtype", "int8"),
    usage("a size that is none", "not a size", "--max-shard-size", "big"),
    usage("a size of nothing", "not a size", "--max-shard-size", "0"),
    usage("a size of NaN", "not a size", "--max-shard-size", "nanGB"),
    usage("a size of infinity", "not a size", "--max-shard-size", "infGB"),
    usage("a header of no size", "not a size", "--max-header", "-1"),
    usage("a teacher's id that is none", "not a Hub id", "--teacher-id", "a\n---\nlicense: mit"),
)
