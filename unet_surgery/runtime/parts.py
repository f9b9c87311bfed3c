"""A pipeline's parts beside the U-Net, loaded strictly: every tensor of their files accounted for, or an error.

transformers initialises anew what it misses, with a warning, and files of a ``CLIPTextModel`` come in two layouts, with
and without ``text_model.`` before each name: a text encoder that is partly random still gives plausible embeddings.

Shapes: n prompts, T tokens, D text width.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet_surgery.checkpoint.components import INDEX, component_names
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.checkpoint.layout import UNET_BASE, WeightsChoice, choose_weights, component_weights
from unet_surgery.checkpoint.reader import open_weights
from unet_surgery.checkpoint.student import CONFIG
from unet_surgery.errors import MissingExtraError, TeacherError, VerificationError, first_few, printable

if TYPE_CHECKING:
    import torch

__all__ = ["Parts", "check_pipeline", "encode_prompts", "load_parts", "pixels_per_latent", "tokenize"]

KINDS = {
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "vae": ("AutoencoderKL",),
}
"""The parts that are loaded, and their classes: those of SD v1 and v2."""

SCHEDULER_CONFIG = "scheduler_config.json"
NOT_A_WEIGHT = "position_ids"  # 0 … T−1, in files of old transformers


@dataclass(frozen=True, slots=True)
class Parts:
    """A pipeline's parts beside the U-Net, frozen, in evaluation mode, on one device.

    ``tokenizer`` is a ``CLIPTokenizer``, ``text_encoder`` a ``CLIPTextModel``, ``vae`` an ``AutoencoderKL``;
    ``scheduler_config`` is the content of the pipeline's scheduler_config.json, ``folder`` the pipeline.
    """

    tokenizer: Any
    text_encoder: Any
    vae: Any
    scheduler_config: dict[str, Any]
    folder: Path


def load_parts(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    vae_dtype: torch.dtype | None = None,
) -> Parts:
    """Load the parts of the pipeline in ``folder``, from its files alone: nothing is looked up or fetched.

    Values are those of the files, cast to ``dtype`` (fp32 if None) and the VAE's to ``vae_dtype`` (``dtype`` if None).
    The global random state is left as it was.

    Raises:
        TeacherError: ``folder`` is a U-Net alone, another kind of pipeline, or a file of it is missing or damaged.
        VerificationError: a tensor is missing, unexpected or misshaped (names the first few), or a library refuses.
        MissingExtraError: torch, diffusers or transformers is not installed.
    """
    torch, diffusers, transformers = _libraries()
    root = Path(folder)
    check_pipeline(root)
    dtype = torch.float32 if dtype is None else dtype
    scheduler_config = read_object(root / "scheduler" / SCHEDULER_CONFIG)
    with _quiet(), torch.random.fork_rng(devices=[]):  # models are made with random weights first
        tokenizer = _load_tokenizer(transformers.CLIPTokenizer, root / "tokenizer")
        text_encoder = _load_model(transformers.CLIPTextModel, root / "text_encoder", base="model")
        vae = _load_model(diffusers.AutoencoderKL, root / "vae", base=UNET_BASE, low_cpu_mem_usage=False)
        for model, model_dtype in ((text_encoder, dtype), (vae, vae_dtype or dtype)):
            model.to(device=device, dtype=model_dtype).eval().requires_grad_(False)
    _check_words(tokenizer, text_encoder, root)
    return Parts(tokenizer, text_encoder, vae, scheduler_config, root)


def pixels_per_latent(vae: Any) -> int:
    """Return how many pixels of a side one latent of ``vae`` stands for: 8 in SD."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def tokenize(tokenizer: Any, captions: Sequence[str]) -> torch.Tensor:
    """Return the token ids of ``captions``, padded or cut to the tokenizer's length: int64 [n, T]."""
    import torch

    length = tokenizer.model_max_length
    if not captions:
        return torch.empty(0, length, dtype=torch.int64)
    ids = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    assert isinstance(ids.input_ids, torch.Tensor)
    return ids.input_ids


def encode_prompts(parts: Parts, prompts: Sequence[str] | torch.Tensor) -> torch.Tensor:
    """Return the embeddings of prompts, or of token ids [n, T], as SD v1 and v2 condition on them: [n, T, D].

    They are the text encoder's last hidden state after its final norm, in its dtype and on its device, without a
    graph. All n go through at once.
    """
    import torch

    ids_NT = prompts if isinstance(prompts, torch.Tensor) else tokenize(parts.tokenizer, prompts)
    with torch.no_grad():
        embeds_NTD = parts.text_encoder(ids_NT.to(parts.text_encoder.device)).last_hidden_state
    assert isinstance(embeds_NTD, torch.Tensor)
    return embeds_NTD


def _libraries() -> tuple[Any, Any, Any]:
    try:
        import diffusers
        import torch
        import transformers

        return torch, diffusers, transformers
    except (ImportError, RuntimeError, OSError) as error:
        raise MissingExtraError(
            "torch, diffusers and transformers are needed for this, and do not import",
            found=printable(str(error).replace("\n", " ")),
            hint="unet-surgery doctor says why; where they are missing: pip install 'unet-surgery[torch]'",
        ) from error


