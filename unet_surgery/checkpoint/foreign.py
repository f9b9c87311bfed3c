"""Recognising what people give by mistake: other formats by their first bytes, other models by their tensors' names."""

from __future__ import annotations

from collections.abc import Callable, Collection

__all__ = ["recognise", "recognise_names"]

_PAGE = "an HTML or XML page: probably an error page saved in its place"
_NOT_SAFETENSORS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes: a pickle"),
    *((bytes((0x80, protocol)), "a pickle") for protocol in range(2, 6)),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded"),
    *(
        (tag, "an HTML or XML page: probably an error page saved in its place")
        for tag in (b"<!doctype", b"<html", b"<?xml")
    ),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF\r\n", "an HDF5 file (Keras)"),
    (b"\x1f\x8b", "a gzip archive"),
)


def _starting(*prefixes: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefixes)


def _holding(*parts: str) -> Callable[[str], bool]:
    return lambda name: any(part in name for part in parts)


# The first test that any name passes decides, so what is particular stands before what is common.
_is_lora = _holding("lora_", "_lora.", ".lora.", ".lora_down", "hada_w1", "lokr_w1", ".dora_scale")
_MODELS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    (
        "a Flux checkpoint: a diffusion transformer, not a U-Net",
        _holding("single_blocks.", "double_blocks.", "single_transformer_blocks."),
    ),
    ("an SD 3 checkpoint: a diffusion transformer, not a U-Net", _holding("joint_blocks.", "context_embedder.")),
    ("a ControlNet", _starting("controlnet_", "control_model.", "input_hint_block.", "zero_convs.")),
    ("a T2I adapter", _starting("adapter.")),
    ("an IP-Adapter", _starting("ip_adapter.", "image_proj.")),
    (
        "a single-file checkpoint in the original LDM layout",
        _starting("model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model.", "conditioner."),
    ),
    ("a U-Net in the original LDM layout", _starting("input_blocks.", "middle_block.", "output_blocks.")),
    (
        "a VAE",
        _starting("encoder.down", "decoder.up", "encoder.conv_in", "decoder.conv_in", "post_quant_conv", "quant_conv"),
    ),
    ("a text encoder", _starting("text_model.", "transformer.text_model.")),
    ("a textual inversion embedding", _starting("emb_params", "string_to_param")),
)

_PREFIXES = {
    "module.": "DistributedDataParallel's module.",
    "_orig_mod.": "torch.compile's _orig_mod.",
    "unet.": "a pipeline's unet.",
    "_fsdp_wrapped_module.": "FSDP's _fsdp_wrapped_module.",
}


def recognise(start: bytes, file_bytes: int) -> str | None:
    """Return what a file of this size and these first bytes is, if it is something known and not safetensors."""
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= file_bytes - 8:
        return None
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = text.lower()
    return next((what for magic, what in _NOT_SAFETENSORS if text.startswith(magic) or lower.startswith(magic)), None)


def recognise_names(names: Collection[str]) -> str | None:
    """Return what a model with tensors of these ``names`` is, if it is something known and not a diffusers U-Net."""
    if any(_is_lora(name) for name in names):
        return "a LoRA: an adapter for a U-Net, not a U-Net"
    for prefix, whose in _PREFIXES.items():
        if names and all(name.startswith(prefix) for name in names):
            return f"a model saved with a prefix before every name ({whose})"
    return next((what for what, test in _MODELS if any(test(name) for name in names)), None)
