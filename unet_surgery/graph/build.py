"""``build``: from a config to the graph of the U-Net it describes."""

from __future__ import annotations

from unet_surgery.graph.config import CROSS_MID, Level, UNetConfig
from unet_surgery.graph.nodes import Attention, Layer, Mid, Resnet, Sampler, Stage, UNetGraph

__all__ = ["build"]


def build(config: UNetConfig) -> UNetGraph:
    """Return the graph of ``config``; every node's source is its own module path."""
    levels = config.levels
    return UNetGraph(
        stem=config.stem,
        down=tuple(_down_stage(levels, i) for i in range(len(levels))),
        mid=_mid(config),
        up=tuple(_up_stage(levels, i) for i in range(len(levels))),
        latent_size=config.latent_size,
    )


def _down_stage(levels: tuple[Level, ...], index: int) -> Stage:
    level = levels[index]
    path = f"down_blocks.{index}"
    entering = levels[max(index - 1, 0)].channels
    layers = []
    for j in range(level.num_layers):
        resnet = Resnet(entering if j == 0 else level.channels, 0, level.channels, f"{path}.resnets.{j}")
        attention = _attention(level, level.down_depths[j], f"{path}.attentions.{j}") if level.down_attention else None
        layers.append(Layer(resnet, attention))
    last = index == len(levels) - 1
    sampler = None if last else Sampler(level.channels, f"{path}.downsamplers.0")
    return Stage("down", level.channels, tuple(layers), sampler, index)


def _up_stage(levels: tuple[Level, ...], index: int) -> Stage:
    num_levels = len(levels)
    position = num_levels - 1 - index
    level = levels[position]
    path = f"up_blocks.{index}"
    hidden_in = levels[min(position + 1, num_levels - 1)].channels
    last_skip = levels[max(position - 1, 0)].channels
    num_layers = level.num_layers + 1
    layers = []
    for j in range(num_layers):
        resnet = Resnet(
            hidden_in if j == 0 else level.channels,
            last_skip if j == num_layers - 1 else level.channels,
            level.channels,
            f"{path}.resnets.{j}",
        )
        attention = _attention(level, level.up_depths[j], f"{path}.attentions.{j}") if level.up_attention else None
        layers.append(Layer(resnet, attention))
    sampler = None if position == 0 else Sampler(level.channels, f"{path}.upsamplers.0")
    return Stage("up", level.channels, tuple(layers), sampler, index)


def _mid(config: UNetConfig) -> Mid | None:
    if config.mid_type is None:
        return None
    level = config.levels[-1]
    width = level.channels
    with_attention = config.mid_type == CROSS_MID
    resnets = tuple(Resnet(width, 0, width, f"mid_block.resnets.{j}") for j in range(2 if with_attention else 1))
    attention = None
    if with_attention:
        # diffusers never hands only_cross_attention to this mid
        attention = Attention(
            width,
            level.num_heads,
            config.mid_depth,
            level.cross_attention_dim,
            False,
            "mid_block.attentions.0",
            tuple(range(config.mid_depth)),
        )
    return Mid(width, resnets, attention)


def _attention(level: Level, depth: int, path: str) -> Attention:
    return Attention(
        level.channels,
        level.num_heads,
        depth,
        level.cross_attention_dim,
        level.only_cross_attention,
        path,
        tuple(range(depth)),
    )
