"""The networks of a run, loaded and checked: student, teacher, and the parts that make latents and embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unet_surgery.checkpoint.check import read_plan, unet_folder
from unet_surgery.checkpoint.components import INDEX
from unet_surgery.checkpoint.disk import Progress
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.student import PLAN
from unet_surgery.distill.config import RunConfig, Speed
from unet_surgery.distill.diffusion import NoiseSchedule
from unet_surgery.distill.fit import check_prediction, named_in, no_such_student, other_noise
from unet_surgery.distill.weights import DTYPES
from unet_surgery.errors import RunError, TeacherError, printable
from unet_surgery.hub import fetch_teacher, resolve_teacher
from unet_surgery.lower import SurgeryPlan
from unet_surgery.runtime.load import load_unet
from unet_surgery.runtime.parts import Parts, load_parts

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "Folders",
    "find_folders",
    "load_base",
    "load_student",
    "load_teacher",
    "own_schedule",
    "read_student_plan",
    "recompute",
    "refuse_compiling",
]

SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True, slots=True)
class Folders:
    """Where the networks of a run lie on this machine."""

    student: Path
    base: Path
    """The pipeline that brings VAE, text encoder, tokenizer and scheduler."""
    teachers: tuple[Path | None, ...]
    """One a stage."""


def find_folders(config: RunConfig, progress: Progress) -> Folders:
    """Return the folders of all networks that ``config`` names, fetched where they are on the Hub.

    Raises:
        SurgeryError: one is not there, or is no diffusers folder.
        RunError: neither student nor teacher is a whole pipeline, and ``base`` names none.
    """
    names = (config.student, config.base, *(stage.teacher for stage in config.stages))
    found = {name: _named(config, name, progress) for name in dict.fromkeys(names[1:]) if name is not None}
    try:
        found[config.student] = found.get(config.student) or _folder(config.student, progress)
    except TeacherError as error:
        if Path(config.student).expanduser().exists():
            raise
        raise no_such_student(config.student) from error
    candidates = [config.base] if config.base is not None else [config.student, *(s.teacher for s in config.stages)]
    base = next((found[name] for name in candidates if name is not None and (found[name] / INDEX).is_file()), None)
    if base is None:
        raise RunError(
            "no pipeline brings a VAE, a text encoder, a tokenizer and a scheduler",
            where=config.base or config.student,
            expected=f"a folder with {INDEX}",
            hint="name one under base:, such as the teacher's pipeline",
        )
    return Folders(found[config.student], base, tuple(found[s.teacher] if s.teacher else None for s in config.stages))


def _named(config: RunConfig, name: str, progress: Progress) -> Path:
    with named_in(config, name):
        return _folder(name, progress)


def _folder(name: str, progress: Progress) -> Path:
    folder = fetch_teacher(resolve_teacher(name), progress=progress).folder
    if not folder.is_dir():
        raise TeacherError(
            "training needs a diffusers folder",
            where=printable(name),
            found="a single file",
            hint="make one: unet-surgery prune --recipe … writes a folder from it",
        )
    return folder


def read_student_plan(folder: Path) -> SurgeryPlan | None:
    """Return the plan of a pruned folder, or None where there is none."""
    return read_plan(folder) if (folder / PLAN).is_file() else None


def load_student(folder: Path, config: RunConfig) -> UNet2DConditionModel:
    """Return the student in fp32 on the CPU: its weights, or new ones of the run's seed.

    Raises:
        VerificationError: diffusers cannot load it.
    """
    from diffusers import UNet2DConditionModel

    if config.init == "random":
        path = unet_folder(folder) / "config.json"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            unet = UNet2DConditionModel.from_config(read_object(path))
    else:
        unet = load_unet(folder)
    return unet.float().train()


def own_schedule(
    folder: Path, who: str, base: Mapping[str, Any], ours: NoiseSchedule, *, same_prediction: bool = True
) -> NoiseSchedule:
    """Return the schedule of the run, ``ours``, with what the network in ``folder`` predicts by its own scheduler.

    ``who`` it is: student or teacher. ``base`` is the config that ``ours`` was made of. A network without a scheduler
    predicts what the run's says. ``same_prediction``: predictions are compared as they are, so they must be of one
    kind; else they meet in x. The noise must be the same either way.

    Raises:
        RunError: it is another kind, or other noise: its outputs would teach nonsense, or be drawn as such.
        ConfigError: its scheduler cannot be used.
    """
    path = folder / SCHEDULER
    if not path.is_file():
        return ours
    config = read_object(path)
    if same_prediction:
        check_prediction(config, base, who, str(path))
    theirs = NoiseSchedule.from_config(config).to(ours.alphas_cumprod_T.device)
    tables = theirs.alphas_cumprod_T, ours.alphas_cumprod_T
    if len(tables[0]) != len(tables[1]) or not torch.allclose(*tables, rtol=1e-5):
        raise other_noise(config, base, who, str(path))
    return theirs


def load_teacher(folder: Path, speed: Speed, device: torch.device) -> UNet2DConditionModel:
    """Return a frozen teacher on ``device`` in the training dtype."""
    unet = load_unet(folder).eval().requires_grad_(False)
    moved = torch.nn.Module.to(unet, device=device, dtype=DTYPES[speed.dtype])  # diffusers' own warns of nothing
    return moved.to(memory_format=torch.channels_last) if speed.channels_last else moved


def refuse_compiling(device: torch.device, speed: Speed) -> None:
    """Refuse to compile where that gives wrong gradients.

    Torch 2.13's inductor on a CPU loses the gradient below an upsampler, without a word: the loss falls, and half of
    the network stands still.

    Raises:
        RunError: ``speed.compile`` on a CPU.
    """
    if speed.compile and device.type == "cpu":
        raise RunError(
            "torch.compile gives wrong gradients for U-Nets on a CPU",
            where="speed.compile",
            expected="false, or a GPU",
            found="true",
            hint="--set speed.compile=false: compiling gains nothing there either",
        )


def load_base(folder: Path, speed: Speed, device: torch.device) -> tuple[Parts, NoiseSchedule]:
    """Return the parts beside the U-Net, and the noise schedule that their scheduler says."""
    parts = load_parts(folder, device=device, dtype=DTYPES[speed.dtype], vae_dtype=torch.float32)
    return parts, NoiseSchedule.from_config(parts.scheduler_config).to(device)


def recompute(unet: Any, kind: str) -> None:
    """Set which activations are computed again in the backward instead of kept (Chen et al., arXiv 1604.06174)."""
    if kind == "none":
        return
    unet.enable_gradient_checkpointing()
    if kind == "high_resolution":
        finest = {id(m) for part in (unet.down_blocks[0], unet.up_blocks[-1]) for m in part.modules()}
        for module in unet.modules():
            if hasattr(module, "gradient_checkpointing") and id(module) not in finest:
                module.gradient_checkpointing = False
