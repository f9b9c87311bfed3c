"""What a U-Net is made of, as diffusers names it: the tensors of each kind of module and what they cost.

This is the only place that knows diffusers' tensor names and shapes; parameter counts, MACs, weight maps and header
checks all derive from it. A :class:`Module` depends on widths alone, so modules are cached.

MACs are of one forward at batch 1. A weight of a convolution or linear layer costs its size times the positions it is
applied to: the latent pixels of its level, the context tokens (77, CLIP's), or once. Norms, biases and activations are
not counted. "conv+linear" is what the BK-SDM paper counts (arXiv 2305.15798, table 2); "all" adds the two matrix
products of every attention, ``2 · queries · keys · width``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

from unet_surgery.graph.nodes import Attention, Resnet, Stage, Stem, UNetGraph

__all__ = ["CONTEXT_TOKENS", "Module", "Placed", "Tensor", "latent_sizes", "modules"]

CONTEXT_TOKENS = 77

Applied = Literal["pixels", "context", "once", "never"]


class Tensor(NamedTuple):
    """A tensor of a module: its name below the module's path, its shape, and what it is multiplied with."""

    name: str
    shape: tuple[int, ...]
    applied: Applied


@dataclass(frozen=True, slots=True)
class Module:
    """A group of tensors that is kept or removed as one, with its cost at ``n`` pixels."""

    tensors: tuple[Tensor, ...]
    num_params: int
    macs_per_pixel: int
    macs_fixed: int
    products_per_pixel: int
    products_per_pixel_pair: int

    def macs(self, num_pixels: int) -> int:
        """Return the conv+linear MACs of one forward."""
        return self.macs_per_pixel * num_pixels + self.macs_fixed

    def macs_all(self, num_pixels: int) -> int:
        """Return the MACs of one forward with the attention products."""
        pair, pixel = self.products_per_pixel_pair, self.products_per_pixel
        return self.macs(num_pixels) + (pair * num_pixels + pixel) * num_pixels


class Placed(NamedTuple):
    """A module at its place in a graph."""

    path: str
    """Module path in this graph's own numbering; the tensors' names follow it directly."""
    source: str
    """Module path in the teacher."""
    module: Module
    num_pixels: int
    zeroed: bool
    """True where the tensors are zeros, not the teacher's."""


def modules(graph: UNetGraph) -> Iterator[Placed]:
    """Yield every module of ``graph`` in diffusers' order; together they hold each tensor exactly once."""
    stem = graph.stem
    pixels = [height * width for height, width in latent_sizes(graph)]
    deepest = len(pixels) - 1
    for path, module in _stem_head(stem):
        yield Placed(path, path, module, pixels[0], False)
    for i, stage in enumerate(graph.down):
        yield from _stage_modules(f"down_blocks.{i}.", stage, stem, pixels[i], pixels[min(i + 1, deepest)])
    if graph.mid is not None:
        for j, resnet in enumerate(graph.mid.resnets):
            path = f"mid_block.resnets.{j}."
            yield Placed(path, resnet.source + ".", _resnet_of(resnet, stem), pixels[-1], False)
        if graph.mid.attention is not None:
            yield from _attention_modules("mid_block.attentions.0.", graph.mid.attention, stem, pixels[-1])
    for i, stage in enumerate(graph.up):
        level = deepest - i
        yield from _stage_modules(f"up_blocks.{i}.", stage, stem, pixels[level], pixels[max(level - 1, 0)])
    yield Placed("", "", _stem_tail(stem), pixels[0], False)


def _stage_modules(path: str, stage: Stage, stem: Stem, num_pixels: int, sampled_pixels: int) -> Iterator[Placed]:
    """Yield a stage's modules; its sampler's convolution runs at the resolution it leads to."""
    for j, layer in enumerate(stage.layers):
        resnet = layer.resnet
        yield Placed(f"{path}resnets.{j}.", resnet.source + ".", _resnet_of(resnet, stem), num_pixels, False)
        if layer.attention is not None:
            yield from _attention_modules(f"{path}attentions.{j}.", layer.attention, stem, num_pixels)
    if stage.sampler is not None:
        source = stage.sampler.source + "."
        name = "downsamplers.0." if stage.side == "down" else "upsamplers.0."
        yield Placed(path + name, source, _sampler(stage.sampler.channels), sampled_pixels, False)


def latent_sizes(graph: UNetGraph) -> list[tuple[int, int]]:
    """Return (height, width) of each level at the native latent size; each downsampler halves, rounding up."""
    height, width = graph.latent_size
    sizes = [(height, width)]
    for _ in range(graph.num_levels - 1):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


