"""Teachers in one file of the original layout, on disk and on the Hub, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from configs import CONFIGS
from hub_faults import ALWAYS, Fault
from hub_server import HubStandIn, client_env
from safetensors.numpy import load_file, save_file
from teachers import WEIGHTS, entries, folder_bytes, random_tensors, write_unet
from test_cli import tool

import unet_surgery
from unet_surgery.graph import build, parse_config
from unet_surgery.lower.original import unet_names

NAME = "org/finetune"
FILE = "v1-5-tuned.safetensors"


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as one file; its VAE and text encoder are not the tiny pipeline's, as a finetune's are not."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(tiny, folder / "pipeline")
    for part in ("vae/" + WEIGHTS, "text_encoder/model.safetensors"):
        tensors = load_file(folder / "pipeline" / part)
        save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / "pipeline" / part, {"format": "pt"})
    unet_surgery.export(folder / "pipeline", folder / FILE)
    return folder / FILE


def write_single(path: Path, config: dict, prefix: str = "model.diffusion_model.", seed: int = 0) -> Path:
    """Write a U-Net alone under its original names."""
    names = unet_names(build(parse_config(config)), "dense")
    tensors = random_tensors(config, seed)
    save_file({prefix + names[name]: tensor for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("sd1", "bk_base"), ("sd1-inpaint", "bk_tiny"), ("sd2", "bk_small"), ("sd1", "sdxs_512"), ("sdxl", "koala_700m")],
)
def test_the_student_is_the_folders(name: str, recipe: str, unet_folders: dict[str, Path], tmp_path: Path) -> None:
    file = write_single(tmp_path / "one.safetensors", CONFIGS[name])
    config = unet_folders[name] / "config.json"
    out, _ = tool("prune", "-r", recipe, "-t", str(file), "--config", str(config), "-o", "one", "-q", cwd=tmp_path)
    assert out == "one\n"
    of_folder = unet_surgery.prune(recipe, unet_folders[name], tmp_path / "folder").folder
    for part in (WEIGHTS, "config.json", "recipe.yaml", "architecture.svg"):
        assert (tmp_path / "one" / part).read_bytes() == (of_folder / part).read_bytes(), part
    tool("check", "one", "-t", str(file), cwd=tmp_path)
    assert "--config config.json" in (tmp_path / "one" / "README.md").read_text()


def test_what_the_weights_do_not_say_is_said(tmp_path: Path) -> None:
    write_single(tmp_path / "one.safetensors", CONFIGS["sd1"])
    for words in (["inspect", "one.safetensors"], ["plan", "-r", "bk_tiny", "-t", "one.safetensors"]):
        _, err = tool(*words, cwd=tmp_path)
        assert "attention_head_dim is 8" in err
        assert "prediction_type" in err
    tool("prune", "-r", "bk_tiny", "-t", "one.safetensors", "-o", "out", cwd=tmp_path)
    assert "attention_head_dim is 8" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention_head_dim"] == 8


def test_a_config_that_is_another_models(unet_folders: dict[str, Path], tmp_path: Path) -> None:
    write_single(tmp_path / "one.safetensors", CONFIGS["sd1"])
    command = ["plan", "-r", "bk_base", "-t", "one.safetensors", "--config"]
    _, err = tool(*command, str(unet_folders["sd2"]), cwd=tmp_path, code=3)
    assert f"do not fit {unet_folders['sd2'] / 'config.json'}" in err
    _, err = tool("plan", "-r", "bk_base", "-t", str(unet_folders["sd1"]), "--config", "x", cwd=tmp_path, code=2)
    assert "config.json of its own" in err


def test_the_averaged_weights_are_a_variant(tmp_path: Path) -> None:
    names = unet_names(build(parse_config(CONFIGS["sd1"])), "dense")
    plain, averaged = random_tensors(CONFIGS["sd1"], 1), random_tensors(CONFIGS["sd1"], 2)
    tensors = {f"model.diffusion_model.{names[name]}": value for name, value in plain.items()}
    tensors |= {
        "model_ema." + f"diffusion_model.{names[name]}".replace(".", ""): value for name, value in averaged.items()
    }
    tensors |= {"model_ema.decay": np.float32([0.9999]), "model_ema.num_updates": np.int32([7])}
    save_file(tensors, tmp_path / "both.safetensors")
    for variant, expected in (([], plain), (["--variant", "ema"], averaged)):
        out = tmp_path / f"out{len(variant)}"
        tool("prune", "-r", "bk_tiny", "-t", "both.safetensors", *variant, "-o", str(out), "-q", cwd=tmp_path)
        student = load_file(out / WEIGHTS)
        for name, source in json.loads((out / "plan.json").read_text())["weights"].items():
            np.testing.assert_array_equal(student[name], expected[source])
    assert "--variant ema" in (tmp_path / "out2" / "README.md").read_text()
    _, err = tool("plan", "-r", "bk_tiny", "-t", "both.safetensors", "--variant", "fp16", cwd=tmp_path, code=2)
    assert "no variants but its averaged weights" in err


# --- the other parts ------------------------------------------------------------------------------------------------


def test_a_base_brings_what_the_file_lacks(exported: Path, tmp_path: Path) -> None:
    _, err = tool("prune", "-r", "bk_tiny", "-t", str(exported), "--base", "tiny-random", "-o", "out", cwd=tmp_path)
    assert "is taken from " in err
    assert "tiny-random" in err
    tool("check", "out", "-t", str(exported), "--base", "tiny-random", cwd=tmp_path)
    tool("verify", "out", cwd=tmp_path)
    found = folder_bytes(tmp_path / "out")
    of_folder = folder_bytes(unet_surgery.prune("bk_tiny", exported.parent / "pipeline", tmp_path / "folder").folder)
    assert found.keys() == of_folder.keys() - {"LICENSE"}
    for name in found.keys() - {"README.md", "plan.json", "architecture.svg"}:
        assert found[name] == of_folder[name], name  # the finetune's own VAE and text encoder among them
    card = found["README.md"].decode()
    assert "--base tiny-random" in card
    assert "the weights of `text_encoder`, `vae` are the teacher's own" in card
    assert "license:" not in card  # the base's is not the file's


def test_the_whole_runs_in_diffusers(exported: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    out = unet_surgery.prune("bk_tiny", exported, tmp_path / "out", base="tiny-random").folder
    pipeline = StableDiffusionPipeline.from_pretrained(out, local_files_only=True, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle", num_inference_steps=2, output_type="np").images[0]
    assert np.isfinite(image).all()


def test_check_finds_a_part_that_is_not_the_files(exported: Path, tmp_path: Path) -> None:
    out = unet_surgery.prune("bk_tiny", exported, tmp_path / "out", base="tiny-random").folder
    path = out / "vae" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    _, err = tool("check", "out", "-t", str(exported), "--base", "tiny-random", cwd=tmp_path, code=6)
    assert "vae" in err


def test_without_a_base_it_is_the_u_net_alone(exported: Path, tmp_path: Path) -> None:
    result = unet_surgery.prune("bk_tiny", exported, tmp_path / "out")
    assert not result.is_pipeline
    assert "vae" not in entries(result.folder)


def test_a_base_for_a_u_net_folder(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "unet", tmp_path / "unet")
    tool("prune", "-r", "bk_tiny", "-t", "unet", "--base", str(tiny), "-o", "out", "-q", cwd=tmp_path)
    whole = folder_bytes(unet_surgery.prune("bk_tiny", tiny, tmp_path / "whole").folder)
    found = folder_bytes(tmp_path / "out")
    for name in found.keys() - {"README.md", "plan.json", "architecture.svg"}:
        assert found[name] == whole[name], name
    tool("check", "out", "-t", "unet", "--base", str(tiny), cwd=tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-t", "tiny-random", "--base", "tiny-random"], "brings its own parts"),
        (["-t", "sd1", "--base", "sd1"], "the base is not a pipeline"),
        (["-t", "sd1", "--base", "tiny-random"], "key cross_attention_dim"),
        (["-t", "sd1", "--base", "nothing"], "there is no model"),
    ],
    ids=["a pipeline", "no pipeline", "another family", "nothing"],
)
def test_a_base_that_cannot_be(words: list[str], says: str, unet_folders: dict[str, Path], tmp_path: Path) -> None:
    words = [str(unet_folders["sd1"]) if word == "sd1" else word for word in words]
    code = 3 if "nothing" in words else 2
    _, err = tool("prune", "-r", "bk_tiny", *words, "-o", "out", cwd=tmp_path, code=code)
    assert says in err
    assert not entries(tmp_path)


def test_a_base_whose_vae_is_another(exported: Path, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "vae" / WEIGHTS)
    tensors["more"] = np.zeros(3, dtype=np.float32)
    save_file(tensors, tmp_path / "base" / "vae" / WEIGHTS)
    _, err = tool("prune", "-r", "bk_tiny", "-t", str(exported), "--base", "base", "-o", "out", cwd=tmp_path, code=3)
    assert "the file's own vae does not fit the base's config" in err
    assert "1 missing: more" in err
    assert entries(tmp_path) == ["base"]


# --- on the Hub -----------------------------------------------------------------------------------------------------


def environment(endpoint: str, tmp_path: Path) -> dict[str, str]:
    own = {"UNET_SURGERY_CACHE": str(tmp_path / "cache"), "UNET_SURGERY_PATIENCE": "3"}
    return {**client_env(endpoint, tmp_path / "hf"), **own}


@pytest.fixture
def hub(exported: Path, tiny: Path, tmp_path: Path) -> HubStandIn:
    folder = tmp_path / "repository"
    (folder / "files").mkdir(parents=True)
    shutil.copy(exported, folder / "files" / FILE)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "files" / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    hub = HubStandIn()
    hub.add(NAME, folder)
    hub.add("org/base", tiny)
    return hub


def test_a_file_on_the_hub_by_range(hub: HubStandIn, exported: Path, tmp_path: Path) -> None:
    address = f"{NAME}/files/{FILE}@main"
    with hub.serve() as endpoint:
        env = environment(endpoint, tmp_path)
        command = ["prune", "-r", "bk_tiny", "-t", address, "--base", "org/base"]
        assert tool(*command, "-q", cwd=tmp_path, env=env)[0] == "v1-5-tuned-bk_tiny\n"
        tool("check", "v1-5-tuned-bk_tiny", "-t", address, "--base", "org/base", cwd=tmp_path, env=env)
        assert tool(*command, "--full", "-o", "full", cwd=tmp_path, env=env)
        sent = sum(r.body_bytes for r in hub.seen("GET", "cdn") if r.range)
        cold = {**env, "UNET_SURGERY_CACHE": str(tmp_path / "cold"), "HF_HOME": str(tmp_path / "cold-hf")}
        tool("check", "v1-5-tuned-bk_tiny", "-t", address, "--base", "org/base", cwd=tmp_path, env=cold)
    assert sent < 0.7 * exported.stat().st_size
    found, full = folder_bytes(tmp_path / "v1-5-tuned-bk_tiny"), folder_bytes(tmp_path / "full")
    local = folder_bytes(unet_surgery.prune("bk_tiny", exported, tmp_path / "local", base="tiny-random").folder)
    for name in found.keys() - {"README.md", "plan.json", "architecture.svg", "LICENSE"}:
        assert found[name] == full[name] == local[name], name
    card = found["README.md"].decode()
    assert "license: creativeml-openrail-m" in card
    assert f"base_model: {NAME}" in card
    commits = [hub.repositories[name].history()[0].oid for name in (NAME, "org/base")]
    assert f"--teacher {NAME}/files/{FILE}@{commits[0]} --base org/base@{commits[1]}" in card


def test_a_file_of_a_server_without_ranges(hub: HubStandIn, exported: Path, tmp_path: Path) -> None:
    hub.faults.append(Fault("no-range", host="cdn", times=ALWAYS))
    with hub.serve() as endpoint:
        env = environment(endpoint, tmp_path)
        _, err = tool("prune", "-r", "bk_tiny", "-t", f"{NAME}/files/{FILE}", "-o", "out", cwd=tmp_path, env=env)
    assert "fetching all of it" in err
    assert "could not be compared" not in (tmp_path / "out" / "README.md").read_text()
    tool("check", "out", "-t", str(exported), cwd=tmp_path)


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (f"{NAME}/files/other.safetensors", f"files/{FILE}"),
        (NAME, f"for a single file: {NAME}/files/{FILE}"),
        (f"{NAME}/files", f"for a single file: {NAME}/files/{FILE}"),
    ],
)
def test_a_repository_of_files(teacher: str, says: str, hub: HubStandIn, tmp_path: Path) -> None:
    with hub.serve() as endpoint:
        env = environment(endpoint, tmp_path)
        _, err = tool("plan", "-r", "bk_tiny", "-t", teacher, cwd=tmp_path, env=env, code=3)
    assert says in err


# --- what is refused ------------------------------------------------------------------------------------------------


def spoiled(case: str, tmp_path: Path) -> None:
    tensors = load_file(write_single(tmp_path / "good.safetensors", CONFIGS["sd1"]))
    one = np.zeros((4, 4), dtype=np.float32)
    if case == "a missing tensor":
        del tensors["model.diffusion_model.input_blocks.4.1.proj_in.bias"]
    elif case == "an unknown tensor":
        tensors["model.diffusion_model.input_blocks.4.1.proj_mid.bias"] = one
    elif case == "two U-Nets":
        tensors |= {name.removeprefix("model.diffusion_model."): tensor for name, tensor in tensors.items()}
    elif case == "a LoRA":
        tensors = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": one}
    elif case == "a VAE":
        tensors = {"encoder.down.0.block.0.conv1.weight": one, "decoder.up.0.block.0.conv1.weight": one}
    elif case == "SD 3":
        tensors = {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": one}
    elif case == "Flux":
        tensors = {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": one}
    save_file(tensors, tmp_path / "bad.safetensors")


REFUSED = {
    "a missing tensor": ["input_blocks.4.1.proj_in.bias", "1 missing"],
    "an unknown tensor": ["input_blocks.4.1.proj_mid.bias", "1 unexpected"],
    "two U-Nets": ["2 U-Nets"],
    "a LoRA": ["LoRA"],
    "a VAE": ["VAE"],
    "SD 3": ["SD 3"],
    "Flux": ["Flux"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_a_teacher(case: str, tmp_path: Path) -> None:
    spoiled(case, tmp_path)
    before = entries(tmp_path)
    _, err = tool("prune", "-r", "bk_tiny", "-t", "bad.safetensors", "-o", "out", cwd=tmp_path, code=3)
    for word in (*REFUSED[case], "bad.safetensors"):
        assert word in err
    assert entries(tmp_path) == before


def test_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04" + bytes(200))
    _, err = tool("prune", "-r", "bk_tiny", "-t", "model.ckpt", "-o", "out", cwd=tmp_path, code=3)
    assert "pickle" in err


def test_a_u_net_file_beside_its_config_is_given_by_its_folder(tmp_path: Path) -> None:
    folder = write_unet(tmp_path / "unet", CONFIGS["sd1"])
    _, err = tool("plan", "-r", "bk_tiny", "-t", str(folder / WEIGHTS), cwd=tmp_path, code=3)
    assert "folder" in err
