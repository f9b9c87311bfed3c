"""``UNetConfig``: the typed, checked view of a ``UNet2DConditionModel`` config.json.

Every key that diffusers knows is in exactly one of four groups: *structural* (read here), *inert* (it changes
no tensor's name or shape, and is carried over as it is), *refused* (a value other than the stated ones
makes a network that the graph cannot describe), or *unknown* (carried over and listed). Absent keys
have diffusers' defaults. Note that an absent ``mid_block_type`` is the cross-attention mid; only ``null`` is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from unet_surgery.errors import ConfigError, printable
from unet_surgery.graph.nodes import Stem

__all__ = [
    "CROSS_MID",
    "DEFAULTS",
    "DOWN_TYPES",
    "RESNET_MID",
    "STRUCTURAL_KEYS",
    "UP_TYPES",
    "Level",
    "UNetConfig",
    "parse_config",
]

MAX_LEVELS = 8
MAX_LAYERS = 16
MAX_CHANNELS = 16_384
MAX_DEPTH = 64
MAX_TRANSFORMER_BLOCKS = 1024  # in all; SDXL has 70
MAX_EMBEDDING = 1_048_576
MAX_KERNEL = 31

DOWN_TYPES = MappingProxyType({"DownBlock2D": False, "CrossAttnDownBlock2D": True})
UP_TYPES = MappingProxyType({"UpBlock2D": False, "CrossAttnUpBlock2D": True})
CROSS_MID = "UNetMidBlock2DCrossAttn"
RESNET_MID = "UNetMidBlock2D"

# diffusers' defaults of the structural keys (UNet2DConditionModel.__init__, 0.42).
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "sample_size": None,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "mid_block_type": CROSS_MID,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "only_cross_attention": False,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "attention_head_dim": 8,
        "use_linear_projection": False,
        "class_embed_type": None,
        "num_class_embeds": None,
        "class_embeddings_concat": False,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
        "resnet_time_scale_shift": "default",
        "time_embedding_dim": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
    }
)
STRUCTURAL_KEYS = frozenset(DEFAULTS)

INERT_KEYS = frozenset(
    {
        "_class_name",
        "_diffusers_version",
        "_name_or_path",
        "act_fn",
        "addition_embed_type_num_heads",
        "center_input_sample",
        "cross_attention_norm",
        "downsample_padding",
        "dropout",
        "flip_sin_to_cos",
        "freq_shift",
        "mid_block_only_cross_attention",
        "mid_block_scale_factor",
        "norm_eps",
        "resnet_out_scale_factor",
        "resnet_skip_time_act",
        "time_embedding_act_fn",
        "timestep_post_act",
        "upcast_attention",
    }
)

# key → the values under which the graph describes the network
ONLY_VALUES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "attention_type": ("default",),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_attention_heads": (None,),
        "time_embedding_type": ("positional",),
    }
)

CLASS_EMBED_TYPES = ("timestep", "identity", "projection", "simple_projection")
DEFAULT_LATENT_SIZE = 64


@dataclass(frozen=True, slots=True)
class Level:
    """What config.json says of one resolution level; depths are one a layer, up stages have one layer more."""

    channels: int
    num_layers: int
    down_attention: bool
    up_attention: bool
    num_heads: int
    cross_attention_dim: int
    only_cross_attention: bool
    down_depths: tuple[int, ...]
    up_depths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """A checked config: ``levels`` finest first, ``raw`` the mapping that was parsed."""

    raw: Mapping[str, Any]
    stem: Stem
    levels: tuple[Level, ...]
    mid_type: str | None
    mid_depth: int
    latent_size: tuple[int, int]
    unknown_keys: tuple[str, ...]


def parse_config(raw: Mapping[str, Any]) -> UNetConfig:
    """Check ``raw`` (the object of a config.json) and return its typed view.

    Raises:
        ConfigError: a key holds what ``UNet2DConditionModel`` would not accept, or what the graph does not
            model; the message names the key, what was expected and what was found.
    """
    read = _Reader(raw)
    read.class_name()
    for key, allowed in ONLY_VALUES.items():
        read.only(key, allowed)
    levels = _levels(read)
    mid_type = read.get("mid_block_type")
    if mid_type not in (CROSS_MID, RESNET_MID, None):
        raise read.wrong("mid_block_type", f"{CROSS_MID}, {RESNET_MID} or null")
    mid_depth = _mid_depth(read) if mid_type == CROSS_MID else 0
    known = STRUCTURAL_KEYS | INERT_KEYS | ONLY_VALUES.keys()
    return UNetConfig(
        raw=raw,
        stem=_stem(read, levels),
        levels=levels,
        mid_type=mid_type,
        mid_depth=mid_depth,
        latent_size=_latent_size(read),
        unknown_keys=tuple(sorted(key for key in raw if key not in known)),
    )


class _Reader:
    """Typed access to the raw mapping; every refusal names the key."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError("the U-Net's config is not a JSON object", found=printable(raw))
        self.raw = raw

    def get(self, key: str) -> Any:
        return self.raw[key] if key in self.raw else DEFAULTS[key]

    def wrong(self, key: str, expected: str, *, hint: str | None = None) -> ConfigError:
        found = printable(self.raw[key]) if key in self.raw else f"no such key (diffusers' default {DEFAULTS[key]!r})"
        return ConfigError(
            f"the config key {key!r} has a value that cannot be used", expected=expected, found=found, hint=hint
        )

    def class_name(self) -> None:
        found = self.raw.get("_class_name")
        if found != "UNet2DConditionModel":
            raise ConfigError(
                "this config is not a conditional U-Net's",
                where="_class_name",
                expected="UNet2DConditionModel",
                found="no such key" if found is None else printable(found),
                hint="point at the pipeline folder, or at its unet/ folder",
            )

    def only(self, key: str, allowed: tuple[Any, ...]) -> None:
        if key not in self.raw:
            return
        value = self.raw[key]
        if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
            raise ConfigError(
                f"the config key {key!r} asks for a network that is not supported",
                expected=" or ".join(_json_word(a) for a in allowed),
                found=printable(value),
            )

    def integer(self, key: str, *, low: int = 1, high: int) -> int:
        value = self.get(key)
        if not _is_int(value, low, high):
            raise self.wrong(key, f"an integer from {low} to {high}")
        return int(value)

    def optional_integer(self, key: str, *, high: int) -> int | None:
        return None if self.get(key) is None else self.integer(key, high=high)

    def boolean(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def per_level(self, key: str, num_levels: int, accepts: Callable[[Any], bool], what: str) -> tuple[Any, ...]:
        """Read a key that holds one value for all levels or a list of one a level."""
        value = self.get(key)
        values = list(value) if isinstance(value, (list, tuple)) else [value] * num_levels
        if len(values) != num_levels or not all(accepts(v) for v in values):
            raise self.wrong(key, f"{what}, or a list of {num_levels} of them (one a stage)")
        return tuple(values)


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _json_word(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, repr(value))


def _levels(read: _Reader) -> tuple[Level, ...]:
    down = _stage_types(read, "down_block_types", DOWN_TYPES)
    up = _stage_types(read, "up_block_types", UP_TYPES)
    num_levels = len(down)
    if len(up) != num_levels:
        raise read.wrong("up_block_types", f"{num_levels} entries, as many as down_block_types has")
    channels = read.get("block_out_channels")
    if (
        not isinstance(channels, (list, tuple))
        or len(channels) != num_levels
        or not all(_is_int(c, 1, MAX_CHANNELS) for c in channels)
    ):
        raise read.wrong("block_out_channels", f"a list of {num_levels} integers from 1 to {MAX_CHANNELS}")
    layers = read.per_level(
        "layers_per_block", num_levels, lambda v: _is_int(v, 0, MAX_LAYERS), f"an integer from 0 to {MAX_LAYERS}"
    )
    heads = read.per_level(
        "attention_head_dim", num_levels, lambda v: _is_int(v, 1, MAX_CHANNELS), "a positive number of heads"
    )
    context = read.per_level(
        "cross_attention_dim", num_levels, lambda v: _is_int(v, 1, MAX_CHANNELS), f"an integer from 1 to {MAX_CHANNELS}"
    )
    only_cross = read.per_level("only_cross_attention", num_levels, lambda v: isinstance(v, bool), "true or false")
    down_depths, up_depths = _depths(read, layers, down, up)
    levels = tuple(
        Level(*values)
        for values in zip(
            channels,
            layers,
            down,
            reversed(up),
            heads,
            context,
            only_cross,
            down_depths,
            reversed(up_depths),
            strict=True,
        )
    )
    _check_groups(read, levels)
    num_blocks = sum(sum(depths) for level in levels for depths in (level.down_depths, level.up_depths))
    if num_blocks > MAX_TRANSFORMER_BLOCKS:
        raise read.wrong(
            "transformer_layers_per_block",
            f"{MAX_TRANSFORMER_BLOCKS} transformer blocks at most in the whole U-Net",
            hint=f"it asks for {num_blocks}",
        )
    return levels


def _stage_types(read: _Reader, key: str, types: Mapping[str, bool]) -> list[bool]:
    names = read.get(key)
    if not isinstance(names, (list, tuple)) or not 1 <= len(names) <= MAX_LEVELS:
        raise read.wrong(key, f"a list of 1 to {MAX_LEVELS} stage types")
    for name in names:
        if not isinstance(name, str) or name not in types:
            close = get_close_matches(str(name), types, n=1)
            raise read.wrong(
                key,
                f"a list of {' and '.join(types)}",
                hint=f"{close[0]!r} instead of {printable(name)}?" if close else None,
            )
    return [types[name] for name in names]


def _depths(
    read: _Reader, layers: tuple[int, ...], down: list[bool], up: list[bool]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Expand the two depth keys into one depth a layer, for down stages and (in their own order) up stages."""
    num_levels = len(layers)
    key, reverse_key = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    down_entries = read.per_level(
        key, num_levels, _is_depth_entry, f"an integer from 0 to {MAX_DEPTH} (nested lists: one a layer)"
    )
    if read.get(reverse_key) is not None:
        if not isinstance(read.get(reverse_key), (list, tuple)):
            raise read.wrong(reverse_key, f"null or a list of {num_levels} (one an up stage)")
        up_entries = read.per_level(
            reverse_key, num_levels, _is_depth_entry, f"an integer from 0 to {MAX_DEPTH} (nested lists: one a layer)"
        )
    else:
        if any(isinstance(entry, (list, tuple)) for entry in down_entries):
            raise read.wrong(reverse_key, f"a list, because {key} is nested: diffusers demands it then")
        up_entries = tuple(reversed(down_entries))
    return (
        [_per_layer(read, key, e, n, used) for e, n, used in zip(down_entries, layers, down, strict=True)],
        [
            _per_layer(read, reverse_key, e, n + 1, used)
            for e, n, used in zip(up_entries, reversed(layers), up, strict=True)
        ],
    )


def _is_depth_entry(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= MAX_LAYERS + 1 and all(_is_int(v, 0, MAX_DEPTH) for v in value)
    return _is_int(value, 0, MAX_DEPTH)


def _per_layer(read: _Reader, key: str, entry: Any, num_layers: int, used: bool) -> tuple[int, ...]:
    if not isinstance(entry, (list, tuple)):
        return (entry,) * num_layers
    if used and len(entry) != num_layers:
        raise read.wrong(key, f"{num_layers} depths where the stage has {num_layers} layers")
    return tuple(entry)


def _mid_depth(read: _Reader) -> int:
    """Return the mid's depth: the last entry of ``transformer_layers_per_block``, its first layer's when nested."""
    entry = read.get("transformer_layers_per_block")
    if isinstance(entry, (list, tuple)):
        entry = entry[-1]
    if isinstance(entry, (list, tuple)):
        if not entry:
            raise read.wrong("transformer_layers_per_block", "a depth for the mid in the last entry")
        entry = entry[0]
    return int(entry)


def _check_groups(read: _Reader, levels: tuple[Level, ...]) -> None:
    """GroupNorm needs its group count to divide every width it meets; all of them are sums of stage widths."""
    groups = read.integer("norm_num_groups", high=MAX_CHANNELS)
    for level in levels:
        if level.channels % groups:
            raise read.wrong(
                "block_out_channels", f"widths that norm_num_groups ({groups}) divides", hint=f"{level.channels} is not"
            )
        if (level.down_attention or level.up_attention) and level.channels < level.num_heads:
            raise read.wrong(
                "attention_head_dim", f"at most {level.channels} heads where a stage has that many channels"
            )


def _stem(read: _Reader, levels: tuple[Level, ...]) -> Stem:
    channels = levels[0].channels
    time_embed_dim = read.optional_integer("time_embedding_dim", high=MAX_EMBEDDING) or channels * 4
    time_shift = read.get("resnet_time_scale_shift")
    if time_shift not in ("default", "scale_shift"):
        raise read.wrong("resnet_time_scale_shift", "default or scale_shift")
    return Stem(
        in_channels=read.integer("in_channels", high=MAX_CHANNELS),
        out_channels=read.integer("out_channels", high=MAX_CHANNELS),
        channels=channels,
        norm_num_groups=read.integer("norm_num_groups", high=MAX_CHANNELS),
        conv_in_kernel=_kernel(read, "conv_in_kernel"),
        conv_out_kernel=_kernel(read, "conv_out_kernel"),
        linear_projection=read.boolean("use_linear_projection"),
        time_embed_dim=time_embed_dim,
        resnet_time_channels=time_embed_dim * (2 if read.boolean("class_embeddings_concat") else 1),
        time_scale_shift=time_shift == "scale_shift",
        time_cond_proj_dim=read.optional_integer("time_cond_proj_dim", high=MAX_EMBEDDING),
        class_embedding=_class_embedding(read),
        addition_embedding_dim=_addition_embedding_dim(read),
    )


def _kernel(read: _Reader, key: str) -> int:
    size = read.integer(key, high=MAX_KERNEL)
    if size % 2 == 0:
        raise read.wrong(key, "an odd size: an even one changes the picture's size")
    return size


def _class_embedding(read: _Reader) -> tuple[str, int] | None:
    """Return (kind, input width or number of classes), or None when the U-Net has no class embedding weights."""
    kind = read.get("class_embed_type")
    num_classes = read.optional_integer("num_class_embeds", high=MAX_EMBEDDING)
    if kind is None:
        return None if num_classes is None else ("classes", num_classes)
    if kind not in CLASS_EMBED_TYPES:
        raise read.wrong("class_embed_type", "null, " + ", ".join(CLASS_EMBED_TYPES))
    if kind == "identity":
        return None
    if kind == "timestep":
        return (kind, 0)
    return (kind, read.integer("projection_class_embeddings_input_dim", high=MAX_EMBEDDING))


def _addition_embedding_dim(read: _Reader) -> int | None:
    kind = read.get("addition_embed_type")
    if kind is None:
        return None
    if kind != "text_time":
        raise read.wrong("addition_embed_type", "null or text_time (SDXL's)")
    read.integer("addition_time_embed_dim", high=MAX_EMBEDDING)
    return read.integer("projection_class_embeddings_input_dim", high=MAX_EMBEDDING)


def _latent_size(read: _Reader) -> tuple[int, int]:
    size = read.get("sample_size")
    if size is None:
        return (DEFAULT_LATENT_SIZE, DEFAULT_LATENT_SIZE)
    if _is_int(size, 1, MAX_CHANNELS):
        return (size, size)
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(_is_int(s, 1, MAX_CHANNELS) for s in size):
        return (size[0], size[1])
    raise read.wrong("sample_size", "a size in latent pixels, or [height, width]")
