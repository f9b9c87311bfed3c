"""A run's networks and data as far as configs tell: nothing large is fetched, no weights are needed, no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_surgery.checkpoint.check import read_plan, unet_folder
from unet_surgery.checkpoint.components import INDEX
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.student import CONFIG, PLAN
from unet_surgery.checkpoint.teacher import open_teacher
from unet_surgery.data.sides import check_side
from unet_surgery.distill.config import RunConfig
from unet_surgery.distill.fit import no_such_student
from unet_surgery.distill.partcosts import text_encoder_costs, vae_costs, vae_factor
from unet_surgery.errors import DataError, MissingExtraError, RunError, TeacherError, printable
from unet_surgery.graph import parse_config
from unet_surgery.hub import resolve_teacher
from unet_surgery.hub.resolve import ResolvedTeacher
from unet_surgery.lower import SurgeryPlan

__all__ = ["Data", "Network", "Parts", "read_data", "read_network", "read_parts", "read_student"]

SCHEDULER_CONFIG = "scheduler_config.json"
USUAL_FACTOR = 8
"""Pixels of a side to a latent, of every VAE of SD v1, v2 and XL."""
TOY_SIDE = 32


@dataclass(frozen=True, slots=True)
class Network:
    """A U-Net by its config.json. ``folder`` is its pipeline's or its own; None where there is a plan alone."""

    name: str
    config: Mapping[str, Any]
    folder: Path | None
    plan: SurgeryPlan | None = None

    @property
    def scheduler(self) -> Mapping[str, Any] | None:
        """The config of its pipeline's scheduler; None where it has none."""
        path = None if self.folder is None else self.folder / "scheduler" / SCHEDULER_CONFIG
        return None if path is None or not path.is_file() else read_object(path)


@dataclass(frozen=True, slots=True)
class Parts:
    """The configs of the parts beside the U-Net; None where they are not known."""

    vae: Mapping[str, Any] | None = None
    text_encoder: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None

    @property
    def factor(self) -> int:
        """Pixels of a side to a latent."""
        return USUAL_FACTOR if self.vae is None else vae_factor(self.vae)

    @property
    def params(self) -> tuple[int, int]:
        """Parameters of the VAE and of the text encoder, 0 where unknown."""
        vae = 0 if self.vae is None else vae_costs(self.vae, (self.factor, self.factor)).params
        return vae, 0 if self.text_encoder is None else text_encoder_costs(self.text_encoder).params


@dataclass(frozen=True, slots=True)
class Data:
    """What is known of the data. ``online``: pictures are encoded as they come. None: only opening them would tell."""

    latent_size: tuple[int, int]
    channels: int | None
    online: bool
    num_samples: int | None = None
    num_bytes: int | None = None


def read_network(name: str) -> Network:
    """Return the U-Net called ``name`` (folder, built-in name or Hub id); of the Hub, configs alone are fetched.

    Raises:
        SurgeryError: there is none, or it cannot be trained with.
    """
    found = resolve_teacher(name)
    if found.file is not None:
        raise TeacherError(
            "training needs a diffusers folder",
            where=printable(name),
            found="a single file",
            hint="make one: unet-surgery prune --recipe … writes a folder from it",
        )
    _fetch_part_configs(found)
    plan = read_plan(found.folder) if (found.folder / PLAN).is_file() else None
    if plan is not None and not (unet_folder(found.folder) / CONFIG).is_file():
        return Network(name, plan.student_config, None, plan)
    return Network(name, open_teacher(found.folder, config_only=True).config, found.folder, plan)


def _fetch_part_configs(found: ResolvedTeacher) -> None:
    if found.hub is not None:
        found.hub.part_configs()


def read_student(name: str) -> Network:
    """Return a run's student: a pruned folder, or as :func:`read_network`; or the plan.json of one not yet made.

    Raises:
        RunError: there is none.
        SurgeryError: as :func:`read_network`.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file() and path.suffix == ".json":
        plan = read_plan(path)
        return Network(name, plan.student_config, None, plan)
    try:
        found = read_network(name)
    except TeacherError as error:
        if path.exists():
            raise
        raise no_such_student(name) from error
    parse_config(found.config)
    return found


def read_parts(config: RunConfig, networks: Mapping[str, Network]) -> Parts:
    """Return the configs of the parts beside the U-Net, from where a run takes them.

    Raises:
        RunError: no pipeline brings them.
        SurgeryError: ``base`` is none.
    """
    names = [config.base] if config.base is not None else [config.student, *(s.teacher for s in config.stages)]
    for name in dict.fromkeys(name for name in names if name is not None):
        network = networks.get(name) or read_network(name)
        folder = network.folder
        if folder is not None and (folder / INDEX).is_file():
            vae, text = folder / "vae" / CONFIG, folder / "text_encoder" / CONFIG
            return Parts(
                read_object(vae) if vae.is_file() else None,
                read_object(text) if text.is_file() else None,
                network.scheduler,
            )
    raise RunError(
        "no pipeline brings a VAE, a text encoder, a tokenizer and a scheduler",
        where=config.base or config.student,
        expected=f"a folder with {INDEX}",
        hint="name one under base:, such as the teacher's pipeline",
    )


def read_data(config: RunConfig, parts: Parts) -> Data:
    """Return what configs tell of a run's data.

    Raises:
        DataError: it is not there.
        UsageError: its resolution does not fit the VAE.
        MissingExtraError: pyarrow, which caches need, is not installed.
    """
    data = config.data
    if data.cache is not None:
        try:
            from unet_surgery.data.cachefolder import read_facts
        except ImportError as error:
            raise MissingExtraError(
                "pyarrow is needed for latent caches", hint="pip install 'unet-surgery[train]'"
            ) from error
        facts = read_facts(Path(data.cache))
        channels, height, width = facts.settings.moments_shape
        num_bytes = sum(shard.num_bytes for shard in facts.shards.values())
        num_samples = facts.count * (1 + facts.settings.flip)
        return Data((height, width), channels // 2, online=False, num_samples=num_samples, num_bytes=num_bytes)
    if data.images is not None:
        _check_pictures(data.images, data.resolution, parts.factor)
        side = data.resolution // parts.factor
        return Data((side, side), None, online=True)
    assert data.toy is not None
    side = TOY_SIDE // parts.factor
    return Data((side, side), None, online=False, num_samples=data.toy.count)


def _check_pictures(name: str, resolution: int, factor: int) -> None:
    check_side(resolution, factor)
    path = Path(name)
    may_be_many = "{" in name or name.startswith("hub:") or (name.count("/") == 1 and not path.parent.is_dir())
    if not may_be_many and not path.exists():
        raise DataError("there is no such training data", where=printable(name))
