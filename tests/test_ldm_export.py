"""export: one file of a whole pipeline, and what diffusers, our own reader and other programs make of it."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import CONFIGS, FULL_SIZE
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file
from teachers import WEIGHTS, entries, folder_bytes, random_tensors, write_sharded, write_unet
from test_cli import tool
from test_ldm_names import student
from test_ldm_parts import VAE_CONFIG
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import unet_surgery as us
from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.layout import WeightsChoice
from unet_surgery.checkpoint.ldm.parts import read_part
from unet_surgery.checkpoint.ldm.runtimes import verdicts
from unet_surgery.checkpoint.ldm.single_file import read_single_file
from unet_surgery.checkpoint.reader import open_weights
from unet_surgery.checkpoint.tensorfile import write_tensors
from unet_surgery.errors import OutputError, TeacherError, UsageError
from unet_surgery.graph import build, parse_config
from unet_surgery.lower.original import NUMBERINGS

Tensors = dict[str, torch.Tensor]
PIPELINES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def randomized(model: Any) -> Any:
    """Return the model with other values everywhere: a fresh one has zeros and ones in many places."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter)
    return model


def text_encoder(*, projection: bool = False) -> Any:
    """Return a text encoder; the one with a projection is wider, by which diffusers tells SDXL's two apart."""
    width = 16 if projection else 12
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width, eos_token_id=513, bos_token_id=512, pad_token_id=513,
    )  # fmt: skip
    return randomized((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


@pytest.fixture(scope="session")
def pipelines(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole small pipeline of every family, as diffusers and transformers save it."""
    root = tmp_path_factory.mktemp("pipelines")
    tokenizer = CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    for family, kind in PIPELINES.items():
        parts: dict[str, Any] = {
            "unet": randomized(UNet2DConditionModel.from_config(CONFIGS[family])),
            "vae": randomized(AutoencoderKL(**VAE_CONFIG)),
            "text_encoder": text_encoder(),
            "tokenizer": tokenizer,
            "scheduler": DDIMScheduler(),
        }
        if family == "sdxl":
            parts |= {"text_encoder_2": text_encoder(projection=True), "tokenizer_2": tokenizer}
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        kind(**parts).save_pretrained(root / family)
    return {family: root / family for family in PIPELINES}


def tensors_of(model: Any) -> Tensors:
    return dict(model.state_dict())


def assert_equal(ours: Tensors, theirs: Tensors) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def from_single_file(kind: Any, file: Path, **keywords: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.from_single_file(str(file), local_files_only=True, **keywords)


# --- what diffusers makes of it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(PIPELINES))
def test_diffusers_loads_the_whole_pipeline(family: str, pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = pipelines[family]
    result = us.export(folder, tmp_path / "x.safetensors")
    assert result.numbering == "dense"
    assert result.file.stat().st_size == result.num_bytes
    loaded = from_single_file(PIPELINES[family], result.file, config=str(folder))
    wanted = PIPELINES[family].from_pretrained(folder)
    encoders = ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)
    assert set(result.parts) == {"unet", "vae", *encoders}
    for name in result.parts:
        assert_equal(tensors_of(getattr(loaded, name)), tensors_of(getattr(wanted, name)))


@pytest.mark.parametrize("recipe", ["bk_base", "bk_small", "bk_tiny", "sdxs_512"])
def test_diffusers_loads_a_students_pipeline(recipe: str, tiny: Path, tmp_path: Path) -> None:
    folder = us.prune(recipe, tiny, tmp_path / "student").folder
    file = us.export(folder, tmp_path / "x.safetensors").file
    loaded = from_single_file(StableDiffusionPipeline, file, config=str(folder))
    wanted = StableDiffusionPipeline.from_pretrained(folder)
    for name in ("unet", "vae", "text_encoder"):
        assert_equal(tensors_of(getattr(loaded, name)), tensors_of(getattr(wanted, name)))


LOADED = {
    **{name: (CONFIGS[name], "dense") for name in ("sd1-inpaint", "sd2-depth", "upscale", "two-levels", "deep",
                                                   "five-levels", "three-layers", "one-sided", "resnet-mid",
                                                   "no-mid", "nested", "mixed-layers", "sdxl")},
    **{
        f"{recipe} of {family}, {numbering}": (student(recipe, CONFIGS[family]), numbering)
        for recipe, family in (("bk_tiny", "sd1"), ("bk_base", "sd2"), ("koala_700m", "sdxl"), ("ssd_1b", "sdxl"))
        for numbering in NUMBERINGS
    },
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(LOADED))
def test_diffusers_loads_what_it_is_said_to_load(case: str, tmp_path: Path) -> None:
    config, numbering = LOADED[case]
    folder = write_unet(tmp_path / "unet", config)
    result = us.export(folder, tmp_path / "x.safetensors", numbering=numbering)
    (verdict,) = [v for v in result.verdicts if v.runtime.startswith("diffusers")]
    wanted = load_file(folder / WEIGHTS)
    try:
        loaded = tensors_of(from_single_file(UNet2DConditionModel, result.file, config=str(folder)))
    except Exception:  # of many kinds: shapes, missing keys, a list where it counts
        loaded = {}
    same = loaded.keys() == wanted.keys() and all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    assert verdict.ok == same, verdict.reason
    assert bool(verdict.reason) != verdict.ok


# --- what our own reader makes of it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("numbering", NUMBERINGS)
@pytest.mark.parametrize("family", sorted(PIPELINES))
def test_every_byte_comes_back(family: str, numbering: str, pipelines: dict[str, Path], tmp_path: Path) -> None:
    recipe = {"sd1": "bk_tiny", "sd2": "bk_small", "sdxl": "koala_700m"}[family]
    folder = us.prune(recipe, pipelines[family], tmp_path / "student").folder
    result = us.export(folder, tmp_path / "x.safetensors", numbering=numbering)
    weights = open_weights(tmp_path, WeightsChoice("x.safetensors", sharded=False, variant=None))
    found = read_single_file(weights, where="x")
    assert found.inferred.numbering == numbering
    assert found.parts.keys() == set(result.parts) - {"unet"}
    for name, part in found.parts.items():
        disk.replace_file(tmp_path / f"{name}.st", lambda fd, p=part: write_tensors(fd, read_part(p), lambda _: None))
        saved = load_file(next((folder / name).glob("*.safetensors")))
        if name != "vae":  # transformers 5 saves a CLIPTextModel without it
            saved = {n if n.startswith("text_") else f"text_model.{n}": t for n, t in saved.items()}
        assert_equal(load_file(tmp_path / f"{name}.st"), saved)
    with weights.renamed(found.unet) as view:
        original = load_file(folder / "unet" / WEIGHTS)
        assert sorted(view) == sorted(original)
        for name in view:
            file, info, _ = view.locate(name)
            assert os.pread(file.fd, info.num_bytes, info.offset) == original[name].numpy().tobytes(), name


@pytest.mark.parametrize("numbering", NUMBERINGS)
def test_a_u_net_comes_back_from_any_folder(numbering: str, tmp_path: Path) -> None:
    config = student("bk_base", CONFIGS["sd1"])
    sharded = write_sharded(tmp_path / "sharded", config, 3, variant="fp16")
    plain = write_unet(tmp_path / "plain", config)
    one = us.export(plain, tmp_path / "one.safetensors", numbering=numbering).file
    two = us.export(sharded, tmp_path / "two.safetensors", numbering=numbering, variant="fp16").file
    assert one.read_bytes() == two.read_bytes()  # same tensors, same file
    with safe_open(one, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert all(name.startswith("model.diffusion_model.") for name in opened.keys())  # noqa: SIM118  # no dict
    assert len(load_file(one)) == len(random_tensors(config))


def test_u_net_only_and_dtype(pipelines: dict[str, Path], tmp_path: Path) -> None:
    result = us.export(pipelines["sdxl"], tmp_path / "x.safetensors", unet_only=True, dtype="fp16")
    assert (result.parts, result.left_out) == (("unet",), ())
    halves = load_file(result.file)
    assert {tensor.dtype for tensor in halves.values()} == {torch.float16}
    original = load_file(pipelines["sdxl"] / "unet" / WEIGHTS)
    assert torch.equal(halves["model.diffusion_model.out.2.weight"], original["conv_out.weight"].half())
    whole = load_file(us.export(pipelines["sdxl"], tmp_path / "y.safetensors", dtype="fp16").file)
    projection = load_file(next((pipelines["sdxl"] / "text_encoder_2").glob("*.safetensors")))["text_projection.weight"]
    assert torch.equal(whole["conditioner.embedders.1.model.text_projection"], projection.T.half())


def test_what_has_no_place_is_left_out(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(folder / "vae", folder / "safety_checker")
    result = us.export(folder, tmp_path / "x.safetensors")
    assert result.parts == ("unet", "text_encoder")
    assert result.left_out == ("safety_checker", "vae")


def test_a_refiner_has_its_one_text_encoder_in_the_first_place(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "refiner"
    shutil.copytree(pipelines["sdxl"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    names = load_file(us.export(folder, tmp_path / "x.safetensors").file)
    assert "conditioner.embedders.0.model.text_projection" in names
    assert not any(name.startswith("conditioner.embedders.1.") for name in names)


# --- what other programs make of it -----------------------------------------------------------------------------------

V_ONLY = {"prediction_type": "v_prediction"}
OTHERS = "these are others"
JUDGED: dict[str, tuple[dict[str, Any], str, dict[str, str], str, str]] = {
    # config, numbering, scheduler, ComfyUI, stable-diffusion.cpp
    "sd1": (FULL_SIZE["sd1"], "dense", {}, "yes", "yes"),
    "sd1 gapped is the same": (FULL_SIZE["sd1"], "gapped", {}, "yes", "yes"),
    "sd1 inpaint": ({**FULL_SIZE["sd1"], "in_channels": 9}, "dense", {}, "yes", "yes"),
    "sd2": (FULL_SIZE["sd2"], "dense", {}, "yes", "yes"),
    "sd2 depth": ({**FULL_SIZE["sd2"], "in_channels": 5}, "dense", {}, "yes", "of pruned"),
    "sd2 v": (FULL_SIZE["sd2-768"], "dense", V_ONLY, "yes", "yes"),
    "sd2 inpaint v": ({**FULL_SIZE["sd2"], "in_channels": 9}, "dense", V_ONLY, "yes, for epsilon", "yes"),
    "sdxl": (FULL_SIZE["sdxl"], "dense", {}, "yes", "yes"),
    "bk_base": (student("bk_base", FULL_SIZE["sd1"]), "dense", {}, "yes", "of pruned"),
    "bk_base gapped": (student("bk_base", FULL_SIZE["sd1"]), "gapped", {}, "without gaps", "of pruned"),
    "bk_small v2": (student("bk_small", FULL_SIZE["sd2"]), "dense", {}, "yes", "of pruned"),
    "bk_small v2 v": (student("bk_small", FULL_SIZE["sd2-768"]), "dense", V_ONLY, "yes, for epsilon", "of pruned"),
    "bk_tiny": (student("bk_tiny", FULL_SIZE["sd1"]), "dense", {}, "yes", "--numbering gapped"),
    "bk_tiny gapped": (student("bk_tiny", FULL_SIZE["sd1"]), "gapped", {}, "--numbering dense", "yes"),
    "bk_tiny v2 gapped": (student("bk_tiny", FULL_SIZE["sd2"]), "gapped", {}, "--numbering dense", "yes"),
    "sdxs": (student("sdxs_512", FULL_SIZE["sd1"]), "gapped", {}, "--numbering dense", "yes"),
    "koala": (student("koala_700m", FULL_SIZE["sdxl"]), "dense", {}, "yes", "of pruned"),
    "ssd_1b": (student("ssd_1b", FULL_SIZE["sdxl"]), "dense", {}, "yes", "yes"),
    "another depth of sdxl": (
        {**FULL_SIZE["sdxl"], "transformer_layers_per_block": [1, 2, 9]}, "dense", {}, "not –, –, 2, 2, 9", "of pruned"
    ),
    "resnet mid": ({**FULL_SIZE["sd1"], "mid_block_type": "UNetMidBlock2D"}, "dense", {}, "yes", "of pruned"),
    "other layers a stage": ({**FULL_SIZE["sd1"], "layers_per_block": [1, 2, 3, 1]}, "dense", {}, "yes", "of pruned"),
    "a stage without layers": (
        {**FULL_SIZE["sd1"], "block_out_channels": [320, 640, 640, 1280], "layers_per_block": [1, 1, 0, 1],
         "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"] * 2},
        "dense", {}, "to have a layer", "of pruned",
    ),
    "attention without transformer blocks": (
        {**FULL_SIZE["sd1"], "transformer_layers_per_block": [0, 1, 1, 1]}, "dense", {}, "drops", "of pruned"
    ),
    "other heads": ({**FULL_SIZE["sd1"], "attention_head_dim": 4}, "dense", {}, OTHERS, OTHERS),
    "small": (CONFIGS["sd1"], "dense", {}, OTHERS, OTHERS),
    "other text": ({**FULL_SIZE["sd2"], "cross_attention_dim": 768}, "dense", {}, OTHERS, OTHERS),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(JUDGED))
def test_who_takes_it(case: str) -> None:
    config, numbering, scheduler, *expected = JUDGED[case]
    graph = build(parse_config(config))
    judged = verdicts(graph, numbering, **scheduler)  # type: ignore[arg-type]
    assert [verdict.runtime for verdict in judged][:2] == ["ComfyUI", "stable-diffusion.cpp"]
    for verdict, says in zip(judged, expected, strict=False):
        assert verdict.ok == says.startswith("yes"), verdict
        assert says.removeprefix("yes").removeprefix(", ") in verdict.reason
        assert bool(verdict.reason) == (says != "yes")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path) -> None:
    tool("prune", "-r", "bk_tiny", "-t", "tiny-random", "-o", "s", "-q", cwd=tmp_path)
    out, err = tool("export", "s", cwd=tmp_path)
    assert out == "s.safetensors\n"
    assert "4.1 MB, dense numbering: unet, text_encoder, vae" in err
    assert "takes it    diffusers" in err
    assert "does not    ComfyUI: it knows SD v1" in err
    assert tool("export", "s", cwd=tmp_path, code=4)[0] == ""
    out, err = tool(
        "export", "s", "--force", "-q", "--unet-only", "--numbering", "gapped", "--dtype", "fp16", cwd=tmp_path
    )
    assert (out, err) == ("s.safetensors\n", "")
    _, err = tool("export", "s/unet", "-o", "u.safetensors", cwd=tmp_path)
    assert "It is the U-Net alone" in err
    assert entries(tmp_path) == ["s", "s.safetensors", "u.safetensors"]


def test_v_prediction_is_read_from_the_scheduler(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "v"
    shutil.copytree(pipelines["sd1"], folder)
    shutil.rmtree(folder / "unet")
    write_unet(folder / "unet", CONFIGS["sd1"])
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **V_ONLY}))
    from unet_surgery.checkpoint.ldm.export import _prediction_type
    from unet_surgery.checkpoint.teacher import open_teacher

    assert _prediction_type(open_teacher(folder)) == "v_prediction"
    assert _prediction_type(open_teacher(folder / "unet")) is None


# --- what must be refused ---------------------------------------------------------------------------------------------


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    return write_unet(tmp_path / "unet", CONFIGS["sd1"])


def test_nothing_is_replaced_without_force(unet: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        us.export(unet, target)
    assert target.read_text() == "mine"
    us.export(unet, target, force=True)
    assert target.stat().st_size > 1000
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        us.export(unet, folder, force=True)


def test_the_folder_itself_is_not_written_into(unet: Path, tmp_path: Path) -> None:
    before = folder_bytes(unet)
    (tmp_path / "link").symlink_to(unet)
    for out in (unet / "x.safetensors", tmp_path / "link" / "x.safetensors", unet / WEIGHTS):
        with pytest.raises(OutputError, match="inside the exported folder"):
            us.export(unet, out, force=True)
    assert folder_bytes(unet) == before


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a numbering that there is not": ({"numbering": "sparse"}, UsageError, "dense or gapped"),
    "a layout that there is not": ({"to": "onnx"}, UsageError, "ldm"),
    "a dtype that there is not": ({"dtype": "fp8"}, UsageError, "fp16"),
    "another kind of file": ({"out": "x.ckpt"}, UsageError, ".safetensors"),
    "a folder that is not there": ({"out": "no/where/x.safetensors"}, OutputError, "does not exist"),
    "a variant that is not there": ({"variant": "ema"}, TeacherError, "ema"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_wrong_arguments(case: str, unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keywords, error, says = WRONG[case]
    with pytest.raises(error, match=says):
        us.export(unet, **keywords)
    assert entries(tmp_path) == ["unet"]


def test_a_network_that_the_layout_cannot_say(tmp_path: Path) -> None:
    for name, numbering, says in (("embeddings", "dense", "time_cond_proj_dim"), ("three-layers", "gapped", "no room")):
        folder = write_unet(tmp_path / name, CONFIGS[name])
        with pytest.raises(UsageError, match=says):
            us.export(folder, tmp_path / "x.safetensors", numbering=numbering)
    assert not (tmp_path / "x.safetensors").exists()


def test_damaged_folders(unet: Path, pipelines: dict[str, Path], tmp_path: Path) -> None:
    def refused(folder: Path, says: str) -> None:
        with pytest.raises(TeacherError, match=says):
            us.export(folder, tmp_path / "x.safetensors")
        assert not [name for name in entries(tmp_path) if "x.safetensors" in name]

    refused(tmp_path / "nowhere", "no such folder")
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps({**config, "layers_per_block": 3}))
    refused(unet, "do not fit config.json")
    (unet / "config.json").write_text(json.dumps({**config, "layers_per_block": "2"}))
    refused(unet, "key layers_per_block|'layers_per_block'")
    pipeline = tmp_path / "pipeline"
    shutil.copytree(pipelines["sd1"], pipeline)
    encoder = next((pipeline / "text_encoder").glob("*.safetensors"))
    encoder.rename(encoder.with_name("pytorch_model.bin"))
    refused(pipeline, "no safetensors weights")
    us.export(pipeline, tmp_path / "y.safetensors", unet_only=True)


def test_quantised_weights(tmp_path: Path) -> None:
    tensors = {name: value.astype("int8") for name, value in random_tensors(CONFIGS["sd1"]).items()}
    folder = write_unet(tmp_path / "unet", CONFIGS["sd1"], tensors)
    with pytest.raises(TeacherError, match="not floating point"):
        us.export(folder, tmp_path / "x.safetensors")


def test_an_overflow_leaves_nothing(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["sd1"])
    tensors["conv_out.bias"][0] = 1e30
    folder = write_unet(tmp_path / "unet", CONFIGS["sd1"], tensors)
    with pytest.raises(TeacherError, match="too large for F16") as caught:
        us.export(folder, tmp_path / "x.safetensors", dtype="fp16")
    assert "conv_out.bias" in (caught.value.where or "")
    assert entries(tmp_path) == ["unet"]


def test_a_full_disk(unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1 << 20)
    with pytest.raises(OutputError, match="not enough room"):
        us.export(unet, tmp_path / "x.safetensors")
    assert entries(tmp_path) == ["unet"]


def test_a_folder_that_changes_meanwhile(unet: Path, tmp_path: Path) -> None:
    def touch(_done: int, _total: int) -> None:
        os.utime(unet / WEIGHTS)

    with pytest.raises(TeacherError, match="changed while it was read"):
        us.export(unet, tmp_path / "x.safetensors", progress=touch)
    assert entries(tmp_path) == ["unet"]


def test_progress_ends_at_the_files_size(unet: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = us.export(unet, tmp_path / "x.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (result.num_bytes, result.num_bytes)
