"""ControlNets for students: shapes that diffusers builds, weights of known origin, and nothing added at first."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs import CONFIGS, FULL_SIZE
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from teachers import WEIGHTS, entries, folder_bytes, write_unet
from test_cli import tool

import unet_surgery
from unet_surgery import Recipe, SurgeryError
from unet_surgery.checkpoint.check import planned_graphs, read_plan
from unet_surgery.derive import controlnet
from unet_surgery.errors import InexpressibleError, OutputError, TeacherError, UsageError, VerificationError
from unet_surgery.graph import build, parse_config
from unet_surgery.lower import carry_controlnet, skip_outputs, start_controlnet
from unet_surgery.lower.controlnet import CONTROL_DEFAULTS, ControlNetPlan
from unet_surgery.recipe import builtin_names

HELD = sorted(CONFIGS.keys() - {"mixed-layers", "embeddings", "timestep-class", "simple-class"})
FAMILIES = {"sd1": "sd-v1-random", "sd2": "sd-v2-random", "sdxl": "sdxl-random"}


def diffusers_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = ControlNetModel.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def planned_shapes(plan: ControlNetPlan) -> dict[str, tuple[int, ...]]:
    assert len({tensor.name for tensor in plan.tensors}) == len(plan.tensors)
    return {tensor.name: tensor.shape for tensor in plan.tensors}


# --- laws ------------------------------------------------------------------------------------------------------------


def test_the_keys_are_diffusers_keys() -> None:
    parameters = inspect.signature(ControlNetModel.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()} == dict(CONTROL_DEFAULTS)


@pytest.mark.parametrize("name", HELD)
def test_names_and_shapes_are_diffusers(name: str) -> None:
    plan = start_controlnet(CONFIGS[name], build(parse_config(CONFIGS[name])))
    assert planned_shapes(plan) == diffusers_shapes(dict(plan.config))
    stored = json.loads(ControlNetModel.from_config(dict(plan.config)).to_json_string())
    assert {**stored, "_diffusers_version": ""} == {**plan.config, "_diffusers_version": ""}


CASES = [
    (recipe, family)
    for recipe in builtin_names()
    for family in FAMILIES
    if family in (unet_surgery.load_recipe(recipe).families or FAMILIES)
]


@pytest.mark.parametrize(("recipe", "family"), CASES)
def test_every_builtin_recipe(recipe: str, family: str) -> None:
    """Full size, on the meta device: new with and without the teacher, and carried over from the teacher's."""
    plan = unet_surgery.plan(recipe, FAMILIES[family])
    whole, student = planned_graphs(plan, "")
    source = start_controlnet(FULL_SIZE[family], whole).config
    made = [
        start_controlnet(plan.student_config, student),
        start_controlnet(plan.student_config, student, whole),
        carry_controlnet(plan.student_config, student, whole, plan.weights, source),
    ]
    for decided in made:
        assert planned_shapes(decided) == diffusers_shapes(dict(decided.config))
    mids = [decided.mid for decided in made]
    if recipe == "koala_700m":  # whose deepest stage is of depth 5, the teacher's mid of 10
        assert mids == ["fresh", "fresh", "fresh"]
    else:
        expected = ["student", "student", "controlnet"] if student.mid else ["fresh", "teacher", "controlnet"]
        assert mids == expected


UNSAYABLE = {
    "mixed-layers": "different numbers of layers",
    "embeddings": "conv_in_kernel 5",
    "timestep-class": "time_embedding_dim",
    "simple-class": "context widths",
}


