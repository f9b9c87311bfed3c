"""MACs against torch's FLOP counter on diffusers' modules, without a device: an independent count of the same thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from configs import CONFIGS, FULL_SIZE
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from unet_surgery.graph import build, parse_config
from unet_surgery.lower import CONTEXT_TOKENS, count

ALL = {**CONFIGS, **{f"full-{name}": config for name, config in FULL_SIZE.items()}}


def counted(config: dict[str, Any]) -> tuple[int, int]:
    """Return (conv+linear, all) MACs of one forward at batch 1, by operator."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).eval()
        size = config["sample_size"]
        context = config["cross_attention_dim"]
        inputs: dict[str, Any] = {}
        if config.get("addition_embed_type"):
            width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            inputs["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, width), "time_ids": torch.zeros(1, 6)}
        if config.get("class_embed_type") in ("projection", "simple_projection"):
            inputs["class_labels"] = torch.zeros(1, config["projection_class_embeddings_input_dim"])
        elif config.get("num_class_embeds") or config.get("class_embed_type"):
            inputs["class_labels"] = torch.zeros(1, dtype=torch.long)
        if config.get("time_cond_proj_dim"):
            inputs["timestep_cond"] = torch.zeros(1, config["time_cond_proj_dim"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(
                torch.zeros(1, config["in_channels"], size, size),
                torch.zeros(1),
                encoder_hidden_states=torch.zeros(1, CONTEXT_TOKENS, context),
                **inputs,
            )
    flops = {str(operator): number for operator, number in counter.get_flop_counts()["Global"].items()}
    attention = sum(number for name, number in flops.items() if "dot_product" in name or "bmm" in name)
    total = sum(flops.values())
    assert attention > 0
    assert attention < total
    return (total - attention) // 2, total // 2


# a cross_attention_dim by stage has no single context to feed, so diffusers itself cannot run that config
RUNNABLE = sorted(name for name in ALL if isinstance(ALL[name]["cross_attention_dim"], int))
SLOW = {"full-sdxl", "full-sd2", "full-sd2-768"}
EXTRA = pytest.mark.extra


@pytest.mark.parametrize("name", [pytest.param(name, marks=EXTRA if name in SLOW else ()) for name in RUNNABLE])
def test_macs_are_torchs(name: str) -> None:
    counts = count(build(parse_config(ALL[name])))
    assert (counts.macs, counts.macs_all) == counted(ALL[name])


def test_enough_is_compared() -> None:
    assert len(RUNNABLE) >= 22
    assert any(ALL[name].get("only_cross_attention") for name in RUNNABLE)
