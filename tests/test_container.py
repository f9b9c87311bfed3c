"""The safetensors container and config.json: one malformed input per error, and the legal oddities."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import CONFIGS
from safetensors.numpy import save

from unet_surgery.checkpoint.header import DTYPE_BITS, encode_header, read_header
from unet_surgery.checkpoint.jsonfile import parse_object
from unet_surgery.errors import ConfigError, ContainerError
from unet_surgery.graph import build, parse_config


def file_of(header: Any, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": list(offsets)}


MALFORMED = {
    "empty": (b"", "too short"),
    "seven bytes": (b"1234567", "too short"),
    "length beyond the file": ((1 << 40).to_bytes(8, "little") + b"{}", "cut short"),
    "implausible length": (None, "implausibly large"),
    "zip": (b"PK\x03\x04" + b"\0" * 200, "pickle"),
    "pickle": (b"\x80\x02}q\x00." + b"\0" * 100, "pickle"),
    "html": (b"<!DOCTYPE html><html>" + b" " * 100, "HTML"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "LFS pointer"),
    "not an object": (file_of(b"[1]", b""), "not a JSON object"),
    "leading space": (file_of(b" {}", b""), "not a JSON object"),
    "not json": (file_of(b"{nope}", b""), "not valid JSON"),
    "not utf-8": (file_of(b'{"\xff": 1}', b""), "not UTF-8"),
    "NaN": (file_of(b'{"a": NaN}', b""), "NaN"),
    "deep": (file_of(b'{"a":' + b"[" * 80_000, b""), "JSON"),
    "huge integer": (file_of(b'{"a": {"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}", b""), "5000 digits"),
    "duplicate key": (file_of(b'{"a": 1, "a": 2}', b""), "stands twice"),
    "metadata not strings": (file_of({"__metadata__": {"a": 1}, "x": entry()}), "__metadata__"),
    "empty name": (file_of({"": entry()}), "impossible name"),
    "control character in a name": (file_of({"a\x1b[31m": entry()}), "impossible name"),
    "entry not an object": (file_of({"a": 3}), "malformed"),
    "missing field": (file_of({"a": {"dtype": "F32"}}), "malformed"),
    "extra field": (file_of({"a": {**entry(), "x": 1}}), "malformed"),
    "unknown dtype": (file_of({"a": entry("F12")}), "unknown dtype"),
    "dtype not text": (file_of({"a": entry(["F32"])}), "unknown dtype"),
    "negative size": (file_of({"a": entry(shape=(-2, -2))}), "impossible shape"),
    "fractional size": (file_of({"a": entry(shape=(2.0, 2))}), "impossible shape"),
    "boolean size": (file_of({"a": entry(shape=(True, 4))}), "impossible shape"),
    "shape not a list": (file_of({"a": entry(shape="4")}), "impossible shape"),
    "offsets reversed": (file_of({"a": entry(offsets=(16, 0))}), "impossible data_offsets"),
    "three offsets": (file_of({"a": entry(offsets=(0, 8, 16))}), "impossible data_offsets"),
    "too few bytes": (file_of({"a": entry(offsets=(0, 12))}, b"\0" * 12), "disagree"),
    "overflowing shape": (file_of({"a": entry(shape=(2**33, 2**33))}), "disagree"),
    "half a byte": (file_of({"a": entry("F4", (3,), (0, 2))}, b"\0\0"), "disagree"),
    "hole": (file_of({"a": entry(), "b": entry(offsets=(20, 36))}, b"\0" * 36), "hole"),
    "overlap": (file_of({"a": entry(), "b": entry(offsets=(8, 24))}, b"\0" * 24), "overlap"),
    "trailing bytes": (file_of({"a": entry()}, b"\0" * 17), "behind the last tensor"),
    "data cut": (file_of({"a": entry()}, b"\0" * 15), "cut short"),
}


def write(tmp_path: Path, data: bytes | None) -> int:
    path = tmp_path / "x.safetensors"
    if data is None:
        path.write_bytes((9 << 20).to_bytes(8, "little"))
        os.truncate(path, 10 << 20)
    else:
        path.write_bytes(data)
    return os.open(path, os.O_RDONLY)


@pytest.mark.parametrize("case", sorted(MALFORMED))
def test_malformed_containers(tmp_path: Path, case: str) -> None:
    data, says = MALFORMED[case]
    fd = write(tmp_path, data)
    with pytest.raises(ContainerError) as caught:
        read_header(fd, "x.safetensors")
    os.close(fd)
    assert says in str(caught.value)
    assert "x.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1200
    assert "\x1b" not in str(caught.value)


LEGAL = {
    "no tensors": file_of({}, b""),
    "no metadata": file_of({"a": entry()}),
    "padding": file_of(json.dumps({"a": entry()}).encode() + b" " * 77),
    "any order": file_of({"b": entry(offsets=(16, 32)), "a": entry()}, b"\0" * 32),
    "empty tensors": file_of({"a": entry(shape=(0, 3), offsets=(0, 0)), "b": entry()}),
    "scalar": file_of({"a": entry(shape=(), offsets=(0, 4))}, b"\0" * 4),
    "unaligned": file_of({"a": entry("U8", (3,), (0, 3)), "b": entry(offsets=(3, 19))}, b"\0" * 19),
}


@pytest.mark.parametrize("case", sorted(LEGAL))
def test_legal_oddities(tmp_path: Path, case: str) -> None:
    fd = write(tmp_path, LEGAL[case])
    read_header(fd, "x")
    os.close(fd)


def test_headers_are_the_reference_implementations(tmp_path: Path) -> None:
    tensors = {
        "b.weight": np.zeros((2, 3), np.float32),
        "a.half": np.zeros((5,), np.float16),
        "c": np.zeros((), np.float64),
        "ünïcode": np.zeros((1,), np.float32),
        "a.first": np.zeros((4,), np.float32),
    }
    reference = save(tensors, metadata={"format": "pt"})
    names = {"float32": "F32", "float16": "F16", "float64": "F64"}
    order = list(DTYPE_BITS)
    ours = encode_header(
        [
            (name, names[str(t.dtype)], t.shape)
            for name, t in sorted(tensors.items(), key=lambda item: (-order.index(names[str(item[1].dtype)]), item[0]))
        ],
        {"format": "pt"},
    )
    assert reference[: len(ours)] == ours
    fd = write(tmp_path, reference)
    header = read_header(fd, "x")
    os.close(fd)
    assert {name: info.shape for name, info in header.tensors.items()} == {n: t.shape for n, t in tensors.items()}
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize("text", [b'{"a": Infinity}', b'{"a": -Infinity}', b"3", b"{} x", b"\xef\xbb\xbf{}"])
def test_ambiguous_json(text: bytes) -> None:
    with pytest.raises(ValueError, match="."):
        parse_object(text)


# --- config.json ----------------------------------------------------------------------------------------------------

WRONG_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"_class_name": "AutoencoderKL"}, "UNet2DConditionModel"),
    ({"block_out_channels": [8, 16]}, "block_out_channels"),
    ({"block_out_channels": [8, 16, 32, "32"]}, "block_out_channels"),
    ({"block_out_channels": [8, 16, 32, 10**9]}, "block_out_channels"),
    ({"block_out_channels": [8, 16, 32, True]}, "block_out_channels"),
    ({"block_out_channels": [8, 16, 32, 30]}, "norm_num_groups"),
    ({"layers_per_block": 2.0}, "layers_per_block"),
    ({"layers_per_block": [2, 2]}, "layers_per_block"),
    ({"layers_per_block": 99}, "layers_per_block"),
    ({"layers_per_block": -1}, "layers_per_block"),
    ({"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlok2D"]}, "'DownBlock2D' instead of DownBlok2D"),
    ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types"),
    ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types"),
    ({"down_block_types": []}, "1 to 8"),
    ({"down_block_types": ["DownBlock2D"] * 9}, "1 to 8"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
    ({"attention_head_dim": 0}, "attention_head_dim"),
    ({"attention_head_dim": None}, "attention_head_dim"),
    ({"attention_head_dim": 64}, "attention_head_dim"),
    ({"num_attention_heads": 8}, "num_attention_heads"),
    ({"cross_attention_dim": "768"}, "cross_attention_dim"),
    ({"only_cross_attention": 1}, "only_cross_attention"),
    ({"encoder_hid_dim": 4096}, "encoder_hid_dim"),
    ({"dual_cross_attention": True}, "dual_cross_attention"),
    ({"dual_cross_attention": 0}, "dual_cross_attention"),
    ({"attention_type": "gated"}, "attention_type"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    ({"class_embed_type": "poetry"}, "class_embed_type"),
    ({"addition_embed_type": "image"}, "addition_embed_type"),
    ({"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
    ({"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift"),
    ({"transformer_layers_per_block": [1, 1]}, "transformer_layers_per_block"),
    ({"transformer_layers_per_block": 1000}, "transformer_layers_per_block"),
    ({"transformer_layers_per_block": [1, [1, 1], 1, 1]}, "reverse_transformer_layers_per_block"),
    (
        {"transformer_layers_per_block": [1, [1], 1, 1], "reverse_transformer_layers_per_block": [1, 1, 1, 1]},
        "2 depths where the stage has 2 layers",
    ),
    ({"norm_num_groups": None}, "norm_num_groups"),
    ({"sample_size": "64"}, "sample_size"),
    ({"sample_size": [64]}, "sample_size"),
    ({"conv_in_kernel": 4}, "odd"),
    ({"in_channels": 0}, "in_channels"),
    ({"use_linear_projection": "yes"}, "use_linear_projection"),
]


@pytest.mark.parametrize(("change", "says"), WRONG_CONFIGS, ids=[json.dumps(c)[:60] for c, _ in WRONG_CONFIGS])
def test_wrong_configs_are_refused_by_key(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**CONFIGS["sd1"], **change})
    assert says in str(caught.value)


def test_absent_is_not_null() -> None:
    absent = {key: value for key, value in CONFIGS["sd1"].items() if key != "mid_block_type"}
    assert build(parse_config(absent)).mid is not None
    assert build(parse_config({**absent, "mid_block_type": None})).mid is None


def test_defaults_are_diffusers() -> None:
    import inspect

    from diffusers import UNet2DConditionModel

    from unet_surgery.graph.config import DEFAULTS, INERT_KEYS, ONLY_VALUES

    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name != "self"}

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    assert {key: plain(theirs[key]) for key in DEFAULTS} == dict(DEFAULTS)
    assert {key: theirs[key] for key in ONLY_VALUES} == {key: values[0] for key, values in ONLY_VALUES.items()}
    known = DEFAULTS.keys() | ONLY_VALUES.keys() | {key for key in INERT_KEYS if not key.startswith("_")}
    assert known == theirs.keys()


def test_unknown_keys_are_carried_and_listed() -> None:
    config = parse_config({**CONFIGS["sd1"], "my_key": [1, {"a": 2}]})
    assert config.unknown_keys == ("my_key",)
