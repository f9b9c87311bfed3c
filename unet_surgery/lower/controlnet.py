"""A ControlNet for a student: stock diffusers' ``ControlNetModel``, planned tensor by tensor.

A ControlNet is a copy of a U-Net's down side and mid that reads a picture as well (``controlnet_cond_embedding``) and
gives what it finds through zero convolutions: one for every skip output (``controlnet_down_blocks``), one for the mid.
A new one is made of the student itself; one that was trained for the teacher is carried over as the student's weights
were: by node identity. Its mid cannot be none, as a student's can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from unet_surgery.errors import ConfigError, InexpressibleError, TeacherError, first_few, printable
from unet_surgery.graph import UNetGraph, build, parse_config
from unet_surgery.graph.config import CROSS_MID, RESNET_MID
from unet_surgery.graph.nodes import Mid, Resnet
from unet_surgery.lower.skips import skip_outputs
from unet_surgery.lower.weights import Shape, shapes_of

__all__ = [
    "CONTROL_CLASS",
    "CONTROL_DEFAULTS",
    "ControlNetPlan",
    "ControlTensor",
    "Origin",
    "carry_controlnet",
    "control_shapes",
    "start_controlnet",
]

CONTROL_CLASS = "ControlNetModel"
MAX_EMBEDDING_STAGES = 8
MAX_EMBEDDING_CHANNELS = 4096

Origin = Literal["student", "teacher", "controlnet", "zeros", "fresh"]

# The keys of ControlNetModel.__init__ (diffusers 0.42) and their defaults. What it shares with the U-Net has the same.
_OWN: Mapping[str, Any] = MappingProxyType(
    {
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": False,
    }
)
_INERT: Mapping[str, Any] = MappingProxyType(
    {
        "act_fn": "silu",
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "upcast_attention": False,
    }
)
_STRUCTURAL: Mapping[str, Any] = MappingProxyType(
    {
        "addition_embed_type": None,
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": None,
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "class_embed_type": None,
        "cross_attention_dim": 1280,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_type": CROSS_MID,
        "norm_num_groups": 32,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "projection_class_embeddings_input_dim": None,
        "resnet_time_scale_shift": "default",
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
    }
)
CONTROL_DEFAULTS: Mapping[str, Any] = MappingProxyType({**_OWN, **_INERT, **_STRUCTURAL})

# Keys of the U-Net's config under which its down side computes what a ControlNet cannot.
_ONLY_VALUES = {"center_input_sample": (None, False), "timestep_post_act": (None,), "time_embedding_act_fn": (None,)}


class ControlTensor(NamedTuple):
    """A tensor of the ControlNet: what it is made of, and its name there (None: zeros, or seeded random numbers)."""

    name: str
    shape: Shape
    origin: Origin
    source: str | None = None


@dataclass(frozen=True, slots=True)
class ControlNetPlan:
    """A ControlNet, decided: its config.json, all its tensors, where its mid comes from, and why it is a new one."""

    config: Mapping[str, Any]
    tensors: tuple[ControlTensor, ...]
    mid: Origin
    mid_note: str = ""


def start_controlnet(
    student_config: Mapping[str, Any], student: UNetGraph, teacher: UNetGraph | None = None
) -> ControlNetPlan:
    """Plan an untrained ControlNet: the student's own down side, and zeros where it gives what it finds.

    Its mid is the student's; where it has none the one of ``teacher``, if one config can say both; else a new one.

    Raises:
        InexpressibleError: ``ControlNetModel`` cannot hold the student's down side; says which part.
    """
    config = _config(student_config, student)
    mid: Origin = "student"
    note = ""
    chosen = None if student.mid is None else _with_mid(config, student, student.mid)
    if student.mid is None and teacher is not None and teacher.mid is not None:
        mid, chosen = "teacher", _with_mid(config, student, teacher.mid)
        if chosen is None:
            note = f"the teacher's does not fit: {_why_not(student, teacher.mid)}"
    elif student.mid is None:
        note = "the student has none, and no teacher was given" if teacher is None else "neither side has one"
    elif chosen is None:
        note = f"the student's own does not fit: {_why_not(student, student.mid)}"
    if chosen is None:
        mid, chosen = "fresh", _with_new_mid(config, student)

    def trunk(name: str) -> tuple[Origin, str | None]:
        origin = mid if name.startswith("mid_block.") else "student"
        return origin, None if origin == "fresh" else name

    def rest(name: str) -> tuple[Origin, str | None]:
        last = name.startswith(("controlnet_down_", "controlnet_mid_", "controlnet_cond_embedding.conv_out."))
        return ("zeros" if last else "fresh"), None

    return ControlNetPlan(chosen, _tensors(chosen, trunk, rest), mid, note)


def carry_controlnet(
    student_config: Mapping[str, Any],
    student: UNetGraph,
    teacher: UNetGraph,
    weights: Mapping[str, str | None],
    source_config: Mapping[str, Any],
) -> ControlNetPlan:
    """Plan the student's copy of a ControlNet that was trained for the teacher; ``weights`` is the plan's weight map.

    A zero convolution goes with the place of the skip that it feeds. The mid is the ControlNet's whole one where one
    config can say both, else what the student kept of the teacher's, else new; a new one says nothing at first.

    Raises:
        InexpressibleError: ``ControlNetModel`` cannot hold the student's down side; says which part.
        TeacherError: ``source_config`` is not that of a ControlNet for this teacher; names the first tensors.
    """
    source = _control_graph(source_config)
    _check_source(source, teacher)
    own = {key: source_config.get(key, default) for key, default in {**_OWN, **_INERT}.items()}
    config = _config(student_config, student) | own | {"in_channels": source.stem.in_channels}
    mid: Origin = "controlnet"
    note = ""
    mapped = False
    chosen = None if source.mid is None else _with_mid(config, student, source.mid)
    if chosen is None and student.mid is not None and source.mid == teacher.mid:
        mapped, chosen = True, _with_mid(config, student, student.mid)
    if chosen is None:
        mid, chosen = "fresh", _with_new_mid(config, student)
        note = "" if source.mid is None else f"the ControlNet's own does not fit: {_why_not(student, source.mid)}"
    places = [place for _, place in skip_outputs(teacher)]
    zero_convolutions = {
        f"controlnet_down_blocks.{k}.": f"controlnet_down_blocks.{places.index(place)}."
        for k, (_, place) in enumerate(skip_outputs(student))
    }

    def trunk(name: str) -> tuple[Origin, str | None]:
        if name.startswith("mid_block.") and not mapped:
            return mid, None if mid == "fresh" else name
        origin = weights.get(name, name)
        return ("zeros" if origin is None else "controlnet"), origin

    def rest(name: str) -> tuple[Origin, str | None]:
        if name.startswith("controlnet_mid_block.") and mid == "fresh":
            return "zeros", None
        head, leaf = name.rpartition(".")[0] + ".", name.rpartition(".")[2]
        return "controlnet", zero_convolutions.get(head, head) + leaf

    return ControlNetPlan(chosen, _tensors(chosen, trunk, rest), mid, note)


def control_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return name → shape of every tensor of the ``ControlNetModel`` that ``config`` describes.

    Raises:
        ConfigError: a key holds what it would not accept, or what is not modelled.
    """
    graph = _control_graph(config)
    return _trunk_shapes(graph) | dict(_rest_shapes(config, graph))


