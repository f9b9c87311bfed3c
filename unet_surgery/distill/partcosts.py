"""What the frozen parts beside the U-Net cost: VAE and text encoder, from their config.json alone.

MACs are of one forward at batch 1, matrix products of attentions included; norms, biases and activations are not
counted, as in :mod:`unet_surgery.lower.modules`. Parameters are exact for diffusers' ``AutoencoderKL`` and
transformers' ``CLIPTextModel``, the parts of SD v1 and v2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unet_surgery.errors import ConfigError, printable
from unet_surgery.graph.config import MAX_CHANNELS, MAX_DEPTH, MAX_EMBEDDING

__all__ = ["PartCosts", "text_encoder_costs", "vae_costs", "vae_factor"]


@dataclass(frozen=True, slots=True)
class PartCosts:
    """A part's parameters, and the MACs of its forward on one sample: of a VAE, encoding one picture."""

    params: int
    macs: int


@dataclass(frozen=True, slots=True)
class _Layer:
    """A convolution, linear layer or norm: its weights' size, and the positions that they are applied to."""

    weights: int
    biases: int
    positions: int

    @property
    def macs(self) -> int:
        return self.weights * self.positions


def vae_factor(config: Mapping[str, Any]) -> int:
    """Return how many pixels of a side a latent stands for."""
    return int(2 ** (len(_widths(config)) - 1))


def vae_costs(config: Mapping[str, Any], pixels: tuple[int, int]) -> PartCosts:
    """Return the costs of an ``AutoencoderKL`` that encodes a picture of (height, width) ``pixels``.

    Raises:
        ConfigError: the config is not of such a VAE.
    """
    widths, latent = _widths(config), _integer(config, "latent_channels", 4)
    encoder = list(_encoder(config, widths, latent, pixels))
    height, width = pixels[0] // vae_factor(config), pixels[1] // vae_factor(config)
    products = 2 * (height * width) ** 2 * widths[-1] if config.get("mid_block_add_attention", True) else 0
    layers = [*encoder, *_decoder(config, widths, latent)]
    return PartCosts(sum(layer.weights + layer.biases for layer in layers), sum(e.macs for e in encoder) + products)


def text_encoder_costs(config: Mapping[str, Any], num_tokens: int | None = None) -> PartCosts:
    """Return the costs of a ``CLIPTextModel`` on a caption of ``num_tokens`` (None: as many as it takes).

    The products of its attentions are counted in full, though half of them are masked.

    Raises:
        ConfigError: the config is not of such a text encoder.
    """
    width, inner = _integer(config, "hidden_size", 512, MAX_CHANNELS), _integer(config, "intermediate_size", 2048)
    depth = _integer(config, "num_hidden_layers", 12, MAX_DEPTH)
    positions = _integer(config, "max_position_embeddings", 77)
    words = _integer(config, "vocab_size", 49408, MAX_EMBEDDING * 4)
    tokens = positions if num_tokens is None else num_tokens
    layer = 4 * width * width + 2 * width * inner
    biases_and_norms = (4 * width + inner + width) + 4 * width
    params = (words + positions) * width + depth * (layer + biases_and_norms) + 2 * width
    return PartCosts(params, depth * (layer * tokens + 2 * tokens * tokens * width))


def _encoder(
    config: Mapping[str, Any], widths: Sequence[int], latent: int, pixels: tuple[int, int]
) -> Iterator[_Layer]:
    area, num_layers = pixels[0] * pixels[1], _integer(config, "layers_per_block", 1, MAX_DEPTH)
    entering = widths[0]
    yield _conv(_integer(config, "in_channels", 3), entering, area)
    for level, width in enumerate(widths):
        for number in range(num_layers):
            yield from _resnet(entering if number == 0 else width, width, area)
        if level < len(widths) - 1:
            area //= 4
            yield _conv(width, width, area)
        entering = width
    yield from _mid(config, widths[-1], area)
    yield _norm(widths[-1])
    yield _conv(widths[-1], 2 * latent, area)
    if config.get("use_quant_conv", True):
        yield _conv(2 * latent, 2 * latent, area, kernel=1)


def _decoder(config: Mapping[str, Any], widths: Sequence[int], latent: int) -> Iterator[_Layer]:
    """Yield what only lies in memory: positions are 0."""
    num_layers = _integer(config, "layers_per_block", 1, MAX_DEPTH) + 1
    entering = widths[-1]
    if config.get("use_post_quant_conv", True):
        yield _conv(latent, latent, 0, kernel=1)
    yield _conv(latent, entering, 0)
    yield from _mid(config, entering, 0)
    for level, width in enumerate(reversed(widths)):
        for number in range(num_layers):
            yield from _resnet(entering if number == 0 else width, width, 0)
        if level < len(widths) - 1:
            yield _conv(width, width, 0)
        entering = width
    yield _norm(widths[0])
    yield _conv(widths[0], _integer(config, "out_channels", 3), 0)


def _mid(config: Mapping[str, Any], width: int, area: int) -> Iterator[_Layer]:
    yield from _resnet(width, width, area)
    if config.get("mid_block_add_attention", True):
        yield _norm(width)
        for _ in range(4):
            yield _Layer(width * width, width, area)
    yield from _resnet(width, width, area)


def _resnet(inputs: int, outputs: int, area: int) -> Iterator[_Layer]:
    yield _norm(inputs)
    yield _conv(inputs, outputs, area)
    yield _norm(outputs)
    yield _conv(outputs, outputs, area)
    if inputs != outputs:
        yield _conv(inputs, outputs, area, kernel=1)


def _conv(inputs: int, outputs: int, area: int, kernel: int = 3) -> _Layer:
    return _Layer(inputs * outputs * kernel * kernel, outputs, area)


def _norm(width: int) -> _Layer:
    return _Layer(width, width, 0)


def _widths(config: Mapping[str, Any]) -> Sequence[int]:
    widths = config.get("block_out_channels", [64])
    if (
        isinstance(widths, (list, tuple))
        and 1 <= len(widths) <= MAX_DEPTH
        and all(type(w) is int and 1 <= w <= MAX_CHANNELS for w in widths)
    ):
        return widths
    raise ConfigError("the VAE's config is wrong", where="block_out_channels", found=printable(widths))


def _integer(config: Mapping[str, Any], key: str, default: int, high: int = MAX_EMBEDDING) -> int:
    value = config.get(key, default)
    if type(value) is int and 1 <= value <= high:
        return value
    raise ConfigError(
        "the config key has a value that cannot be used",
        where=key,
        expected=f"an integer from 1 to {high}",
        found=printable(value),
    )