@pytest.mark.parametrize("name", sorted(UNSAYABLE))
def test_what_a_controlnet_cannot_hold(name: str) -> None:
    with pytest.raises(InexpressibleError, match=UNSAYABLE[name]):
        start_controlnet(CONFIGS[name], build(parse_config(CONFIGS[name])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_cond_proj_dim": 5}, "time_cond_proj_dim"),
        ({"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 6}, "simple_projection"),
        ({"class_embeddings_concat": True}, "class_embeddings_concat"),
        ({"center_input_sample": True}, "center_input_sample True"),
        ({"timestep_post_act": "silu"}, "timestep_post_act"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_more_that_it_cannot_hold(change: dict[str, Any], message: str) -> None:
    config = {**CONFIGS["sd1"], **change}
    with pytest.raises(InexpressibleError, match=message):
        start_controlnet(config, build(parse_config(config)))


def test_a_mid_of_its_own_depth_and_heads() -> None:
    """Where the deepest stage has no attention, the config's last entries are free for the teacher's mid."""
    config = {**CONFIGS["deep"], "transformer_layers_per_block": [1, 1, 1, 2], "attention_head_dim": [1, 2, 4, 8]}
    whole = build(parse_config(config))
    student_config = {**CONFIGS["deep"], "transformer_layers_per_block": 1, "attention_head_dim": 2}
    student_config |= {"mid_block_type": None}
    plan = start_controlnet(student_config, build(parse_config(student_config)), whole)
    assert plan.mid == "teacher"
    assert plan.config["transformer_layers_per_block"] == [1, 1, 1, 2]
    assert plan.config["attention_head_dim"] == [2, 2, 2, 8]
    assert planned_shapes(plan) == diffusers_shapes(dict(plan.config))


# --- new ones --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def students(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    bypass = Recipe(name="bypass", remove=("down.0.attentions.0", "mid.attentions.0", "mid.resnets.1"))
    recipes = {"bk_base": "bk_base", "bk_tiny": "bk_tiny", "sdxs_512": "sdxs_512", "bypass": bypass}
    return {name: unet_surgery.prune(recipe, tiny, root / name).folder for name, recipe in recipes.items()}


def load_strictly(folder: Path) -> ControlNetModel:
    model, info = ControlNetModel.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def forward(unet: UNet2DConditionModel, control: ControlNetModel | None) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    side = 2 ** len(unet.config.block_out_channels)
    sample = torch.randn(1, unet.config.in_channels, side, side, generator=noise)
    context = torch.randn(1, 5, unet.config.cross_attention_dim, generator=noise)
    picture = torch.randn(1, 3, side * 8, side * 8, generator=noise)
    inputs: dict[str, Any] = {"timestep": torch.tensor(500), "encoder_hidden_states": context}
    if unet.config.addition_embed_type:
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.ones(1, pooled), "time_ids": torch.ones(1, 6)}
    if control is None:
        return unet(sample, **inputs).sample
    down, mid = control(sample, **inputs, controlnet_cond=picture, return_dict=False)
    return unet(sample, **inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample


@pytest.mark.parametrize("with_teacher", [False, True], ids=["alone", "with the teacher"])
@pytest.mark.parametrize("name", ["bk_base", "bk_tiny", "sdxs_512", "bypass"])
def test_a_new_one_adds_exactly_nothing(
    name: str, with_teacher: bool, students: dict[str, Path], tiny: Path, tmp_path: Path
) -> None:
    result = controlnet(students[name], tmp_path / "control", teacher=tiny if with_teacher else None)
    model = load_strictly(result.folder)
    unet = UNet2DConditionModel.from_pretrained(students[name] / "unet").eval()
    plain = forward(unet, None)
    assert torch.equal(forward(unet, model), plain)
    for convolution in [*model.controlnet_down_blocks, model.controlnet_mid_block]:
        torch.nn.init.ones_(convolution.weight)
    assert not torch.equal(forward(unet, model), plain)  # so the residuals do reach the U-Net

    ours, state = model.state_dict(), unet.state_dict()
    trunk = [n for n in ours if n.startswith(("conv_in.", "time_embedding.", "down_blocks."))]
    assert all(torch.equal(ours[n], state[n]) for n in trunk)
    assert len(trunk) == sum(n.startswith(("conv_in.", "time_embedding.", "down_blocks.")) for n in state)
    has_mid = {"bk_base": "student", "bypass": "student"}
    assert result.plan.mid == has_mid.get(name, "teacher" if with_teacher else "fresh")
    whole = load_file(tiny / "unet" / WEIGHTS)
    mid = {n: t for n, t in ours.items() if n.startswith("mid_block.")}
    if result.plan.mid != "fresh":
        source = state if result.plan.mid == "student" else whole
        assert all(torch.equal(tensor, source[n]) for n, tensor in mid.items())


@pytest.mark.parametrize("recipe", ["koala_700m", "ssd_1b"])
def test_sdxl(recipe: str, tmp_path: Path) -> None:
    teacher = write_unet(tmp_path / "teacher", CONFIGS["sdxl"])
    student = unet_surgery.prune(recipe, teacher, tmp_path / "student").folder
    model = load_strictly(controlnet(student, tmp_path / "control", teacher=teacher).folder)
    unet = UNet2DConditionModel.from_pretrained(student).eval()
    assert torch.equal(forward(unet, model), forward(unet, None))
    assert torch.equal(model.add_embedding.linear_1.weight, unet.add_embedding.linear_1.weight)


def test_in_diffusers_pipeline(students: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    control = load_strictly(controlnet(students["bk_tiny"], tmp_path / "control", teacher=tiny).folder)
    # a ControlNet's embedding makes its picture eight times smaller, so the VAE must as well
    stages = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(**stages, block_out_channels=[4] * 4, norm_num_groups=2)
    plain = StableDiffusionPipeline.from_pretrained(students["bk_tiny"], vae=vae)
    steered = StableDiffusionControlNetPipeline(**plain.components, controlnet=control)
    words: dict[str, Any] = {
        "prompt": "a",
        "num_inference_steps": 2,
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }
    picture = Image.new("RGB", (64, 64), "red")
    for pipeline in (plain, steered):
        pipeline.set_progress_bar_config(disable=True)
    first = plain(**words, generator=torch.Generator().manual_seed(0)).images
    second = steered(**words, image=picture, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(first, second)


def test_what_is_new_is_drawn_as_torch_draws_it(students: dict[str, Path], tmp_path: Path) -> None:
    first = controlnet(students["bk_tiny"], tmp_path / "a", seed=1)
    controlnet(students["bk_tiny"], tmp_path / "b", seed=1)
    controlnet(students["bk_tiny"], tmp_path / "c", seed=2)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    ours, other = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "c" / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ControlNetModel.from_config(dict(first.plan.config)).state_dict()
    fresh = [t.name for t in first.plan.tensors if t.origin == "fresh"]
    assert {n.split(".")[0] for n in fresh} == {"mid_block", "controlnet_cond_embedding"}
    for name in fresh:
        low, high = theirs[name].min(), theirs[name].max()
        if ".norm" in name:
            assert torch.equal(ours[name], theirs[name])
            continue
        assert not torch.equal(ours[name], other[name])
        bound = 1 / np.sqrt(theirs[name.rpartition(".")[0] + ".weight"][0].numel())
        assert ours[name].abs().max() <= bound
        assert max(-low, high) <= bound  # which is torch's
        if ours[name].numel() > 200:
            assert ours[name].abs().max() > 0.95 * bound
            assert abs(ours[name].std() / theirs[name].std() - 1) < 0.1
    zeros = [t.name for t in first.plan.tensors if t.origin == "zeros"]
    assert all(not theirs[name].any() and not ours[name].any() for name in zeros if "bias" not in name)


def test_a_half_precision_student(tiny: Path, tmp_path: Path) -> None:
    student = unet_surgery.prune("bk_tiny", tiny, tmp_path / "student", dtype="fp16", unet_only=True).folder
    controlnet(student, tmp_path / "control", teacher=tiny)
    ours = load_file(tmp_path / "control" / WEIGHTS)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float16}
    whole = load_file(tiny / "unet" / WEIGHTS)
    name = "mid_block.resnets.0.conv1.weight"
    assert torch.equal(ours[name], whole[name].half())


def test_a_trained_student_gives_its_trained_weights(students: dict[str, Path], tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(students["bk_base"], student)
    trained = {name: tensor + 1 for name, tensor in load_file(student / "unet" / WEIGHTS).items()}
    save_file(trained, student / "unet" / WEIGHTS)
    controlnet(student, tmp_path / "control")
    assert torch.equal(load_file(tmp_path / "control" / WEIGHTS)["conv_in.weight"], trained["conv_in.weight"])


# --- carried over ----------------------------------------------------------------------------------------------------


def write_trained(folder: Path, unet: UNet2DConditionModel, **save: Any) -> ControlNetModel:
    """Write a ControlNet for ``unet`` with all its tensors different and none of them the U-Net's."""
    torch.manual_seed(0)
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8), conditioning_channels=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, **save)
    return model


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "control"
    write_trained(folder, UNet2DConditionModel.from_pretrained(tiny / "unet"))
    return folder


@pytest.mark.parametrize("name", ["bk_base", "bk_tiny", "sdxs_512", "bypass"])
def test_every_tensor_comes_from_its_place(name: str, students: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    result = controlnet(students[name], tmp_path / "control", controlnet=trained)
    ours = load_strictly(result.folder).state_dict()
    theirs = load_file(trained / WEIGHTS)
    plan = read_plan(students[name])
    whole, student = planned_graphs(plan, "")
    for tensor, values in ours.items():
        if tensor.startswith(("controlnet_down_blocks.", "mid_block.")):
            continue
        source = plan.weights.get(tensor, tensor)
        assert torch.equal(values, theirs[source]) if source else not values.any(), tensor
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items() if n.startswith(("mid_block.", "controlnet_mid")))
    places = [place for _, place in skip_outputs(whole)]
    for k, (_, place) in enumerate(skip_outputs(student)):
        for leaf in ("weight", "bias"):
            there = theirs[f"controlnet_down_blocks.{places.index(place)}.{leaf}"]
            assert torch.equal(ours[f"controlnet_down_blocks.{k}.{leaf}"], there)
    assert (result.plan.config["conditioning_channels"], result.plan.mid) == (1, "controlnet")


def test_a_mid_that_does_not_fit_says_nothing_at_first(tmp_path: Path) -> None:
    teacher = write_unet(tmp_path / "teacher", CONFIGS["sdxl"])
    write_trained(tmp_path / "trained", UNet2DConditionModel.from_pretrained(teacher), max_shard_size="500KB")
    assert "diffusion_pytorch_model.safetensors.index.json" in entries(tmp_path / "trained")
    student = unet_surgery.prune("koala_700m", teacher, tmp_path / "student").folder
    result = controlnet(student, tmp_path / "control", controlnet=tmp_path / "trained")
    assert (result.plan.mid, result.plan.config["mid_block_type"]) == ("fresh", "UNetMidBlock2D")
    model = load_strictly(result.folder)
    assert not model.controlnet_mid_block.weight.any()
    assert all(block.weight.any() for block in model.controlnet_down_blocks)


def test_a_shortened_mid_follows_the_students(tmp_path: Path) -> None:
    """The whole mid has no config beside a deepest stage of fewer blocks, but what the student kept of it has."""
    teacher = write_unet(tmp_path / "teacher", CONFIGS["sdxl"])
    write_trained(tmp_path / "trained", UNet2DConditionModel.from_pretrained(teacher), variant="fp16")
    blocks = "attentions.*.transformer_blocks.0|2-9"
    recipe = Recipe(
        name="short", remove=(f"down.2.{blocks}", f"up.0.{blocks}", "mid.attentions.0.transformer_blocks.0|2-9")
    )
    student = unet_surgery.prune(recipe, teacher, tmp_path / "student").folder
    result = controlnet(student, tmp_path / "control", controlnet=tmp_path / "trained", variant="fp16")
    ours = load_strictly(result.folder).state_dict()
    theirs = load_file(tmp_path / "trained" / "diffusion_pytorch_model.fp16.safetensors")
    block = "mid_block.attentions.0.transformer_blocks.{}.attn1.to_q.weight"
    assert torch.equal(ours[block.format(0)], theirs[block.format(1)])
    assert block.format(1) not in ours


def test_in_the_pictures_own_channels(tmp_path: Path) -> None:
    """An inpainting U-Net takes a plain ControlNet: only its first convolution differs, and stays the ControlNet's."""
    teacher = write_unet(tmp_path / "teacher", CONFIGS["sd1-inpaint"])
    plain = write_unet(tmp_path / "plain", CONFIGS["sd1"])
    write_trained(tmp_path / "trained", UNet2DConditionModel.from_pretrained(plain))
    student = unet_surgery.prune("bk_tiny", teacher, tmp_path / "student").folder
    result = controlnet(student, tmp_path / "control", controlnet=tmp_path / "trained")
    assert load_strictly(result.folder).conv_in.weight.shape[1] == 4


# --- refused ---------------------------------------------------------------------------------------------------------


def sdxl_control(folder: Path) -> None:
    config = {**CONFIGS["sdxl"], "block_out_channels": [16, 32, 64], "norm_num_groups": 8}
    write_trained(folder, UNet2DConditionModel.from_config(config))


def other_heads(folder: Path) -> None:
    config = json.loads((folder.parent / "tiny" / "config.json").read_text())
    write_trained(folder, UNet2DConditionModel.from_config({**config, "attention_head_dim": 4}))


def t2i_adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "T2IAdapter"}')
    save_file({"adapter.conv_in.weight": torch.ones(1)}, folder / WEIGHTS)


def lora(folder: Path) -> None:
    folder.mkdir()
    save_file({"unet.a.lora_A.weight": torch.ones(1)}, folder / "pytorch_lora_weights.safetensors")


def bare_weights(folder: Path) -> None:
    folder.mkdir()
    save_file({"control_model.a": torch.ones(1)}, folder / "x.safetensors")


def a_file(path: Path) -> None:
    save_file({"adapter.conv_in.weight": torch.ones(1)}, path)


def damaged(folder: Path) -> None:
    config = json.loads((folder.parent / "tiny" / "config.json").read_text())
    write_trained(folder, UNet2DConditionModel.from_config(config))
    tensors = load_file(folder / WEIGHTS)
    del tensors["controlnet_mid_block.bias"]
    save_file(tensors, folder / WEIGHTS)


def bad_channels(folder: Path) -> None:
    config = json.loads((folder.parent / "tiny" / "config.json").read_text())
    write_trained(folder, UNet2DConditionModel.from_config(config))
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "conditioning_embedding_out_channels": [4, "8"]}))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "SDXL's": (sdxl_control, "not one for the teacher.*missing: down_blocks.*unexpected: add_embedding"),
    "other heads": (other_heads, "not one for the teacher.*number of attention heads"),
    "a T2I adapter": (t2i_adapter, "not a ControlNet.*T2IAdapter"),
    "a LoRA": (lora, "no ControlNet in this folder.*a LoRA"),
    "weights alone": (bare_weights, "no ControlNet in this folder.*a ControlNet"),
    "a file": (a_file, "not a folder.*a T2I adapter"),
    "nothing": (lambda path: None, "no such ControlNet"),
    "an empty folder": (lambda path: path.mkdir(), "an empty folder"),
    "a missing tensor": (damaged, "1 missing: controlnet_mid_block.bias"),
    "bad channels": (bad_channels, "conditioning_embedding_out_channels"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_is_refused(case: str, students: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    shutil.copytree(tiny / "unet", tmp_path / "tiny")
    make(tmp_path / "given")
    before = entries(tmp_path)
    with pytest.raises(TeacherError, match=f"(?s){message}"):
        controlnet(students["bk_tiny"], tmp_path / "control", controlnet=tmp_path / "given")
    assert entries(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"teacher": "x", "controlnet": "y"}, UsageError, "not both"),
        ({"seed": -1}, UsageError, "not a seed"),
        ({"student": "nowhere"}, UsageError, "no such student"),
        ({"student": "."}, VerificationError, "no readable plan.json"),
        ({"teacher": "sd1"}, TeacherError, "do not fit"),
        ({"out": "student/x"}, OutputError, "the student's folder, inside it"),
        ({"out": "there"}, OutputError, "the output folder exists"),
        ({"out": "there", "force": True}, OutputError, "--force replaces ControlNets"),
    ],
    ids=["both", "seed", "no student", "no plan", "another teacher", "inside the student", "exists", "not ours"],
)
def test_wrong_arguments(
    words: dict[str, Any], error: type[SurgeryError], message: str, students: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(students["bk_tiny"], "student")
    write_unet(tmp_path / "sd1", CONFIGS["sd1"])
    Path("there").mkdir()
    Path("there/mine.txt").write_text("x")
    before = entries(tmp_path)
    with pytest.raises(error, match=message):
        controlnet(**{"student": "student", "out": "out", **words})
    assert entries(tmp_path) == before


def test_command_line(students: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    student = str(students["bk_tiny"])
    out, err = tool("controlnet", student, "--teacher", str(tiny), cwd=tmp_path)
    assert out == "bk_tiny-controlnet\n"
    assert "its mid is the teacher's" in err
    assert "it adds nothing yet: train it, say with diffusers' examples/controlnet/train_controlnet.py" in err
    card = (tmp_path / "bk_tiny-controlnet" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "| mid | 46 | the teacher's weights |" in card
    assert "LICENSE" in entries(tmp_path / "bk_tiny-controlnet")
    tool("controlnet", student, cwd=tmp_path, code=4)
    _, err = tool("controlnet", student, "--force", cwd=tmp_path)
    assert "its mid is new (UNetMidBlock2D, random) (the student has none, and no teacher was given)" in err
    weights = tmp_path / "bk_tiny-controlnet" / WEIGHTS
    save_file(load_file(weights), weights)
    _, err = tool("controlnet", student, "--force", cwd=tmp_path, code=0)  # within the slack of file systems' clocks
    assert entries(tmp_path) == ["bk_tiny-controlnet"]


def test_a_trained_one_stays(students: dict[str, Path], tmp_path: Path) -> None:
    import os

    folder = controlnet(students["bk_tiny"], tmp_path / "control").folder
    os.utime(folder / "README.md", (1, 1))
    with pytest.raises(OutputError, match="changed since they were written"):
        controlnet(students["bk_tiny"], folder, force=True)
