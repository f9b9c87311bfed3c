"""config.json: values of the wrong type or beyond any network, text that is not one JSON object, keys that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.judge import ACCEPTED, PRUNE, Case
from hostile.templates import Build, edit_json, unet

CROSS, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def keys(**values: Any) -> Build:
    return unet(lambda teacher: edit_json(teacher / "config.json", lambda config: config.update(values)))


def without(key: str) -> Build:
    return unet(lambda teacher: edit_json(teacher / "config.json", lambda config: config.pop(key)))


def text(change: Callable[[str], str]) -> Build:
    def build(teacher: Path) -> None:
        path = teacher / "config.json"
        path.write_text(change(path.read_text()), "utf-8")

    return unet(build)


def whole(data: bytes) -> Build:
    return unet(lambda teacher: (teacher / "config.json").write_bytes(data))


def refused(name: str, build: Build, *says: str) -> Case:
    return Case("config", name, build, ("config.json", *says))


def accepted(name: str, build: Build, argv: tuple[str, ...] = PRUNE) -> Case:
    return Case("config", name, build, code=ACCEPTED, argv=argv)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another class": ({"_class_name": "AutoencoderKL"}, "UNet2DConditionModel"),
    "an unconditional U-Net": ({"_class_name": "UNet2DModel"}, "UNet2DConditionModel"),
    "a class that is a list": ({"_class_name": ["os", "system"]}, "UNet2DConditionModel"),
    "a width too few": ({"block_out_channels": [8, 16]}, "block_out_channels"),
    "a width of a billion": ({"block_out_channels": [8, 16, 32, 10**9]}, "block_out_channels"),
    "a width that is text": ({"block_out_channels": [8, 16, 32, "32"]}, "block_out_channels"),
    "a width that is true": ({"block_out_channels": [8, 16, 32, True]}, "block_out_channels"),
    "a width that groups do not divide": ({"block_out_channels": [8, 16, 32, 30]}, "norm_num_groups"),
    "a negative width": ({"block_out_channels": [8, 16, 32, -32]}, "block_out_channels"),
    "a width of 10^4000": ({"block_out_channels": [8, 16, 32, 10**4000]}, "block_out_channels"),
    "layers that are fractional": ({"layers_per_block": 2.0}, "layers_per_block"),
    "a million layers": ({"layers_per_block": 10**6}, "layers_per_block"),
    "layers of three stages": ({"layers_per_block": [2, 2, 2]}, "layers_per_block"),
    "no stages": ({"down_block_types": []}, "1 to 8"),
    "a thousand stages": ({"down_block_types": [CROSS] * 1000, "up_block_types": [CROSS_UP] * 1000}, "1 to 8"),
    "a stage of an unknown type": ({"down_block_types": [CROSS] * 3 + ["DownBlok2D"]}, "'DownBlock2D' instead of"),
    "a stage whose type is a list": ({"down_block_types": [[CROSS]] * 4}, "down_block_types"),
    "stages that are text": ({"down_block_types": CROSS}, "down_block_types"),
    "a mid of another kind": ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
    "a mid that is a list": ({"mid_block_type": []}, "mid_block_type"),
    "no heads": ({"attention_head_dim": 0}, "attention_head_dim"),
    "more heads than channels": ({"attention_head_dim": 64}, "attention_head_dim"),
    "num_attention_heads": ({"num_attention_heads": 8}, "num_attention_heads"),
    "a billion transformer blocks": ({"transformer_layers_per_block": 10**9}, "transformer_layers_per_block"),
    "all bounds at once": (
        {"layers_per_block": 16, "transformer_layers_per_block": 64},
        "1024 transformer blocks at most",
    ),
    "a context that is text": ({"cross_attention_dim": "768"}, "cross_attention_dim"),
    "image conditioning": ({"encoder_hid_dim": 4096}, "encoder_hid_dim"),
    "gated attention": ({"attention_type": "gated"}, "attention_type"),
    "dual attention": ({"dual_cross_attention": True}, "dual_cross_attention"),
    "a Fourier time embedding": ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    "no channels": ({"in_channels": 0}, "in_channels"),
    "an even kernel": ({"conv_in_kernel": 4}, "odd"),
    "a flag that is text": ({"use_linear_projection": "yes"}, "use_linear_projection"),
    "a size that is text": ({"sample_size": "64"}, "sample_size"),
    "a size of three": ({"sample_size": [8, 8, 8]}, "sample_size"),
    "text and time without sizes": ({"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
    "a million classes' million": ({"num_class_embeds": 10**12}, "num_class_embeds"),
}

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"

CONFIG_CASES = (
    *(refused(name, keys(**change), says) for name, (change, says) in WRONG.items()),
    # --- text that is not one JSON object ---
    refused("empty", whole(b""), "not a valid JSON object"),
    refused("a list", whole(b"[]"), "not an object"),
    refused("null", whole(b"null"), "not an object"),
    refused("cut in half", text(lambda t: t[: len(t) // 2]), "not a valid JSON object"),
    refused("two objects", text(lambda t: t + t), "not a valid JSON object"),
    refused("comments", text(lambda t: "// mine\n" + t), "not a valid JSON object"),
    refused("UTF-16", whole(json.dumps({"a": 1}).encode("utf-16")), "not UTF-8"),
    refused(
        "a key twice", text(lambda t: t.replace('"in_channels": 4', '"in_channels": 4, "in_channels": 9')), "twice"
    ),
    refused("NaN", text(lambda t: t.replace("1e-05", "NaN")), "NaN is not JSON"),
    refused("1e999", text(lambda t: t.replace("1e-05", "1e999")), "beyond what a float holds"),
    refused("an integer of 5000 digits", text(lambda t: t.replace("1e-05", "9" * 5000)), "digits"),
    refused("deep nesting", whole(b'{"a":' * 200_000), "nested too deeply"),
    refused("half a character", text(lambda t: t.replace("{", '{"\\ud800": 1,', 1)), "lone surrogate"),
    refused("a page", whole(b"<!DOCTYPE html><html></html>"), "HTML"),
    refused("a pointer", whole(b"version https://git-lfs.github.com/spec/v1\n"), "LFS pointer"),
    refused("2 MiB of an unknown key", keys(mine="x" * (2 << 20)), "implausibly large"),
    refused("an empty object", whole(b"{}"), "_class_name"),
    # --- what is legal ---
    accepted("no _class_name's version", without("_diffusers_version")),
    accepted("unknown keys, carried", keys(my_key=[1, {"a": None}], other="x" * 10_000)),
    accepted("terminal codes in unknown keys", keys(**{ESCAPES: ESCAPES})),
    accepted("terminal codes, inspected", keys(**{ESCAPES: ESCAPES}), ("inspect", "teacher")),
    accepted("terminal codes, planned", keys(**{ESCAPES: ESCAPES}), ("plan", "-r", "bk_tiny", "-t", "teacher")),
    accepted(
        "terminal codes, as JSON", keys(**{ESCAPES: ESCAPES}), ("plan", "-r", "bk_tiny", "-t", "teacher", "--json")
    ),
    accepted("a path of somebody's machine for a name", keys(_name_or_path="/home/somebody/secret/\x1b[31m")),
    accepted("YAML and Markdown for a name", keys(_name_or_path="a/b\n---\nlicense: mit\n# x")),
    accepted(
        "a byte order of keys that is nobody's", text(lambda t: json.dumps(dict(reversed(json.loads(t).items()))))
    ),
)
