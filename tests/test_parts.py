"""A pipeline's parts: the values of their files in every layout, or an error that names what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import unet_surgery
from unet_surgery.errors import ContainerError, SurgeryError, TeacherError, VerificationError
from unet_surgery.runtime.parts import Parts, encode_prompts, load_parts, tokenize

TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
PREFIX = "text_model."
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def pipeline(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the small pipeline that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "pipeline"))


@pytest.fixture(scope="module")
def parts(tiny: Path) -> Parts:
    return load_parts(tiny)


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def with_position_ids(tensors: Tensors) -> Tensors:
    return {**tensors, f"{PREFIX}embeddings.position_ids": torch.arange(77)[None]}


LAYOUTS = {"prefixed": dict, "bare": without_prefix, "old": with_position_ids}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_those_of_the_files(pipeline: Path, layout: str) -> None:
    rewrite(pipeline / TEXT, LAYOUTS[layout])
    loaded = load_parts(pipeline)
    for model, file in ((loaded.text_encoder, TEXT), (loaded.vae, VAE)):
        stored = without_prefix(load_file(pipeline / file))
        stored.pop("embeddings.position_ids", None)
        found = without_prefix(model.state_dict())
        assert found.keys() == stored.keys()
        assert len(found) > 30
        assert all(torch.equal(found[name], stored[name]) for name in found)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert loaded.scheduler_config == json.loads((pipeline / "scheduler/scheduler_config.json").read_text())


def test_the_files_decide_the_values_not_the_dtype_in_the_config(pipeline: Path, parts: Parts) -> None:
    config = json.loads((pipeline / "text_encoder/config.json").read_text())
    (pipeline / "text_encoder/config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    loaded = load_parts(pipeline)
    for name, tensor in loaded.text_encoder.state_dict().items():
        assert torch.equal(tensor, parts.text_encoder.state_dict()[name])


def test_dtypes(tiny: Path) -> None:
    loaded = load_parts(tiny, dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert (loaded.text_encoder.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float32)
    assert load_parts(tiny, dtype=torch.float16).vae.dtype == torch.float16


def test_weights_that_exist_as_a_variant_alone(pipeline: Path, parts: Parts) -> None:
    for file in (TEXT, VAE):
        path = pipeline / file
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    loaded = load_parts(pipeline)
    assert torch.equal(encode_prompts(loaded, ["a"]), encode_prompts(parts, ["a"]))


def drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.endswith(name)}


def reshape(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: t[:3].clone() if k.endswith(name) else t for k, t in tensors.items()}


def junk(tensors: Tensors) -> Tensors:
    return {**tensors, "junk.weight": torch.ones(2)}


def both_layouts(tensors: Tensors) -> Tensors:
    return {**tensors, **{name.removeprefix(PREFIX): tensor + 1 for name, tensor in tensors.items()}}


FAULTS = [
    (TEXT, drop("layers.1.mlp.fc1.weight"), "1 missing: .*encoder.layers.1.mlp.fc1.weight"),
    (TEXT, junk, "1 unexpected: junk.weight"),
    (TEXT, reshape("layers.0.mlp.fc1.bias"), r"1 misshaped: .*layers.0.mlp.fc1.bias \[3\] instead of \[64\]"),
    (TEXT, both_layouts, "two names|unexpected"),
    (TEXT, lambda tensors: junk(drop("final_layer_norm.bias")(tensors)), "1 missing: .*final_layer_norm.bias; 1 unex"),
    (VAE, drop("decoder.conv_out.bias"), "1 missing: decoder.conv_out.bias"),
    (VAE, junk, "1 unexpected: junk.weight"),
    (VAE, reshape("decoder.conv_in.bias"), r"1 misshaped: decoder.conv_in.bias \[3\] instead of \[32\]"),
]


@pytest.mark.parametrize(("file", "fault", "message"), FAULTS)
def test_every_fault_is_an_error_that_names_the_tensor(
    pipeline: Path, file: str, fault: Callable[[Tensors], Tensors], message: str
) -> None:
    rewrite(pipeline / file, fault)
    with pytest.raises(VerificationError, match=message) as caught:
        load_parts(pipeline)
    assert caught.value.where == str(pipeline / file)


def test_damaged_weights(pipeline: Path) -> None:
    whole = (pipeline / TEXT).read_bytes()
    (pipeline / TEXT).write_bytes(whole[:-100])
    with pytest.raises(ContainerError):
        load_parts(pipeline)


def test_pickles_are_never_opened(pipeline: Path) -> None:
    (pipeline / VAE).unlink()
    torch.save({}, pipeline / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(TeacherError, match="a pickle, which is never opened"):
        load_parts(pipeline)


def test_a_unet_alone_says_base(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="--base"):
        load_parts(tiny / "unet")
    student = unet_surgery.prune("bk_tiny", tiny / "unet", tmp_path / "student").folder
    with pytest.raises(TeacherError, match="a U-Net alone.*\n.*\n.*\n.*--base"):
        load_parts(student)


def test_a_pruned_pipeline_has_its_teachers_parts(tiny: Path, tmp_path: Path, parts: Parts) -> None:
    student = load_parts(unet_surgery.prune("bk_tiny", tiny, tmp_path / "student").folder)
    assert torch.equal(encode_prompts(student, ["a cat"]), encode_prompts(parts, ["a cat"]))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "two text encoders"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder cannot be used.*\n.*\n.*CLIPTextModel"),
        ({"vae": [None, None]}, "vae cannot be used.*\n.*\n.*\n.*none"),
    ],
    ids=["sdxl", "t5", "no-vae"],
)
def test_other_pipelines_are_refused(pipeline: Path, entry: dict[str, list[str]], message: str) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, **entry}))
    with pytest.raises(TeacherError, match=message):
        load_parts(pipeline)


@pytest.mark.parametrize("gone", ["tokenizer", "text_encoder", "vae", "scheduler", "vae/config.json"])
def test_a_missing_part_is_an_error_of_ours(pipeline: Path, gone: str) -> None:
    path = pipeline / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(SurgeryError, match=gone.partition("/")[0]):
        load_parts(pipeline)


def test_a_tokenizer_with_more_words_than_the_encoder(pipeline: Path) -> None:
    config = json.loads((pipeline / "text_encoder/config.json").read_text())
    (pipeline / "text_encoder/config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    rewrite(pipeline / TEXT, lambda ts: {n: t[:500].clone() if "token_embedding" in n else t for n, t in ts.items()})
    with pytest.raises(VerificationError, match="tokenizer is not the text encoder's"):
        load_parts(pipeline)


def test_prompts_are_encoded_as_the_pipeline_does(tiny: Path, parts: Parts) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True)
    prompts = ["", "a small red circle at the left", "ein grüner Würfel", "word " * 200]
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    embeds = encode_prompts(parts, prompts)
    assert embeds.shape == (4, 77, 32)
    assert torch.equal(embeds, expected)
    assert torch.equal(encode_prompts(parts, tokenize(parts.tokenizer, prompts)), expected)
    assert not embeds.requires_grad


def test_token_ids(parts: Parts) -> None:
    ids = tokenize(parts.tokenizer, ["", "a", "word " * 200])
    begin, end = 512, 513
    assert ids.shape == (3, 77)
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == [begin] + [end] * 76
    assert (ids[1] == end).sum() == 75
    assert ids[2, 0] == begin
    assert (ids[2] == end).sum() == 1
    assert tokenize(parts.tokenizer, []).shape == (0, 77)


@pytest.mark.parametrize("kept", ["vocab.json merges.txt", "tokenizer.json"], ids=["old", "new"])
def test_tokenizers_of_both_layouts(pipeline: Path, parts: Parts, kept: str) -> None:
    for path in (pipeline / "tokenizer").iterdir():
        if path.name not in [*kept.split(), "tokenizer_config.json"]:
            path.unlink()
    prompts = ["a small red circle", "grüner Würfel, 3:4"]
    assert torch.equal(tokenize(load_parts(pipeline).tokenizer, prompts), tokenize(parts.tokenizer, prompts))


def test_loading_leaves_global_state_alone(tiny: Path) -> None:
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    def state() -> list[object]:
        levels = [of_diffusers.get_verbosity(), of_transformers.get_verbosity()]
        return [*levels, of_transformers.is_progress_bar_enabled(), torch.get_rng_state().tolist()]

    before = state()
    load_parts(tiny)
    assert state() == before


def test_loading_says_nothing_and_reaches_nothing(tiny: Path) -> None:
    """In a process of its own, where nothing is imported yet and the libraries are not told that they are offline."""
    code = (
        "import socket, sys\n"
        "def refuse(*args): raise SystemExit('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from unet_surgery.runtime.parts import load_parts\n"
        "load_parts(sys.argv[1])"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    result = subprocess.run([sys.executable, "-c", code, str(tiny)], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
