"""The original names of VAEs and text encoders, both ways: one table of pairs each.

In a pair, ``{i}`` and ``{j}`` stand for numbers that both names have, and ``{leaf}`` for weight or bias. ``{up}`` is
a stage of the VAE's decoder, which the original layout counts from the finest level, diffusers from the coarsest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

__all__ = ["OPEN_CLIP", "VAE", "VAE_ATTENTION", "VAE_ATTENTION_BEFORE", "Pairs", "num_up_stages", "translate"]

Pairs = tuple[tuple[str, str], ...]
"""(diffusers' name, the original one)."""

_VAE_RESNET = (("conv_shortcut", "nin_shortcut"), *((name, name) for name in ("norm1", "conv1", "norm2", "conv2")))
_VAE_RESNETS = (
    ("encoder.down_blocks.{i}.resnets.{j}", "encoder.down.{i}.block.{j}"),
    ("encoder.mid_block.resnets.0", "encoder.mid.block_1"),
    ("encoder.mid_block.resnets.1", "encoder.mid.block_2"),
    ("decoder.mid_block.resnets.0", "decoder.mid.block_1"),
    ("decoder.mid_block.resnets.1", "decoder.mid.block_2"),
    ("decoder.up_blocks.{up}.resnets.{j}", "decoder.up.{up}.block.{j}"),
)


def _with_leaves(pairs: Iterable[tuple[str, str]]) -> Pairs:
    return tuple((f"{ours}.{{leaf}}", f"{original}.{{leaf}}") for ours, original in pairs)


def _vae_attention(*pairs: tuple[str, str]) -> Pairs:
    return _with_leaves(
        (f"{side}.mid_block.attentions.0.{ours}", f"{side}.mid.attn_1.{original}")
        for side in ("encoder", "decoder")
        for ours, original in pairs
    )


VAE: Pairs = _with_leaves(
    (
        *((f"{a}.{x}", f"{b}.{y}") for a, b in _VAE_RESNETS for x, y in _VAE_RESNET),
        *((f"{side}.conv_in", f"{side}.conv_in") for side in ("encoder", "decoder")),
        *((f"{side}.conv_norm_out", f"{side}.norm_out") for side in ("encoder", "decoder")),
        *((f"{side}.conv_out", f"{side}.conv_out") for side in ("encoder", "decoder")),
        ("encoder.down_blocks.{i}.downsamplers.0.conv", "encoder.down.{i}.downsample.conv"),
        ("decoder.up_blocks.{up}.upsamplers.0.conv", "decoder.up.{up}.upsample.conv"),
        ("quant_conv", "quant_conv"),
        ("post_quant_conv", "post_quant_conv"),
    )
) + _vae_attention(("group_norm", "norm"))

VAE_ATTENTION: Pairs = _vae_attention(("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
"""Linear layers in diffusers, convolutions of one pixel in the original."""

VAE_ATTENTION_BEFORE: Pairs = _vae_attention(("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out"))
"""The same by the names that diffusers gave them before 0.18."""

_LAYER, _BLOCK = "text_model.encoder.layers.{i}", "transformer.resblocks.{i}"
OPEN_CLIP: Pairs = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    *_with_leaves(
        (
            ("text_model.final_layer_norm", "ln_final"),
            (f"{_LAYER}.layer_norm1", f"{_BLOCK}.ln_1"),
            (f"{_LAYER}.layer_norm2", f"{_BLOCK}.ln_2"),
            (f"{_LAYER}.mlp.fc1", f"{_BLOCK}.mlp.c_fc"),
            (f"{_LAYER}.mlp.fc2", f"{_BLOCK}.mlp.c_proj"),
            (f"{_LAYER}.self_attn.out_proj", f"{_BLOCK}.attn.out_proj"),
        )
    ),
)
"""Without the projections of queries, keys and values, which are one tensor in the original."""


@dataclass(frozen=True, slots=True)
class _Template:
    """A name with holes: ``pattern`` finds what is in them, ``text`` is filled with it."""

    pattern: re.Pattern[str]
    text: str


@cache
def _template(text: str) -> _Template:
    holes = {"leaf": "weight|bias"}
    pattern = re.sub(
        r"\\{(\w+)\\}", lambda hole: f"(?P<{hole[1]}>{holes.get(hole[1], '0|[1-9][0-9]{0,2}')})", re.escape(text)
    )
    return _Template(re.compile(pattern), text)


def translate(name: str, pairs: Pairs, to: Literal["diffusers", "original"], *, num_up: int = 0) -> str | None:
    """Return the other name of a tensor, or None where no pair has it; ``num_up`` is how many stages a decoder has."""
    for ours, original in pairs:
        source, target = (ours, original) if to == "original" else (original, ours)
        match = _template(source).pattern.fullmatch(name)
        if match is not None:
            found = match.groupdict()
            if "up" in found:
                found["up"] = str(num_up - 1 - int(found["up"]))
            return target.format(**found)
    return None


def num_up_stages(names: Iterable[str]) -> int:
    """Return how many stages a VAE's decoder has, by either names."""
    stages = (name.split(".")[2] for name in names if name.startswith(("decoder.up.", "decoder.up_blocks.")))
    return 1 + max(
        (int(stage) for stage in stages if stage.isascii() and stage.isdigit() and len(stage) < 4), default=-1
    )