def _config(student_config: Mapping[str, Any], student: UNetGraph) -> dict[str, Any]:
    """Return the student's config in the words of a ControlNet's, all keys, without a word on the mid yet."""
    for what in _unsayable(student_config, student):
        raise InexpressibleError(
            "diffusers' ControlNetModel cannot hold the down side of this student",
            expected="what a ControlNet's config can say",
            found=what,
        )
    config = {key: student_config.get(key, default) for key, default in CONTROL_DEFAULTS.items()}
    version = student_config.get("_diffusers_version")
    config |= {"_class_name": CONTROL_CLASS} | ({} if version is None else {"_diffusers_version": version})
    config["layers_per_block"] = len(student.down[0].layers)
    widths = _context_widths(student)
    if isinstance(config["cross_attention_dim"], (list, tuple)):
        config["cross_attention_dim"] = next(iter(widths), config["cross_attention_dim"][0])
    return {key: config[key] for key in sorted(config)}


def _unsayable(config: Mapping[str, Any], student: UNetGraph) -> Iterator[str]:
    stem = student.stem
    layers = [len(stage.layers) for stage in student.down]
    if len(set(layers)) > 1:
        yield f"stages of different numbers of layers (layers_per_block {layers})"
    if len(widths := _context_widths(student)) > 1:
        yield f"stages of different context widths (cross_attention_dim {sorted(widths)})"
    if stem.conv_in_kernel != 3:
        yield f"a first convolution of another size than 3 (conv_in_kernel {stem.conv_in_kernel})"
    if stem.time_embed_dim != 4 * stem.channels:
        yield "a time embedding that is not four times as wide as the first stage (time_embedding_dim)"
    if stem.time_cond_proj_dim is not None:
        yield "a condition that is added to the time (time_cond_proj_dim)"
    if stem.resnet_time_channels != stem.time_embed_dim:
        yield "class embeddings appended to the time embedding (class_embeddings_concat)"
    if config.get("class_embed_type") == "simple_projection":
        yield "a class embedding of one layer (class_embed_type simple_projection)"
    for key, allowed in _ONLY_VALUES.items():
        if config.get(key) not in allowed:
            yield f"{key} {printable(config[key])}"


