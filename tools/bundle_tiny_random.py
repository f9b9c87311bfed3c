"""Write the bundled description of ``tiny-random``: configs, tokenizer, and the tensor shapes of VAE and text encoder.

Run after changing a size here: ``.venv/bin/python tools/bundle_tiny_random.py``. The weights themselves are made
from the shapes, on the user's machine. Names are those that every version of transformers reads (with ``text_model.``).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TARGET = Path(__file__).resolve().parents[1] / "unet_surgery" / "_teachers" / "tiny-random"
STAGE_TYPES = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]


def byte_symbols() -> list[str]:
    """Return the 256 printable stand-ins for bytes that byte-level BPE uses, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def write_tokenizer(folder: Path) -> int:
    """Write a CLIP tokenizer that knows bytes only, in its old and new forms; return its vocabulary's size."""
    symbols = byte_symbols()
    words = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False, indent=0) + "\n", "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    return len(vocab)


def main() -> None:
    shutil.rmtree(TARGET, ignore_errors=True)
    vocab_size = write_tokenizer(TARGET / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=32,
            max_position_embeddings=77,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[16, 32],
        norm_num_groups=8,
        sample_size=32,
        latent_channels=4,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=[16, 32, 64, 64],
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=32,
        down_block_types=STAGE_TYPES,
        up_block_types=[name.replace("Down", "Up") for name in reversed(STAGE_TYPES)],
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(TARGET / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_config(TARGET)
    for name in ("vae", "unet", "scheduler"):
        getattr(pipeline, name).save_config(TARGET / name)
    text_encoder.config.architectures = ["CLIPTextModel"]
    text_encoder.config.save_pretrained(TARGET / "text_encoder")
    shapes = {
        "vae/diffusion_pytorch_model.safetensors": {k: list(v.shape) for k, v in vae.state_dict().items()},
        "text_encoder/model.safetensors": {
            k if k.startswith("text_model.") else f"text_model.{k}": list(v.shape)
            for k, v in text_encoder.state_dict().items()
        },
    }
    lines = ",\n".join(
        f'  "{file}": {{\n' + ",\n".join(f'    "{k}": {v}' for k, v in sorted(entries.items())) + "\n  }"
        for file, entries in shapes.items()
    )
    (TARGET / "shapes.json").write_text(f"{{\n{lines}\n}}\n", "utf-8")


if __name__ == "__main__":
    main()
