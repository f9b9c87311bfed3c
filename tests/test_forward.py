"""Students against surgery by hand: the teacher's diffusers modules, cut with ``del`` and slices; equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import CONFIGS
from diffusers import UNet2DConditionModel
from torch import nn

import unet_surgery
from unet_surgery.recipe import Recipe
from unet_surgery.runtime import load_unet


class Skip(nn.Module):
    """An attention that is not there."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return (hidden,)


def base(unet: Any) -> None:
    for block in (*unet.down_blocks, *unet.up_blocks):
        del block.resnets[1]
        if hasattr(block, "attentions"):
            del block.attentions[1]


def small(unet: Any) -> None:
    base(unet)
    unet.mid_block = None


def tiny(unet: Any) -> None:
    small(unet)
    unet.down_blocks = unet.down_blocks[:3]
    unet.down_blocks[2].downsamplers = None
    unet.up_blocks = unet.up_blocks[1:]


def sdxs(unet: Any) -> None:
    tiny(unet)
    for block in (unet.down_blocks[0], unet.up_blocks[2]):
        for k in range(len(block.attentions)):
            block.attentions[k] = Skip()


def koala(unet: Any) -> None:
    small(unet)
    for block in (unet.down_blocks[2], unet.up_blocks[0]):
        for attention in block.attentions:
            attention.transformer_blocks = attention.transformer_blocks[:5]


def ssd(unet: Any) -> None:
    unet.mid_block.resnets = unet.mid_block.resnets[:1]
    unet.mid_block.attentions = nn.ModuleList()
    for attention in (*unet.down_blocks[2].attentions, *unet.up_blocks[0].attentions[:2]):
        attention.transformer_blocks = attention.transformer_blocks[:4]
    for attention in unet.up_blocks[1].attentions[1:]:
        attention.transformer_blocks = attention.transformer_blocks[:1]


BY_HAND: dict[str, Callable[[Any], None]] = {
    "bk_base": base,
    "bk_small": small,
    "bk_tiny": tiny,
    "ofa_small": base,
    "segmind_small": base,
    "segmind_tiny": tiny,
    "sdxs_512": sdxs,
    "koala_700m": koala,
    "ssd_1b": ssd,
}
FAMILIES = ("sd1", "sd1-inpaint", "sd2", "sdxl")
CASES = [
    (recipe, name)
    for recipe in BY_HAND
    for name in FAMILIES
    if name.split("-")[0] in (unet_surgery.load_recipe(recipe).families or ())
]


def forward(unet: UNet2DConditionModel, config: dict[str, Any]) -> torch.Tensor:
    """Run on seeded noise at 16x16, so that every level has more than one pixel."""
    noise = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {}
    if config.get("addition_embed_type"):
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        text = torch.randn(2, width, generator=noise)
        inputs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return unet.eval()(
            torch.randn(2, config["in_channels"], 16, 16, generator=noise),
            torch.tensor([10, 900]),
            encoder_hidden_states=torch.randn(2, 7, 12, generator=noise),
            **inputs,
        ).sample


def teacher_cut_by_hand(folder: Path, cut: Callable[[Any], None]) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False)
    cut(unet)
    return unet


@pytest.mark.parametrize(("recipe", "name"), CASES, ids=[f"{r}-{n}" for r, n in CASES])
def test_student_equals_surgery_by_hand(recipe: str, name: str, unet_folders: dict[str, Path], tmp_path: Path) -> None:
    result = unet_surgery.prune(recipe, unet_folders[name], tmp_path / "student")
    student = load_unet(result.folder)
    assert sum(p.numel() for p in student.parameters()) == result.plan.student.params
    by_hand = teacher_cut_by_hand(unet_folders[name], BY_HAND[recipe])
    assert torch.equal(forward(student, CONFIGS[name]), forward(by_hand, CONFIGS[name]))


def drop_attention(side: str, i: int, k: int) -> Callable[[Any], None]:
    def cut(unet: Any) -> None:
        getattr(unet, f"{side}_blocks")[i].attentions[k] = Skip()

    return cut


def drop_mid_attention(unet: Any) -> None:
    unet.mid_block.attentions[0] = Skip()


def drop_empty_stage(unet: Any) -> None:
    for block, kept in ((unet.down_blocks[3], ()), (unet.up_blocks[0], (2,))):
        block.resnets = nn.ModuleList([block.resnets[j] for j in kept])


def keep_second_down_layer(unet: Any) -> None:
    for block, gone in ((unet.down_blocks[0], 0), (unet.up_blocks[3], 1)):
        del block.resnets[gone]
        del block.attentions[gone]


def drop_middle_block(unet: Any) -> None:
    attention = unet.up_blocks[2].attentions[1]
    attention.transformer_blocks = nn.ModuleList([attention.transformer_blocks[k] for k in (0, 2)])


OTHERS = [
    ("sd1", ["down.1.attentions.0"], drop_attention("down", 1, 0), False),
    ("sd1", ["up.2.attentions.1"], drop_attention("up", 2, 1), False),
    ("sd1", ["mid.attentions.0"], drop_mid_attention, False),
    ("sd2", ["down.2.attentions.1"], drop_attention("down", 2, 1), False),
    ("sd1", ["down.0.layers.0", "up.3.layers.1"], keep_second_down_layer, False),
    ("sd1", ["down.3.layers.*", "up.0.layers.0-1"], drop_empty_stage, True),
    ("deep", ["up.2.attentions.1.transformer_blocks.1"], drop_middle_block, False),
]


@pytest.mark.parametrize(
    ("name", "selectors", "cut", "allow"), OTHERS, ids=[f"{o[0]}-{'+'.join(o[1])}" for o in OTHERS]
)
def test_other_removals_equal_surgery_by_hand(
    name: str,
    selectors: list[str],
    cut: Callable[[Any], None],
    allow: bool,
    unet_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    recipe = Recipe(name="other", remove=tuple(selectors), allow_skip_change=allow)
    result = unet_surgery.prune(recipe, unet_folders[name], tmp_path / "student")
    by_hand = teacher_cut_by_hand(unet_folders[name], cut)
    assert torch.equal(forward(load_unet(result.folder), CONFIGS[name]), forward(by_hand, CONFIGS[name]))
