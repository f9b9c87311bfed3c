"""The names of open_clip's tensors, and those that the same tensors have in transformers' ``CLIPModel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["renamed", "shapes_of"]

_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip


def renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under transformers' names; queries, keys and values, stored as one, are taken apart.

    Raises:
        KeyError: a name is not one of :func:`shapes_of`'s.
    """
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name in _WHOLE:
            result[_WHOLE[name]] = tensor
        elif name in _TRANSPOSED:
            result[_TRANSPOSED[name]] = tensor.T.contiguous()
        else:
            result |= _of_layer(name, tensor)
    return result


def _of_layer(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    prefix = next(prefix for prefix in _TOWERS if name.startswith(prefix))
    number, _, rest = name.removeprefix(prefix).partition(".")
    layer = f"{_TOWERS[prefix]}{number}."
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{layer}self_attn.{letter}_proj.{kind}": part for letter, part in parts}
    module, _, kind = rest.rpartition(".")
    return {f"{layer}{_IN_LAYER[module]}.{kind}": tensor}


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name → shape of every tensor that open_clip stores of an architecture (its ``model_cfg``)."""
    vision, text, embed = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    width, patch = vision["width"], vision["patch_size"]
    positions = (vision["image_size"] // patch) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (positions, width),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.proj": (width, embed),
        "token_embedding.weight": (text["vocab_size"], text["width"]),
        "positional_embedding": (text["context_length"], text["width"]),
        "text_projection": (text["width"], embed),
        "logit_scale": (),
    }
    for norm, size in (("visual.ln_pre", width), ("visual.ln_post", width), ("ln_final", text["width"])):
        shapes |= {f"{norm}.weight": (size,), f"{norm}.bias": (size,)}
    for prefix, tower in zip(_TOWERS, (vision, text), strict=True):
        for number in range(tower["layers"]):
            shapes |= {f"{prefix}{number}.{name}": shape for name, shape in _layer_shapes(tower).items()}
    return shapes


def _layer_shapes(tower: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width = tower["width"]
    inner = int(width * tower.get("mlp_ratio", 4.0))
    return {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (inner, width),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (width, inner),
        "mlp.c_proj.bias": (width,),
    }
