"""Whole containers with the wrong tensors in them: other models, names and dtypes; and dtypes that are fine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from configs import CONFIGS
from safetensors.numpy import load_file, save_file
from teachers import random_tensors

from hostile.container import Entries, read_container, write_container
from hostile.judge import ACCEPTED, PRUNE, Case
from hostile.templates import WEIGHTS, Build, copy, unet

Tensors = dict[str, np.ndarray]
NAME = "up_blocks.1.resnets.2.conv1.weight"


def tensors(change: Callable[[Tensors], Tensors | None]) -> Build:
    """Change the tensors, in place or by returning others, and write them with safetensors' own writer."""

    def build(teacher: Path) -> None:
        found = load_file(teacher / WEIGHTS)
        changed = change(found)
        save_file(found if changed is None else changed, teacher / WEIGHTS, metadata={"format": "pt"})

    return unet(build)


def named(*names: str) -> Build:
    """Weights that hold tensors of these names, and nothing else."""
    return tensors(lambda _: {name: np.zeros((4, 4), np.float32) for name in names})


def prefixed(prefix: str) -> Build:
    return tensors(lambda found: {prefix + name: value for name, value in found.items()})


def also(*names: str) -> Build:
    """The teacher's weights, and tensors of these names."""
    return tensors(lambda found: found.update({name: np.zeros(4, np.float32) for name in names}))


