"""The names of an adapter's tensors, taken apart: which module of the U-Net each acts on, and as what.

Three ways of naming are in use. *Dotted*: ``unet.down_blocks.0.…to_q.lora_A.weight``, with or without a prefix
(diffusers, PEFT). *Processor*: ``…attn1.processor.to_q_lora.down.weight`` (diffusers before PEFT). *Underscored*:
``lora_unet_down_blocks_0_…_to_q.lora_down.weight`` (kohya, LyCORIS), where the module may have its original (sgm) name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from unet_surgery.errors import SurgeryError, TeacherError, printable
from unet_surgery.graph.nodes import UNetGraph
from unet_surgery.lower.original import layer_names
from unet_surgery.lower.weights import Shape

__all__ = ["AdapterKey", "KeyReader", "check_pair", "is_text_encoder", "recognise_adapter"]

KOHYA = "lora_unet_"
TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
PREFIXES = ("unet.", "base_model.model.unet.", "base_model.model.")
STAYING = ("time_embed_", "label_emb_", "out_")
"""Original names that are kept: these modules never move, and diffusers reads some of them in no other spelling."""

BARE = ("down_blocks.", "up_blocks.", "mid_block.", "conv_", "time_embedding.", "add_embedding.", "class_embedding")

# role → the ends of names that play it; what LyCORIS adds plays the role that it is called by
_ENDS = {
    "down": r"lora_A(?:\.\w+)?\.weight|lora_down\.weight|lora(?:_linear_layer)?\.down\.weight",
    "up": r"lora_B(?:\.\w+)?\.weight|lora_up\.weight|lora(?:_linear_layer)?\.up\.weight",
    "mid": r"lora_mid\.weight",
    "scale": r"lora_magnitude_vector(?:\.\w+)*|dora_scale|alpha|scalar",
    "bias": r"lora_[AB](?:\.\w+)?\.bias|lora_(?:down|up)\.bias|lora(?:_linear_layer)?\.(?:down|up)\.bias",
    "lycoris": r"diff|diff_b|w_norm|b_norm|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2",
}
_END = re.compile(r"\.(?:" + "|".join(f"(?P<{role}>{end})" for role, end in _ENDS.items()) + ")$")
_PROCESSOR = re.compile(
    r"(?P<owner>.+\.attn[12])(?P<word>\.processor)?\.(?P<part>to_q|to_k|to_v|to_out)_lora\.(?P<way>down|up)\.weight"
)

_OTHERS = (
    ("a LoRA for Flux, a diffusion transformer", ("lora_unet_double_blocks", "lora_unet_single_blocks")),
    ("a LoRA for SD 3, a diffusion transformer", ("lora_unet_joint_blocks",)),
    ("a LoRA for a diffusion transformer (Flux, SD 3, …)", ("transformer.", "lora_transformer_")),
    ("a LoRA in the naming of the original layout, dotted (ComfyUI)", ("diffusion_model.",)),
)


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """A tensor's name: the teacher's ``module`` it acts on, its ``role`` there, and how it is spelt."""

    module: str
    role: str
    style: Literal["dotted", "processor", "underscored", "as it is"]
    prefix: str
    suffix: str

    def named_for(self, module: str) -> str:
        """Return the name of the same tensor for another module; processors act on modules of the same kind only."""
        if self.style == "as it is":
            return f"{self.prefix}.{self.suffix}"
        if self.style == "processor":
            owner = module.rpartition(".to_")[0]
            return f"{self.prefix}{owner}.{self.suffix}"
        if self.style == "dotted":
            return f"{self.prefix}{module}.{self.suffix}"
        return f"{self.prefix}{module.replace('.', '_')}.{self.suffix}"


class KeyReader:
    """Reads the names of adapters for one U-Net; ``modules`` are those of its modules that have a weight."""

    def __init__(self, graph: UNetGraph, modules: Collection[str]) -> None:
        self._modules = modules
        self._underscored = {module.replace(".", "_"): module for module in modules}
        self._original = {name.replace(".", "_"): module for module, name in layer_names(graph).items()}

    def read(self, name: str) -> AdapterKey | None:
        """Take ``name`` apart; None where it is no adapter's tensor for a U-Net.

        Raises:
            TeacherError: it is one, for a module that this U-Net does not have.
        """
        if name.startswith(KOHYA):
            return self._read_underscored(name)
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        rest = name[len(prefix) :]
        processor = _PROCESSOR.fullmatch(rest)
        if processor is not None:
            part = processor["part"]
            module = f"{processor['owner']}.{part}" + (".0" if part == "to_out" else "")
            suffix = rest[len(processor["owner"]) + 1 :]
            return self._known(AdapterKey(module, processor["way"], "processor", prefix, suffix), name)
        end = _END.search(rest)
        if end is None or not (prefix or rest.startswith(BARE)):
            return None
        module, suffix = rest[: end.start()], rest[end.start() + 1 :]
        return self._known(AdapterKey(module, _role(end), "dotted", prefix, suffix), name)

    def _read_underscored(self, name: str) -> AdapterKey | None:
        end = _END.search(name)
        if end is None:
            return None
        spelt, suffix = name[len(KOHYA) : end.start()], name[end.start() + 1 :]
        module = self._underscored.get(spelt) or self._original.get(spelt)
        if module is None:
            raise _no_such_module(name)
        if spelt in self._original and spelt.startswith(STAYING):
            return AdapterKey(module, _role(end), "as it is", f"{KOHYA}{spelt}", suffix)
        return AdapterKey(module, _role(end), "underscored", KOHYA, suffix)

    def _known(self, key: AdapterKey, name: str) -> AdapterKey:
        if key.module not in self._modules:
            raise _no_such_module(name)
        return key


def is_text_encoder(name: str) -> bool:
    """True for a tensor that acts on a text encoder, which surgery leaves as it is."""
    return name.startswith(TEXT_ENCODERS)


def recognise_adapter(names: Collection[str]) -> str | None:
    """Return which other model's adapter has tensors of these ``names``, as far as they tell."""
    return next((what for what, starts in _OTHERS if any(name.startswith(starts) for name in names)), None)