def _context_widths(student: UNetGraph) -> set[int]:
    attentions = [layer.attention for stage in student.down for layer in stage.layers]
    attentions.append(student.mid.attention if student.mid is not None else None)
    return {attention.cross_attention_dim for attention in attentions if attention is not None}


def _with_mid(config: Mapping[str, Any], student: UNetGraph, mid: Mid) -> dict[str, Any] | None:
    """Return ``config`` with ``mid`` below the student's down side; None where no config says both.

    A mid takes heads, depth and context width from the deepest level. Where that has no attention they are free.
    """
    result = {**config, "mid_block_type": RESNET_MID if mid.attention is None else CROSS_MID}
    if mid.attention is not None and not student.down[-1].has_attention:
        wanted = {"attention_head_dim": mid.attention.num_heads, "transformer_layers_per_block": mid.attention.depth}
        for key, value in wanted.items():
            result[key] = _with_last(result[key], value, student.num_levels)
        if not _context_widths(student):
            result["cross_attention_dim"] = mid.attention.cross_attention_dim
    try:
        built = _control_graph(result)
    except ConfigError:  # more heads than the level has channels
        return None
    return result if (built.down, built.mid) == (student.down, mid) else None


def _with_last(value: Any, last: int, num_levels: int) -> Any:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * num_levels
    return value if values[-1] == last else [*values[:-1], last]


def _with_new_mid(config: Mapping[str, Any], student: UNetGraph) -> dict[str, Any]:
    width = student.down[-1].channels
    result = _with_mid(config, student, Mid(width, (Resnet(width, 0, width),), None))
    if result is None:
        raise InexpressibleError("diffusers' ControlNetModel has no config for the down side of this student")
    return result


def _why_not(student: UNetGraph, mid: Mid) -> str:
    width = student.down[-1].channels
    if mid.channels != width:
        return f"it is {mid.channels} channels wide, the student's deepest stage {width}"
    return "a ControlNet's config gives the mid the depth, heads and context width of the deepest stage"


def _control_graph(config: Mapping[str, Any]) -> UNetGraph:
    """Return the graph of a ControlNet: that of a U-Net with nothing of its own on the up side."""
    if config.get("_class_name") != CONTROL_CLASS:
        found = config.get("_class_name")
        raise ConfigError(
            "this config is not a ControlNet's",
            where="_class_name",
            expected=CONTROL_CLASS,
            found="no such key" if found is None else printable(found),
        )
    unet = {key: value for key, value in config.items() if key in _STRUCTURAL} | {"_class_name": "UNet2DConditionModel"}
    stages = config.get("down_block_types", CONTROL_DEFAULTS["down_block_types"])
    number = len(stages) if isinstance(stages, (list, tuple)) else 1
    unet |= {"up_block_types": ["UpBlock2D"] * number, "reverse_transformer_layers_per_block": [1] * number}
    return replace(build(parse_config(unet)), up=())


