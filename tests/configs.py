"""U-Net configs: full-size published ones, for counts, and small ones of every shape, for weights and forwards."""

from __future__ import annotations

from typing import Any

from unet_surgery.checkpoint.bundled import bundled_folder
from unet_surgery.checkpoint.jsonfile import read_object

Config = dict[str, Any]


def published(name: str) -> Config:
    return read_object(bundled_folder(name) / "config.json")


FULL_SIZE: dict[str, Config] = {
    "sd1": published("sd-v1-random"),
    "sd2": published("sd-v2-random"),
    "sd2-768": published("sd-v2-768-random"),
    "sdxl": published("sdxl-random"),
}

_SMALL = {"sample_size": 8, "norm_num_groups": 4, "block_out_channels": [8, 16, 32, 32], "cross_attention_dim": 12}
_SD1 = {**FULL_SIZE["sd1"], **_SMALL, "attention_head_dim": 2}
_SD2 = {**FULL_SIZE["sd2"], **_SMALL, "attention_head_dim": [1, 2, 4, 4]}
_SDXL = {
    **FULL_SIZE["sdxl"],
    "sample_size": 8,
    "norm_num_groups": 4,
    "block_out_channels": [8, 16, 32],
    "attention_head_dim": [1, 2, 4],
    "cross_attention_dim": 12,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
}
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def stages(*attention: bool) -> Config:
    """Return the stage types of levels with and without attention, the same on both sides."""
    down = [CROSS if a else PLAIN for a in attention]
    return {"down_block_types": down, "up_block_types": [name.replace("Down", "Up") for name in reversed(down)]}


# name → config; the small twin of what users bring
CONFIGS: dict[str, Config] = {
    "sd1": _SD1,
    "sd1-inpaint": {**_SD1, "in_channels": 9},
    "sd2": _SD2,
    "sd2-depth": {**_SD2, "in_channels": 5},
    "sdxl": _SDXL,
    "upscale": {
        **_SD2,
        "in_channels": 7,
        "block_out_channels": [8, 16, 16, 32],
        "attention_head_dim": 2,
        "num_class_embeds": 10,
        "only_cross_attention": [True, True, True, False],
        **stages(False, True, True, True),
    },
    "two-levels": {**_SD1, "block_out_channels": [8, 16], **stages(True, True)},
    "three-equal": {**_SD1, "block_out_channels": [16, 16, 16], **stages(True, True, False)},
    "five-levels": {
        **_SD2,
        "block_out_channels": [8, 16, 16, 32, 32],
        "attention_head_dim": [1, 2, 2, 4, 4],
        **stages(True, True, True, True, False),
    },
    "three-layers": {**_SD1, "layers_per_block": 3},
    "mixed-layers": {**_SD1, "layers_per_block": [1, 2, 3, 2]},
    "deep": {**_SD2, "transformer_layers_per_block": [1, 3, 2, 1]},
    "one-sided": {**_SD1, "down_block_types": [PLAIN, CROSS, CROSS, PLAIN]},
    "resnet-mid": {**_SD1, "mid_block_type": "UNetMidBlock2D"},
    "no-mid": {**_SD1, "mid_block_type": None},
    "nested": {
        **_SD2,
        "transformer_layers_per_block": [1, [2, 1], 2, 1],
        "reverse_transformer_layers_per_block": [1, [2, 2, 1], 2, [1, 2, 1]],
    },
    "embeddings": {
        **_SD1,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 6,
        "class_embeddings_concat": True,
        "time_cond_proj_dim": 5,
        "resnet_time_scale_shift": "scale_shift",
        "conv_in_kernel": 5,
    },
    "timestep-class": {**_SD1, "class_embed_type": "timestep", "time_embedding_dim": 24},
    "simple-class": {
        **_SD1,
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 6,
        "cross_attention_dim": [12, 8, 8, 8],
        "only_cross_attention": True,
    },
    "odd-heads": {**_SD1, "attention_head_dim": [3, 5, 7, 1]},
}
