"""CLIP with open_clip's weights, in transformers' model: cosines of pictures and captions, as CLIP score and HPSv2 are.

CLIP score (Hessel et al., arXiv 2104.08718) as BK-SDM published it: ViT-g-14 laion2b_s34b_b88k, the shorter side to
224, the middle cut out, the plain mean of cosines. HPSv2 (Wu et al., arXiv 2306.09341): ViT-H-14 finetuned, the
longer side to 224, black around, 100 times the mean of cosines.

Shapes: B batch; pictures are uint8 [B, H, W, 3]; S the model's side; T tokens; E the shared width.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.errors import MissingExtraError, TeacherError, first_few, printable
from unet_surgery.evaluate.clipnames import renamed, shapes_of
from unet_surgery.evaluate.weights import OPEN_CLIP_CONFIG, Weights, read_tensors

__all__ = ["Clip", "Fit", "cleaned", "load_clip", "middle_square"]

Fit = Literal["crop", "pad"]
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "ViT-g-14": {
        "embed_dim": 1024,
        "vision_cfg": {
            "image_size": 224, "layers": 40, "width": 1408, "head_width": 88, "mlp_ratio": 4.3637, "patch_size": 14
        },
        "text_cfg": _TEXT,
    },
    "ViT-H-14": {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": _TEXT,
    },
}  # fmt: skip
"""Of files that no open_clip_config.json lies beside."""

_KEYS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "": {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict, "quick_gelu": bool},
    "vision_cfg": {
        "image_size": int, "layers": int, "width": int, "head_width": int, "mlp_ratio": (int, float), "patch_size": int
    },
    "text_cfg": {
        "context_length": int, "vocab_size": int, "width": int, "heads": int, "layers": int, "mlp_ratio": (int, float)
    },
}  # fmt: skip
LARGEST = 100_000


@dataclass(frozen=True, slots=True)
class Clip:
    """A model, its tokenizer, and how pictures are brought to its ``side``."""

    model: Any
    tokenizer: Any
    side: int
    fit: Fit

    def cosines(self, pictures_BHW3: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float64]:
        """Return the cosine of each picture with its own caption, [B].

        Raises:
            MissingExtraError: a caption needs ftfy, and it is not installed.
        """
        with torch.inference_mode():
            images_BE = self.images(pictures_BHW3)
            texts_BE = self.texts(captions)
            cosines_B = (images_BE * texts_BE).sum(dim=1)
        found: NDArray[np.float64] = cosines_B.double().cpu().numpy()
        return found

    def images(self, pictures_BHW3: NDArray[np.uint8]) -> torch.Tensor:
        """Return the pictures' embeddings, of length 1: fp32 [B, E]."""
        pixels = self._pixels(torch.from_numpy(pictures_BHW3))
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return functional.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def texts(self, captions: Sequence[str]) -> torch.Tensor:
        """Return the captions' embeddings, of length 1: fp32 [B, E]."""
        length = self.model.config.text_config.max_position_embeddings
        texts = [cleaned(caption) for caption in captions]
        found = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        # No mask of the padding: attention is causal, and the embedding is taken at the text's end.
        pooled = self.model.text_model(input_ids=found.input_ids.to(self.model.device)).pooler_output
        return functional.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def _pixels(self, pictures_BHW3: torch.Tensor) -> torch.Tensor:
        """Return what the model takes, [B, 3, S, S]."""
        weight = self.model.visual_projection.weight
        pixels = pictures_BHW3.to(weight.device).permute(0, 3, 1, 2).float() / 255
        if self.fit == "pad":
            pixels = _padded(pixels, self.side)
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
        return ((pixels - mean) / std).to(weight.dtype)