def check_pair(tensors: Mapping[str, Shape], weight: Shape, module: str) -> None:
    """Check that an adapter's tensors (role → shape) make a change of the shape of ``weight``.

    Raises:
        TeacherError: a half is missing, or they are for a module of another shape; names the module and the shapes.
    """
    halves = [role for role in ("down", "up") if role in tensors]
    if len(halves) == 1:
        raise TeacherError(
            "half of a pair is missing in the LoRA", where=module, expected="down and up", found=f"{halves[0]} alone"
        )
    if not _fits(tensors, weight):
        shown = ", ".join(f"{role} {list(shape)}" for role, shape in tensors.items() if role not in ("scale", "bias"))
        raise TeacherError(
            "the LoRA does not fit the teacher that the plan is of",
            where=module,
            expected=f"for a weight of {list(weight)}",
            found=printable(shown),
            hint="a LoRA of one family (SD 1, SD 2, SDXL) does not fit another's models",
        )


def _fits(tensors: Mapping[str, Shape], weight: Shape) -> bool:
    if "diff" in tensors:
        return tensors["diff"] == weight
    if len(weight) < 2:
        return not any(role in tensors for role in ("down", "mid", "hada_w1_a", "lokr_w1", "lokr_w1_a"))
    try:
        if "down" in tensors:
            return _lora_fits(tensors, weight)
        if "hada_w1_a" in tensors:
            return _loha_fits(tensors, weight)
        if "lokr_w1" in tensors or "lokr_w1_a" in tensors:
            return _lokr_fits(tensors, weight)
    except (KeyError, IndexError):  # a tensor is missing, or has too few dimensions
        return False
    return True


def _lora_fits(tensors: Mapping[str, Shape], weight: Shape) -> bool:
    """Linear layers and 1×1 convolutions are taken for each other, as the libraries that load LoRAs do."""
    down, up = tensors["down"], tensors["up"]
    kernel = _positions(weight)
    if "mid" in tensors:
        middle = tensors["mid"]
        spatial = middle[:2] == (up[1], down[0]) and _positions(middle) == kernel and _positions(down) == 1
    else:
        spatial = _positions(down) == kernel and up[1] == down[0]
    return spatial and _positions(up) == 1 and down[1] == weight[1] and up[0] == weight[0]


def _loha_fits(tensors: Mapping[str, Shape], weight: Shape) -> bool:
    inputs = weight[1] * _positions(weight)
    for number in "12":
        left, right = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
        if f"hada_t{number}" in tensors:
            if (left[1], right[1]) != (weight[0], weight[1]):
                return False
        elif (left[0], right[1]) != (weight[0], inputs):
            return False
    return True


def _lokr_fits(tensors: Mapping[str, Shape], weight: Shape) -> bool:
    if "lokr_t2" in tensors:
        return True  # its factors are shared out in more ways than shapes tell
    rows = columns = 1
    for factor in ("lokr_w1", "lokr_w2"):
        whole = tensors.get(factor)
        left = tensors[f"{factor}_a"] if whole is None else whole
        rows *= left[0]
        columns *= tensors[f"{factor}_b"][1] if whole is None else whole[1] * _positions(whole)
    return (rows, columns) == (weight[0], weight[1] * _positions(weight))


def _positions(shape: Shape) -> int:
    """Return the number of positions of a convolution's kernel, 1 for a matrix."""
    size = 1
    for side in shape[2:]:
        size *= side
    return size


def _role(end: re.Match[str]) -> str:
    role = end.lastgroup
    assert role is not None
    return end[role] if role == "lycoris" else role


def _no_such_module(name: str) -> SurgeryError:
    return TeacherError(
        "the LoRA acts on a module that the teacher of the plan does not have",
        where=printable(name),
        found=recognise_adapter([name]),
        hint="give a LoRA that was trained on this student's teacher",
    )
