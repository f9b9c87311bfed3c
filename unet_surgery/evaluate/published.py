"""Published block-removed U-Nets: exact sizes, and the scores that their authors report, with the source of each.

Sizes were counted from the published configs, by instantiating each. Scores are the authors' own, of the whole
pipelines: facts to stand beside one's own numbers, never mixed with them unmarked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unet_surgery.data.publishedsets import COCO_STATISTICS
from unet_surgery.data.statisticsnote import StatisticsNote
from unet_surgery.sample.presets import PRESETS, Preset
from unet_surgery.sample.schedulers import SCHEDULERS

__all__ = ["MODELS", "PROTOCOL", "PublishedModel", "PublishedProtocol", "models_of_size"]


@dataclass(frozen=True, slots=True)
class PublishedProtocol:
    """How the pictures behind published scores were drawn and measured, as far as it is published.

    ``preset`` draws them so; ``filter`` is what made them smaller; ``reference`` is what FID compares them with.
    """

    preset: Preset
    source: str
    prompts: str
    filter: str
    reference: StatisticsNote
    clip: str

    @property
    def count(self) -> int:
        return self.preset.count

    @property
    def side(self) -> int:
        """Of the pictures that are scored."""
        return self.preset.resize or self.preset.size

    @property
    def scheduler(self) -> str:
        return SCHEDULERS[self.preset.scheduler].class_name

    def words(self) -> str:
        """Return the protocol in a line."""
        return (
            f"{self.count:,} pictures of {self.side}×{self.side} for {self.prompts}, drawn at "
            f"{self.preset.size}×{self.preset.size}, {self.scheduler.removesuffix('Scheduler')} {self.preset.steps} "
            f"steps, guidance {self.preset.guidance:g}"
        )


PROTOCOL = PublishedProtocol(
    preset=PRESETS["mscoco30k"],  # its seed is of the repository's generate.py; the card says nothing of it
    source="BK-SDM, MODEL_CARD.md (github.com/Nota-NetsPresso/BK-SDM)",
    prompts="MS-COCO 2014 validation captions",
    filter="bicubic",
    reference=COCO_STATISTICS,
    clip="ViT-g/14",
)


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A published U-Net. MACs are one forward of batch 1 on ``latent`` × ``latent``, in units of 10⁹.

    ``gmacs`` counts convolutions and linear layers, as the BK-SDM paper does, ``gmacs_all`` the products of attention
    too. ``recipe`` makes it of ``base``, a U-Net of this table (None: it is a teacher). ``scores`` are by
    :data:`PROTOCOL`; empty where none were published by it.
    """

    name: str
    base: str | None
    recipe: str | None
    parameters: int
    tensors: int
    gmacs: float | None
    gmacs_all: float
    latent: int
    scores: Mapping[str, float] = field(default_factory=dict)


def _scores(fid: float, inception: float, clip: float) -> dict[str, float]:
    return {"fid": fid, "is": inception, "clip": clip}


_V1, _V2, _V2_768, _XL = "SD v1.4", "SD v2.1-base", "SD v2.1 (768)", "SDXL base"

MODELS: Sequence[PublishedModel] = (
    PublishedModel(_V1, None, None, 859_520_964, 686, 338.6, 401.6, 64, _scores(13.05, 36.76, 0.2958)),
    PublishedModel("BK-SDM-Base", _V1, "bk_base", 579_384_964, 442, 223.7, 261.5, 64, _scores(15.76, 33.79, 0.2878)),
    PublishedModel("BK-SDM-Base-2M", _V1, "bk_base", 579_384_964, 442, 223.7, 261.5, 64, _scores(14.81, 34.17, 0.2883)),
    PublishedModel("BK-SDM-Small", _V1, "bk_small", 482_346_884, 396, 217.6, 255.4, 64, _scores(16.98, 31.68, 0.2677)),
    PublishedModel(
        "BK-SDM-Small-2M", _V1, "bk_small", 482_346_884, 396, 217.6, 255.4, 64, _scores(17.05, 33.10, 0.2734)
    ),
    PublishedModel("BK-SDM-Tiny", _V1, "bk_tiny", 323_384_964, 358, 205.0, 242.8, 64, _scores(17.12, 30.09, 0.2653)),
    PublishedModel("BK-SDM-Tiny-2M", _V1, "bk_tiny", 323_384_964, 358, 205.0, 242.8, 64, _scores(17.53, 31.32, 0.2690)),
    PublishedModel("OFA-Sys small-stable-diffusion-v0", _V1, "ofa_small", 579_384_964, 442, 223.7, 261.5, 64),
    PublishedModel("segmind small-sd", _V1, "segmind_small", 579_384_964, 442, 223.7, 261.5, 64),
    PublishedModel("segmind tiny-sd", _V1, "segmind_tiny", 323_384_964, 358, 205.0, 242.8, 64),
    PublishedModel("SDXS-512-DreamShaper", _V1, "sdxs_512", 315_746_244, 280, 179.7, 184.7, 64),
    PublishedModel(_V2, None, None, 865_910_724, 686, 339.1, 402.1, 64, _scores(13.93, 35.93, 0.3075)),
    PublishedModel("BK-SDM-v2-Base", _V2, "bk_base", 583_480_964, 442, 224.0, 261.8, 64, _scores(15.85, 31.70, 0.2868)),
    PublishedModel(
        "BK-SDM-v2-Small", _V2, "bk_small", 485_787_524, 396, 217.9, 255.7, 64, _scores(16.61, 31.73, 0.2901)
    ),
    PublishedModel("BK-SDM-v2-Tiny", _V2, "bk_tiny", 326_825_604, 358, 205.2, 243.0, 64, _scores(15.68, 31.64, 0.2897)),
    PublishedModel(_V2_768, None, None, 865_910_724, 686, 760.5, 1074.6, 96),
    PublishedModel("BK-SDM-v2-Base (768)", _V2_768, "bk_base", 583_480_964, 442, None, 690.8, 96),
    PublishedModel("BK-SDM-v2-Small (768)", _V2_768, "bk_small", 485_787_524, 396, None, 677.3, 96),
    PublishedModel("BK-SDM-v2-Tiny (768)", _V2_768, "bk_tiny", 326_825_604, 358, None, 648.8, 96),
    PublishedModel(_XL, None, None, 2_567_463_684, 1680, 2988.7, 3380.6, 128),
    PublishedModel("SSD-1B", _XL, "ssd_1b", 1_331_334_404, 944, 1853.8, 2103.9, 128),
    PublishedModel("KOALA-700M", _XL, "koala_700m", 782_822_724, 584, 1176.2, 1350.8, 128),
)


def models_of_size(parameters: int) -> list[PublishedModel]:
    """Return the published U-Nets of exactly so many parameters."""
    return [model for model in MODELS if model.parameters == parameters]