def _attention_modules(path: str, attention: Attention, stem: Stem, num_pixels: int) -> Iterator[Placed]:
    """Yield an attention as its entry (norm, proj_in), its transformer blocks and its proj_out."""
    inner = attention.num_heads * (attention.channels // attention.num_heads)
    source = attention.source + "."
    entry, exit_ = _projections(attention.channels, inner, stem.linear_projection)
    yield Placed(path, source, entry, num_pixels, False)
    if attention.blocks or attention.depth:
        block = _transformer_block(inner, attention.cross_attention_dim, attention.only_cross_attention)
        for k, origin in enumerate(attention.blocks):
            yield Placed(
                f"{path}transformer_blocks.{k}.", f"{source}transformer_blocks.{origin}.", block, num_pixels, False
            )
    yield Placed(path, source, exit_, num_pixels, attention.bypass)


def _module(*tensors: Tensor, products_per_pixel: int = 0, products_per_pixel_pair: int = 0) -> Module:
    def cost(applied: Applied) -> int:
        return sum(prod(t.shape) for t in tensors if t.applied == applied)

    return Module(
        tensors=tensors,
        num_params=sum(prod(t.shape) for t in tensors),
        macs_per_pixel=cost("pixels"),
        macs_fixed=cost("context") * CONTEXT_TOKENS + cost("once"),
        products_per_pixel=products_per_pixel,
        products_per_pixel_pair=products_per_pixel_pair,
    )


def _conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> tuple[Tensor, Tensor]:
    return (
        Tensor(f"{name}.weight", (outputs, inputs, kernel, kernel), "pixels"),
        Tensor(f"{name}.bias", (outputs,), "never"),
    )


def _linear(name: str, inputs: int, outputs: int, applied: Applied) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.weight", (outputs, inputs), applied), Tensor(f"{name}.bias", (outputs,), "never")


def _norm(name: str, width: int) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.weight", (width,), "never"), Tensor(f"{name}.bias", (width,), "never")


def _resnet_of(resnet: Resnet, stem: Stem) -> Module:
    return _resnet(
        resnet.hidden_channels + resnet.skip_channels,
        resnet.out_channels,
        stem.resnet_time_channels,
        stem.time_scale_shift,
    )


@lru_cache(maxsize=256)
def _resnet(inputs: int, outputs: int, time_channels: int, scale_shift: bool) -> Module:
    shortcut = _conv("conv_shortcut", inputs, outputs, 1) if inputs != outputs else ()
    return _module(
        *_norm("norm1", inputs),
        *_conv("conv1", inputs, outputs),
        *_linear("time_emb_proj", time_channels, outputs * 2 if scale_shift else outputs, "once"),
        *_norm("norm2", outputs),
        *_conv("conv2", outputs, outputs),
        *shortcut,
    )


@lru_cache(maxsize=256)
def _projections(channels: int, inner: int, linear: bool) -> tuple[Module, Module]:
    if linear:
        entry, exit_ = _linear("proj_in", channels, inner, "pixels"), _linear("proj_out", inner, channels, "pixels")
    else:
        entry, exit_ = _conv("proj_in", channels, inner, 1), _conv("proj_out", inner, channels, 1)
    return _module(*_norm("norm", channels), *entry), _module(*exit_)


@lru_cache(maxsize=256)
def _transformer_block(inner: int, context: int, only_cross_attention: bool) -> Module:
    """A ``BasicTransformerBlock``: self-attention (or a second cross-attention), cross-attention, GEGLU."""

    def attention(name: str, keys: int, applied: Applied) -> tuple[Tensor, ...]:
        return (
            Tensor(f"{name}.to_q.weight", (inner, inner), "pixels"),
            Tensor(f"{name}.to_k.weight", (inner, keys), applied),
            Tensor(f"{name}.to_v.weight", (inner, keys), applied),
            *_linear(f"{name}.to_out.0", inner, inner, "pixels"),
        )

    first = attention("attn1", context, "context") if only_cross_attention else attention("attn1", inner, "pixels")
    cross = 2 * inner * CONTEXT_TOKENS
    return _module(
        *_norm("norm1", inner),
        *first,
        *_norm("norm2", inner),
        *attention("attn2", context, "context"),
        *_norm("norm3", inner),
        *_linear("ff.net.0.proj", inner, inner * 8, "pixels"),
        *_linear("ff.net.2", inner * 4, inner, "pixels"),
        products_per_pixel=cross * 2 if only_cross_attention else cross,
        products_per_pixel_pair=0 if only_cross_attention else 2 * inner,
    )


@lru_cache(maxsize=64)
def _sampler(channels: int) -> Module:
    return _module(*_conv("conv", channels, channels))


def _embedding(inputs: int, width: int, *extra: Tensor) -> Module:
    """A ``TimestepEmbedding``: two linear layers."""
    return _module(*_linear("linear_1", inputs, width, "once"), *extra, *_linear("linear_2", width, width, "once"))


@lru_cache(maxsize=16)
def _stem_head(stem: Stem) -> tuple[tuple[str, Module], ...]:
    width = stem.time_embed_dim
    condition = stem.time_cond_proj_dim
    extra = () if condition is None else (Tensor("cond_proj.weight", (stem.channels, condition), "once"),)
    parts = [
        ("", _module(*_conv("conv_in", stem.in_channels, stem.channels, stem.conv_in_kernel))),
        ("time_embedding.", _embedding(stem.channels, width, *extra)),
    ]
    if stem.class_embedding is not None:
        kind, size = stem.class_embedding
        if kind == "classes":
            module = _module(Tensor("weight", (size, width), "never"))
        elif kind == "simple_projection":
            module = _module(Tensor("weight", (width, size), "once"), Tensor("bias", (width,), "never"))
        else:
            module = _embedding(stem.channels if kind == "timestep" else size, width)
        parts.append(("class_embedding.", module))
    if stem.addition_embedding_dim is not None:
        parts.append(("add_embedding.", _embedding(stem.addition_embedding_dim, width)))
    return tuple(parts)


@lru_cache(maxsize=16)
def _stem_tail(stem: Stem) -> Module:
    return _module(
        *_norm("conv_norm_out", stem.channels),
        *_conv("conv_out", stem.channels, stem.out_channels, stem.conv_out_kernel),
    )