def check_pipeline(root: Path) -> None:
    """Refuse what is not a pipeline like SD v1's and v2's, by its model_index.json.

    Raises:
        TeacherError: it is a U-Net alone, or another kind of pipeline.
    """
    if not (root / INDEX).is_file():
        is_unet = (root / CONFIG).is_file() or (root / "unet").is_dir()
        raise TeacherError(
            "this is a U-Net alone, and its pipeline's other parts are needed" if is_unet else "this is no pipeline",
            where=str(root),
            expected=f"{INDEX} and folders tokenizer, text_encoder, vae, scheduler",
            hint="give a pipeline's folder, or prune again with --base PIPELINE, which brings the other parts",
        )
    kinds = component_names(root)
    if "text_encoder_2" in kinds:
        raise TeacherError(
            "pipelines with two text encoders cannot be used here",
            where=str(root / INDEX),
            expected="a pipeline of SD v1 or v2",
            found="text_encoder_2",
        )
    for name, expected in KINDS.items():
        if kinds.get(name) not in expected:
            raise TeacherError(
                f"the pipeline's {name} cannot be used here",
                where=str(root / INDEX),
                expected=" or ".join(expected),
                found=printable(kinds.get(name, "none")),
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence both libraries' logs and progress bars, and put their settings back: what they find is raised."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as of_transformers

    levels = [(log, log.get_verbosity()) for log in (of_diffusers, of_transformers)]
    had_bars, hub_had_none = of_transformers.is_progress_bar_enabled(), are_progress_bars_disabled()
    for log, _ in levels:
        log.set_verbosity(log.CRITICAL)
    if had_bars:
        of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in levels:
            log.set_verbosity(level)
        if had_bars:
            of_transformers.enable_progress_bar()
            if hub_had_none:  # transformers switches the Hub's bars with its own
                disable_progress_bars()


def _load_tokenizer(kind: Any, folder: Path) -> Any:
    return _refusals_named(lambda: kind.from_pretrained(str(folder), local_files_only=True), folder)


def _load_model(kind: Any, folder: Path, *, base: str, **options: Any) -> Any:
    """Load a model in fp32, and raise unless file and model have the same tensors, one for one."""
    names = os.listdir(folder) if folder.is_dir() else []
    choice = component_weights(names, None) or choose_weights(names, None, where=str(folder), base=base)
    num_stored = _count_tensors(folder, choice)
    model, info = _refusals_named(
        lambda: kind.from_pretrained(
            str(folder),
            variant=choice.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named below, all of them
            torch_dtype=_fp32(),
            **options,
        ),
        folder,
    )
    problems = [
        f"{len(keys)} {what}: {first_few(sorted(map(_key_text, keys)))}"
        for what, kind_of_key in (("missing", "missing"), ("unexpected", "unexpected"), ("misshaped", "mismatched"))
        if (keys := info.get(f"{kind_of_key}_keys"))
    ]
    problems += [printable(str(message)) for message in info.get("error_msgs") or ()]
    num_expected = len(model.state_dict())
    if not problems and num_stored != num_expected:
        problems = [f"{num_stored} tensors where {num_expected} are expected: some have two names"]
    if problems:
        raise VerificationError(
            f"the weights are not those of a {kind.__name__} of this config",
            where=str(folder / choice.file),
            expected="every tensor of the model, in its shape, and no other",
            found="; ".join(problems),
            hint="download the pipeline again; what a library would load in spite of this is partly random",
        )
    return model


def _fp32() -> torch.dtype:
    import torch

    return torch.float32


def _count_tensors(folder: Path, choice: WeightsChoice) -> int:
    with open_weights(folder, choice) as weights:
        return sum(1 for name in weights if name.rpartition(".")[2] != NOT_A_WEIGHT)


def _key_text(key: Any) -> str:
    """Return a tensor's name; a misshaped one's with its shape in the file and in the model."""
    if isinstance(key, str):
        return key
    name, stored, expected = key
    return f"{name} {list(stored)} instead of {list(expected)}"


def _refusals_named(load: Callable[[], Any], folder: Path) -> Any:
    try:
        return load()
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise VerificationError(
            f"the pipeline's {folder.name} cannot be loaded", where=str(folder), found=printable(str(error))
        ) from error


def _check_words(tokenizer: Any, text_encoder: Any, root: Path) -> None:
    """An id beyond the embedding, or a position beyond the last, would fail in the middle of a run."""
    config = text_encoder.config
    for what, has, limit in (
        ("words", len(tokenizer), config.vocab_size),
        ("positions", tokenizer.model_max_length, config.max_position_embeddings),
    ):
        if has > limit:
            raise VerificationError(
                "the tokenizer is not the text encoder's",
                where=str(root / "tokenizer"),
                expected=f"at most {limit} {what}",
                found=str(has),
            )