def relabelled(dtype: str, names: Callable[[Entries], Iterable[str]], factor: int) -> Build:
    """Call tensors ``dtype``, whose values have 4 / ``factor`` bytes; the last dimension shrinks to the same shape."""

    def build(teacher: Path) -> None:
        header, data = read_container(teacher / WEIGHTS)
        chosen = set(names(header))
        pieces, position = [], 0
        for name in sorted(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"][0]):
            begin, end = header[name]["data_offsets"]
            piece = data[begin:end]
            if name in chosen:
                piece = piece[: len(piece) // factor]
                header[name]["dtype"] = dtype
            header[name]["data_offsets"] = [position, position + len(piece)]
            position += len(piece)
            pieces.append(piece)
        write_container(teacher / WEIGHTS, header, b"".join(pieces))

    return unet(build)


def every(header: Entries) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def one(header: Entries) -> list[str]:
    return [NAME]


def as_dtype(dtype: str) -> Build:
    return tensors(lambda found: {name: value.astype(dtype) for name, value in found.items()})


def mixed(found: Tensors) -> Tensors:
    return {name: value.astype("<f2") if i % 2 else value for i, (name, value) in enumerate(sorted(found.items()))}


def of_another_model(name: str) -> Build:
    return tensors(lambda _: random_tensors(CONFIGS[name]))


def refused(name: str, build: Build, *says: str) -> Case:
    return Case("weights", name, build, says)


def accepted(name: str, build: Build, argv: tuple[str, ...] = PRUNE) -> Case:
    return Case("weights", name, build, code=ACCEPTED, argv=argv)


def file_as_teacher(*names: str) -> Build:
    """The teacher is a file, of tensors of these names."""

    def build(work: Path) -> None:
        save_file({name: np.zeros((4, 4), np.float32) for name in names}, work / "teacher")

    return build


FOREIGN = {
    "LoRA (diffusers)": ("unet.down_blocks.1.attentions.0.proj_in.lora_A.weight", "a LoRA"),
    "LoRA (PEFT)": ("base_model.model.down_blocks.0.proj.lora_B.weight", "a LoRA"),
    "LoRA (kohya)": ("lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight", "a LoRA"),
    "LyCORIS": ("lycoris_down_blocks_1.hada_w1_a", "a LoRA"),
    "VAE": ("encoder.down_blocks.0.resnets.0.conv1.weight", "a VAE"),
    "VAE (LDM)": ("decoder.up.0.block.0.conv1.weight", "a VAE"),
    "ControlNet": ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
    "ControlNet (LDM)": ("control_model.input_hint_block.0.weight", "a ControlNet"),
    "SD 3": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "an SD 3 checkpoint"),
    "SD 3 (diffusers)": ("context_embedder.weight", "an SD 3 checkpoint"),
    "Flux": ("double_blocks.0.img_attn.qkv.weight", "a Flux checkpoint"),
    "Flux (diffusers)": ("single_transformer_blocks.0.attn.to_q.weight", "a Flux checkpoint"),
    "single file (LDM)": (
        "model.diffusion_model.input_blocks.0.0.weight",
        "a single-file checkpoint in the original LDM layout",
    ),
    "U-Net (LDM)": ("input_blocks.0.0.weight", "a U-Net in the original LDM layout"),
    "text encoder": ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder"),
    "IP-Adapter": ("image_proj.proj.weight", "an IP-Adapter"),
    "T2I adapter": ("adapter.body.0.in_conv.weight", "a T2I adapter"),
    "textual inversion": ("emb_params", "a textual inversion"),
}

LDM = "model.diffusion_model."
BLOCKS = tuple(f"{LDM}{name}" for name in ("input_blocks.0.0.weight", "out.2.weight", "time_embed.0.weight"))

WEIGHTS_CASES = (
    # --- against the config ---
    refused("no tensors at all", tensors(lambda _: {}), "686 missing", "and 682 more"),
    refused("one missing", tensors(lambda t: {k: v for k, v in t.items() if k != NAME}), f"1 missing: {NAME}"),
    refused("one too many", also("up_blocks.9.conv.weight"), "1 unexpected: up_blocks.9.conv.weight"),
    refused("a hundred too many", also(*(f"x.{i}" for i in range(100))), "100 unexpected", "and 96 more"),
    refused(
        "one transposed", tensors(lambda t: t.update({NAME: t[NAME].swapaxes(0, 1).copy()})), NAME, "[48, 32, 3, 3]"
    ),
    refused("one flattened", tensors(lambda t: t.update({NAME: t[NAME].ravel()})), NAME, "expected [32, 48, 3, 3]"),
    refused(
        "one of 10,000 dimensions",
        tensors(lambda t: t.update({"conv_in.bias": t["conv_in.bias"].ravel()[:1]})),
        "conv_in.bias is [1], expected [8]",
    ),
    refused("names in another case", tensors(lambda t: {k.upper(): v for k, v in t.items()}), "686 missing"),
    refused("an inpainting U-Net's", of_another_model("sd1-inpaint"), "conv_in.weight is [8, 9, 3, 3]"),
    refused("SD 2's, of linear projections", of_another_model("sd2"), "proj_in.weight is"),
    refused("SDXL's", of_another_model("sdxl"), "add_embedding"),
    refused("already pruned", tensors(lambda t: {k: v for k, v in t.items() if ".1." not in k}), "missing"),
    # --- saved with a prefix ---
    refused("DDP's prefix", prefixed("module."), "DistributedDataParallel's module."),
    refused("torch.compile's prefix", prefixed("_orig_mod."), "torch.compile's _orig_mod."),
    refused("a pipeline's prefix", prefixed("unet."), "a pipeline's unet."),
    refused("FSDP's prefix", prefixed("_fsdp_wrapped_module."), "FSDP's"),
    # --- other models ---
    *(refused(what, named(name), f"This looks like {says}") for what, (name, says) in FOREIGN.items()),
    *(
        refused(f"{what} as the teacher itself", file_as_teacher(name), "there is no U-Net", f"found:    {says}")
        for what, (name, says) in FOREIGN.items()
        if what in ("LoRA (kohya)", "VAE", "ControlNet", "SD 3")
    ),
    # --- single files in the original layout ---
    refused("an original U-Net of one tensor", file_as_teacher(LDM + "input_blocks.0.0.weight"), "tensors are missing"),
    refused("an original block of an absurd number", file_as_teacher(*BLOCKS, LDM + f"input_blocks.{10**9}.0.op.bias")),
    refused("an original U-Net in other digits", file_as_teacher(*BLOCKS, LDM + "input_blocks.\u0661.0.op.bias")),
    refused("20,000 original blocks", file_as_teacher(*(f"{LDM}input_blocks.{i}.0.op.bias" for i in range(20_000)))),
    refused(
        "averaged names that mean nothing", file_as_teacher("model_ema.diffusion_modelinput_blocks00weight" + "0" * 300)
    ),
    refused("two original U-Nets", file_as_teacher(*BLOCKS, "input_blocks.0.0.weight"), "2 U-Nets"),
    refused("a LoRA merged in by names", also("unet.lora_A.weight"), "1 unexpected", "a LoRA"),
    # --- codes without their scales ---
    refused("all in int8", relabelled("I8", every, 4), "not floating point", "686 tensors of I8"),
    refused("one in uint8", relabelled("U8", one, 4), "not floating point", f"1 tensors of U8: {NAME}"),
    refused("one in int32", relabelled("I32", one, 1), "not floating point", NAME),
    refused("one in bool", relabelled("BOOL", one, 4), "not floating point", NAME),
    refused("one in 4 bits", relabelled("F4", one, 8), "not floating point", NAME),
    refused("complex", relabelled("U32", one, 1), "not floating point", NAME),
    # --- what is legal ---
    accepted("fp16", as_dtype("<f2")),
    accepted("fp64", as_dtype("<f8")),
    accepted("fp16 and fp32 mixed", tensors(mixed)),
    accepted("bf16", relabelled("BF16", every, 2)),
    accepted("fp8, copied byte for byte", relabelled("F8_E4M3", every, 4)),
    accepted("one fp8 among fp32", relabelled("F8_E5M2", one, 4)),
    accepted("NaN and Inf, as they are", tensors(lambda t: t.update({NAME: np.full_like(t[NAME], np.nan)}))),
    Case(
        "weights",
        "fp8 cannot be converted",
        relabelled("F8_E4M3", every, 4),
        ("F8_E4M3 cannot be converted to F16",),
        argv=(*PRUNE, "--dtype", "fp16"),
    ),
    Case(
        "weights",
        "a value too large for fp16",
        tensors(lambda t: t.update({NAME: t[NAME] + 70_000})),
        ("too large for F16", "70000"),
        argv=(*PRUNE, "--dtype", "fp16"),
    ),
    Case(
        "weights",
        "variant that is not there",
        lambda work: copy("unet", work / "teacher"),
        ("no weights of variant 'fp16'", "leave --variant out"),
        argv=(*PRUNE, "--variant", "fp16"),
    ),
)