def _check_source(source: UNetGraph, teacher: UNetGraph) -> None:
    """Check that a ControlNet's down side is the teacher's; only its first convolution may take other channels."""
    stem = replace(teacher.stem, in_channels=source.stem.in_channels, out_channels=source.stem.out_channels)
    stem = replace(stem, conv_out_kernel=source.stem.conv_out_kernel)
    want = _trunk_shapes(replace(teacher, stem=stem, mid=None, up=()))
    have = _trunk_shapes(replace(source, mid=None))
    missing = [name for name in want if name not in have]
    extra = [name for name in have if name not in want]
    wrong = [name for name in want if name in have and want[name] != have[name]]
    problems = [f"{len(n)} {kind}: {first_few(n)}" for kind, n in (("missing", missing), ("unexpected", extra)) if n]
    if wrong:
        shapes = f"{wrong[0]} is {list(have[wrong[0]])}, the teacher's {list(want[wrong[0]])}"
        problems.append(f"{len(wrong)} of another shape ({shapes})")
    if not problems and source.down != teacher.down:
        problems.append("the same tensors, with another number of attention heads")
    if problems:
        raise TeacherError(
            "the ControlNet is not one for the teacher of the plan",
            expected="the teacher's down side, tensor for tensor",
            found="; ".join(problems),
            hint="give a ControlNet of the teacher's family (SD 1, SD 2, SDXL) and full size",
        )


def _trunk_shapes(graph: UNetGraph) -> dict[str, Shape]:
    shapes = shapes_of(graph)
    return {name: shape for name, shape in shapes.items() if not name.startswith(("conv_norm_out.", "conv_out."))}


def _rest_shapes(config: Mapping[str, Any], graph: UNetGraph) -> Iterator[tuple[str, Shape]]:
    """Yield what a ControlNet has besides the U-Net's parts: the embedding of its picture, the zero convolutions."""
    channels = _embedding_channels(config)
    inputs = config.get("conditioning_channels", CONTROL_DEFAULTS["conditioning_channels"])
    layers = {"conv_in": (inputs, channels[0])}
    for i, (narrow, wide) in enumerate(pairwise(channels)):
        layers |= {f"blocks.{2 * i}": (narrow, narrow), f"blocks.{2 * i + 1}": (narrow, wide)}
    layers["conv_out"] = (channels[-1], graph.stem.channels)
    for name, (inside, outside) in layers.items():
        yield f"controlnet_cond_embedding.{name}.weight", (outside, inside, 3, 3)
        yield f"controlnet_cond_embedding.{name}.bias", (outside,)
    widths = [graph.stem.channels]
    for stage in graph.down:
        widths += [stage.channels] * (len(stage.layers) + (stage.sampler is not None))
    names = [f"controlnet_down_blocks.{k}" for k in range(len(widths))] + ["controlnet_mid_block"]
    for name, width in zip(names, [*widths, graph.down[-1].channels], strict=True):
        yield f"{name}.weight", (width, width, 1, 1)
        yield f"{name}.bias", (width,)


def _embedding_channels(config: Mapping[str, Any]) -> list[int]:
    for key, most in (("conditioning_channels", 1), ("conditioning_embedding_out_channels", MAX_EMBEDDING_STAGES)):
        value = config.get(key, CONTROL_DEFAULTS[key])
        values = list(value) if isinstance(value, (list, tuple)) and most > 1 else [value]
        if not 1 <= len(values) <= most or not all(type(v) is int and 1 <= v <= MAX_EMBEDDING_CHANNELS for v in values):
            raise ConfigError(
                f"the config key {key!r} has a value that cannot be used",
                expected=f"integers from 1 to {MAX_EMBEDDING_CHANNELS}",
                found=printable(value),
            )
    return values


def _tensors(
    config: Mapping[str, Any],
    trunk: Callable[[str], tuple[Origin, str | None]],
    rest: Callable[[str], tuple[Origin, str | None]],
) -> tuple[ControlTensor, ...]:
    graph = _control_graph(config)
    tensors = [ControlTensor(name, shape, *trunk(name)) for name, shape in _trunk_shapes(graph).items()]
    tensors += [ControlTensor(name, shape, *rest(name)) for name, shape in _rest_shapes(config, graph)]
    return tuple(tensors)
