"""The runs of ``prune`` that faults are tried on: small teachers, recipes, and what is on disk before the run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from configs import CONFIGS, stages
from safetensors.numpy import save_file
from teachers import WEIGHTS, folder_bytes, random_tensors, write_unet

import unet_surgery

__all__ = ["ASIDE", "OUT", "SCENARIOS", "STAGING", "Prepared", "Scenario", "prepared"]

OUT, STAGING, ASIDE = "out", ".out.unet-surgery", ".out.replaced.unet-surgery"
HIDDEN = (STAGING, ASIDE)

TINY = {**CONFIGS["two-levels"], "block_out_channels": [8, 8], "layers_per_block": 1, **stages(False, True)}
OLD = ("mid.attentions.0", "mid.resnets.1")
BYPASS = ("up.0.attentions.0",)
FEW = ("mid", "down.1", "up.0")  # few tensors remain, and so few writes

FP16 = ("--dtype", "fp16")
SHARDS, MANY_SHARDS = ("--max-shard-size", "20KB"), ("--max-shard-size", "6KB")

Files = dict[str, bytes]


@dataclass(frozen=True)
class Scenario:
    """A run of ``prune``: of which teacher (unet, sharded, pipeline), how, and with what on disk before it.

    ``before``: nothing; an ``old`` student (``--force``); ``stale``, a staging folder that a dead run left; or, where
    folders cannot be swapped, an old student that a dead run left set ``aside``, alone or beside the output (``both``).
    ``swap`` False is a system without renameat2.
    """

    teacher: str
    before: str = ""
    remove: tuple[str, ...] = ("mid",)
    options: tuple[str, ...] = ()
    swap: bool = True

    @property
    def force(self) -> bool:
        return self.before in ("old", "aside", "both")


SCENARIOS = {
    "unet-fresh": Scenario("unet"),
    "unet-force": Scenario("unet", "old"),
    "unet-stale": Scenario("unet", "stale"),
    "sharded-fresh": Scenario("sharded", options=SHARDS),
    "sharded-force": Scenario("sharded", "old", options=SHARDS),
    "pipeline-fresh": Scenario("pipeline"),
    "pipeline-force": Scenario("pipeline", "old"),
    "pipeline-stale": Scenario("pipeline", "stale"),
    "link-fresh": Scenario("pipeline", options=("--link",)),
    "link-force": Scenario("pipeline", "old", options=("--link",)),
    "fp16-fresh": Scenario("unet", remove=FEW, options=FP16),
    "fp16-force": Scenario("sharded", "old", remove=FEW, options=(*FP16, *MANY_SHARDS)),
    "bypass-fresh": Scenario("unet", remove=BYPASS),
    "bypass-force": Scenario("unet", "old", remove=BYPASS),
    "noswap-fresh": Scenario("unet", swap=False),
    "noswap-force": Scenario("unet", "old", swap=False),
    "noswap-aside": Scenario("unet", "aside", swap=False),
    "noswap-both": Scenario("unet", "both", swap=False),
}


@dataclass(frozen=True)
class Prepared:
    """A scenario on disk: its teacher and recipe, and what the student before it and its own must be, byte for byte."""

    scenario: Scenario
    root: Path
    teacher: Path
    teacher_bytes: Files
    old: Files
    new: Files

    def arguments(self, folder: Path, *, force: bool) -> list[str]:
        """Return the command line that writes ``folder``/out."""
        command = ["prune", "-q", "-r", str(self.root / "new.yaml"), "-t", str(self.teacher), "-o", str(folder / OUT)]
        return [*command, *self.scenario.options, *(["--force"] if force else [])]

    def set_up(self, folder: Path) -> None:
        """Make ``folder`` and what is in it before the run."""
        before, old = self.scenario.before, self.root / "old"
        folder.mkdir()
        if before in ("old", "both"):
            shutil.copytree(old, folder / OUT)
        if before in ("aside", "both"):
            shutil.copytree(old, folder / ASIDE)
        if before in ("stale", "aside"):
            shutil.copytree(old, folder / STAGING)
            (folder / STAGING / "plan.json").unlink()
            (folder / STAGING / "more").mkdir()
            (folder / STAGING / "more" / "link").symlink_to(self.teacher)

    def is_untouched(self, folder: Path) -> bool:
        """True if what a dead run left is there as this run found it: it was stopped before it took that."""
        fresh = self.root / "fresh"
        self.set_up(fresh)
        same = all(_content(folder / name) == _content(fresh / name) for name in HIDDEN)
        shutil.rmtree(fresh)
        return same


@contextmanager
def prepared(scenario: Scenario) -> Iterator[Prepared]:
    """Write a scenario's teacher, recipe and students to a temporary folder; imports all that ``prune`` needs."""
    with tempfile.TemporaryDirectory(prefix="unet-surgery-faults-") as name:
        root = Path(name)
        teacher = _write_teacher(root / "teacher", scenario.teacher)
        (teacher / "README.md").write_text("---\nlicense: mit\n---\n")  # else prune says that there is none
        options = dict(zip(scenario.options[::2], scenario.options[1::2], strict=False))
        students = {}
        for recipe, remove in (("old", OLD), ("new", scenario.remove)):
            (root / f"{recipe}.yaml").write_text(yaml.safe_dump({"name": recipe, "remove": list(remove)}))
            student = unet_surgery.prune(
                root / f"{recipe}.yaml",
                teacher,
                root / recipe,
                dtype=options.get("--dtype"),
                max_shard_size=options.get("--max-shard-size", "10GB"),
            )
            unet_surgery.check(student.folder, teacher)
            students[recipe] = folder_bytes(student.folder)
        assert students["new"] != students["old"]
        yield Prepared(scenario, root, teacher, folder_bytes(teacher), students["old"], students["new"])


def _content(folder: Path) -> dict[str, bytes | None] | None:
    if not os.path.lexists(folder):
        return None
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def _write_teacher(folder: Path, kind: str) -> Path:
    if kind == "unet":
        return write_unet(folder, TINY)
    if kind == "sharded":
        return _write_shards(folder)
    write_unet(folder / "unet", TINY)
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "PNDMScheduler"}
    index = {"_class_name": "StableDiffusionPipeline", **{part: ["diffusers", name] for part, name in parts.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    save_file({"x": np.arange(30_000, dtype=np.float32)}, folder / "vae" / WEIGHTS)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "PNDMScheduler"}))
    return folder


def _write_shards(folder: Path) -> Path:
    """Write two shards, neighbours together as diffusers writes them, so that there are few ranges to copy."""
    tensors = random_tensors(TINY)
    write_unet(folder, TINY, tensors)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": {}}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return folder
