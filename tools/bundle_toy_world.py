"""Write the configs and the tokenizer of the toy world's pipeline to ``examples/toy_world/pipeline``.

Run after changing a size or a word: ``.venv/bin/python tools/bundle_toy_world.py``. The tokenizer is CLIP's, byte-level
pair encoding, with just the merges that make each word of the captions one token; other text falls into bytes.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

from bundle_tiny_random import byte_symbols
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from unet_surgery.toyworld.grammar import words

TARGET = Path(__file__).resolve().parents[1] / "examples" / "toy_world" / "pipeline"
MAX_TOKENS = 24  # a caption of two things takes 16 with its start and end
WIDTH = 64


def merges() -> list[tuple[str, str]]:
    """Return the pairs to join, in order, until every word is one symbol: the most frequent pair first."""
    spelt = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words()}
    order: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in spelt.values() for pair in pairwise(symbols)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        order.append(best)
        spelt = {word: _merged(symbols, best) for word, symbols in spelt.items()}
    return order


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def write_tokenizer(folder: Path) -> int:
    """Write the tokenizer in its old and new forms; return its vocabulary's size."""
    symbols = byte_symbols()
    joins = merges()
    known = [*symbols, *(s + "</w>" for s in symbols), *dict.fromkeys(a + b for a, b in joins)]
    vocab = {word: number for number, word in enumerate([*known, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=joins, model_max_length=MAX_TOKENS).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False, indent=0) + "\n", "utf-8")
    lines = "".join(f"{a} {b}\n" for a, b in joins)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", "utf-8")
    return len(vocab)


def main() -> None:
    shutil.rmtree(TARGET, ignore_errors=True)
    vocab_size = write_tokenizer(TARGET / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=WIDTH,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[32, 48, 64],
        norm_num_groups=8,
        sample_size=32,
        force_upcast=False,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[32, 64, 128, 128],  # the last two alike, so that bk_tiny can leave the last out
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(str(TARGET / "tokenizer")),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in ("unet", "vae", "scheduler"):
        getattr(pipeline, part).save_config(TARGET / part)
    text_encoder.config.architectures = ["CLIPTextModel"]
    text_encoder.config.save_pretrained(TARGET / "text_encoder")
    pipeline.save_config(TARGET)


if __name__ == "__main__":
    main()