def middle_square(picture_HW3: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return the middle of a picture whose shorter side became ``side`` by PIL's bicubic filter: [S, S, 3]."""
    height, width = picture_HW3.shape[:2]
    image = Image.fromarray(picture_HW3)
    if min(width, height) != side:
        size = (side, side * height // width) if width <= height else (side * width // height, side)
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2.0) for length in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def _padded(pixels_B3HW: torch.Tensor, side: int) -> torch.Tensor:
    """Return pictures whose longer side became ``side``, bicubic and antialiased in floating point, on black."""
    height, width = pixels_B3HW.shape[-2:]
    scale = side / max(height, width)
    size = (round(height * scale), round(width * scale))
    if size != (height, width):
        pixels_B3HW = functional.interpolate(
            pixels_B3HW, size=size, mode="bicubic", align_corners=False, antialias=True
        )
    down, across = side - size[0], side - size[1]
    return functional.pad(pixels_B3HW, (across // 2, across - across // 2, down // 2, down - down // 2))


def cleaned(caption: str) -> str:
    """Return a caption as open_clip's tokenizer sees it: mended by ftfy, entities resolved, one space, lower case.

    Of printable ASCII without an ampersand ftfy changes nothing, and is not needed.

    Raises:
        MissingExtraError: it is needed, and not installed.
    """
    if not caption.isascii() or "&" in caption or not caption.replace("\n", "").replace("\t", "").isprintable():
        try:
            import ftfy
        except ImportError as error:
            raise MissingExtraError(
                "a caption has characters that open_clip passes through ftfy, and that is not installed",
                found=printable(caption),
                hint="pip install 'unet-surgery[evaluate]'",
            ) from error
        caption = ftfy.fix_text(caption)
    return " ".join(html.unescape(html.unescape(caption)).split()).lower()


def load_clip(
    weights: Weights, fit: Fit, *, default: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Clip:
    """Load open_clip's weights strictly: every tensor is used, and every parameter has one.

    The architecture is that of the open_clip_config.json beside them, else ``default``'s.

    Raises:
        TeacherError: config, weights or tokenizer are missing or damaged, or do not belong together.
    """
    path = weights.beside(OPEN_CLIP_CONFIG)
    config = CONFIGS[default] if path is None else _checked(read_object(path), path)
    tensors = read_tensors(weights.path)
    model = _load(config, tensors, weights.path).to(device=device, dtype=dtype or torch.float32)
    return Clip(model, _tokenizer(weights, config), config["vision_cfg"]["image_size"], fit)


def _checked(found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the architecture in an open_clip_config.json, whose every key is one that is built here."""
    config = found.get("model_cfg")
    if not isinstance(config, dict):
        raise TeacherError("this is no config of open_clip", where=str(path), expected="a key model_cfg")
    for section, keys in _KEYS.items():
        values = config.get(section) if section else config
        if not isinstance(values, dict):
            raise TeacherError("the config lacks a section", where=str(path), expected=section)
        unknown = [key for key in values if key not in keys]
        if unknown:
            raise TeacherError("this kind of CLIP is not built here", where=str(path), found=first_few(unknown))
        missing = [key for key in keys if key not in values and key not in ("quick_gelu", "head_width", "mlp_ratio")]
        wrong = [k for k, v in values.items() if not isinstance(v, keys[k]) or (type(v) is int and not 0 < v < LARGEST)]
        if missing or wrong:
            raise TeacherError("the config has wrong values", where=str(path), found=first_few([*missing, *wrong]))
    preprocess = found.get("preprocess_cfg", {})
    if isinstance(preprocess, dict) and (
        tuple(preprocess.get("mean", MEAN)) != MEAN or tuple(preprocess.get("std", STD)) != STD
    ):
        raise TeacherError("this CLIP takes pictures of another scale", where=str(path), expected=f"mean {MEAN}")
    return config


def _load(config: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path) -> Any:
    import transformers

    expected = shapes_of(config)
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n]),
    }
    told = "; ".join(f"{kind}: {first_few(names)}" for kind, names in faults.items() if names)
    if told:
        raise TeacherError(
            "these are not the weights of this CLIP", where=str(path), expected=f"{len(expected)} tensors", found=told
        )
    with torch.device("meta"):
        model = transformers.CLIPModel(_transformers_config(transformers, config)).eval().requires_grad_(False)
    model.load_state_dict(renamed(tensors), strict=True, assign=True)
    for module in model.modules():  # what is not stored: 0, 1, 2, …
        for name, buffer in module.named_buffers(recurse=False):
            assert name == "position_ids"
            setattr(module, name, torch.arange(buffer.shape[-1])[None])
    return model


def _transformers_config(transformers: Any, config: dict[str, Any]) -> Any:
    vision, text = config["vision_cfg"], config["text_cfg"]
    shared = {"hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu", "layer_norm_eps": 1e-5}
    return transformers.CLIPConfig(
        projection_dim=config["embed_dim"],
        vision_config={
            **shared,
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "projection_dim": config["embed_dim"],
        },
        text_config={
            **shared,
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "projection_dim": config["embed_dim"],
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
            "pad_token_id": text["vocab_size"] - 1,
        },
        attn_implementation="sdpa",
    )


def _tokenizer(weights: Weights, config: dict[str, Any]) -> Any:
    """Load CLIP's tokenizer from vocab.json and merges.txt; what else may lie there has no say."""
    import transformers

    vocabulary, merges = weights.beside("vocab.json"), weights.beside("merges.txt")
    if vocabulary is None or merges is None:
        raise TeacherError(
            "the tokenizer's files are missing",
            where=", ".join(str(folder) for folder in weights.folders),
            expected="vocab.json and merges.txt beside the weights",
            hint="--tokenizer FOLDER: that of any Stable Diffusion v1 pipeline is the same",
        )
    size = config["text_cfg"]["vocab_size"]
    tokens = read_object(vocabulary)
    ends = {"<|startoftext|>": size - 2, "<|endoftext|>": size - 1}
    if len(tokens) != size or any(tokens.get(token) != number for token, number in ends.items()):
        raise TeacherError(
            "the tokenizer is not that of these weights",
            where=str(vocabulary),
            expected=f"{size} tokens, the last two {json.dumps(list(ends))}",
            found=f"{len(tokens)} tokens",
        )
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    # Before transformers 5, CLIPTokenizer without ftfy cut words where open_clip does not.
    kind = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)
    return kind(str(vocabulary), str(merges), pad_token="<|endoftext|>", **special)  # noqa: S106
