"""The protocols that published models were judged by, as data. A preset is defaults: every option overrides its own.

Prompts are nobody's to bundle: each preset says which file holds them and where it comes from.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from unet_surgery.errors import UsageError, printable

__all__ = ["PRESETS", "Preset", "find_preset"]


@dataclass(frozen=True, slots=True)
class Preset:
    """A protocol: ``count`` prompts, drawn at ``size`` pixels; the rest is what the options of those names say.

    ``prompts`` says in words which file holds the prompts, and where it comes from; ``source`` who set the protocol.
    """

    name: str
    count: int
    prompts: str
    source: str
    size: int
    scheduler: str
    steps: int
    guidance: float
    seed: int
    resize: int | None = None
    jpeg: int | None = None


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="mscoco30k",
            count=30_000,
            prompts="BK-SDM's mscoco_val2014_30k/metadata.csv, which its scripts/get_mscoco_files.sh fetches",
            source="Nota-NetsPresso/BK-SDM: src/generate.py, src/utils/misc.py (PIL's default filter, JPEG twice)",
            size=512,
            scheduler="pndm",
            steps=25,
            guidance=7.5,
            seed=1234,
            resize=256,
            jpeg=75,
        ),
        Preset(
            name="mscoco5k",
            count=5_000,
            prompts="COCO's annotations/captions_val2017.json: the first caption of each of its 5,000 images",
            source="YangPanHZAU/Stable_diffusion_acceleration_and_lightweight: README (8, 16 or 20 steps; no seed "
            "given)",
            size=512,
            scheduler="dpmsolver++",
            steps=8,
            guidance=7.5,
            seed=0,
        ),
        Preset(
            name="hpsv2",
            count=800,
            prompts="one style's file of the dataset zhwang/HPDv2 on the Hub: benchmark/anime.json, concept-art.json, "
            "paintings.json or photo.json",
            source="YangPanHZAU/Stable_diffusion_acceleration_and_lightweight: README (8, 16 or 20 steps; no seed "
            "given); tgxs002/HPSv2: 800 prompts a style, saved by PIL as 00000.jpg on (its README, evaluation.py)",
            size=512,
            scheduler="dpmsolver++",
            steps=8,
            guidance=7.5,
            seed=0,
            jpeg=75,
        ),
    )
}


def find_preset(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        UsageError: there is none of that name; offers the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=1)
    raise UsageError(
        f"there is no preset {printable(name)}",
        expected=", ".join(PRESETS),
        hint=f"did you mean {close[0]}?" if close else None,
    )
