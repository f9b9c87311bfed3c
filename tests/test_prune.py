"""``prune``: what is written, byte by byte, and that it is written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from configs import CONFIGS
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from teachers import WEIGHTS, entries, folder_bytes, random_tensors, write_sharded, write_unet

import unet_surgery
from unet_surgery.checkpoint import disk
from unet_surgery.errors import OutputError, TeacherError, UsageError, WeightsMismatchError

WEIGHTS_INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def teacher(unet_folders: dict[str, Path]) -> Path:
    return unet_folders["sd1"]


# --- what is in the folder ------------------------------------------------------------------------------------------


def test_every_tensor_is_the_teachers(teacher: Path, tmp_path: Path) -> None:
    result = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out")
    originals, student = load_file(teacher / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert student.keys() == result.plan.weights.keys()
    for name, source in result.plan.weights.items():
        assert source is not None
        np.testing.assert_array_equal(student[name].view(np.uint32), originals[source].view(np.uint32))


def test_the_folder_holds_exactly_this(teacher: Path, tmp_path: Path) -> None:
    unet_surgery.prune("bk_tiny", teacher, tmp_path / "out")
    names = ["README.md", "architecture.svg", "config.json", WEIGHTS, "plan.json", "recipe.yaml"]
    assert entries(tmp_path / "out") == names
    assert entries(tmp_path) == ["out"]


def test_the_file_is_what_save_pretrained_writes(teacher: Path, tmp_path: Path) -> None:
    out = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out").folder
    unet_surgery.load_unet(out).save_pretrained(tmp_path / "diffusers")
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "diffusers" / WEIGHTS).read_bytes()
    theirs = json.loads((tmp_path / "diffusers" / "config.json").read_text())
    ours = json.loads((out / "config.json").read_text())
    assert {key: theirs[key] for key in ours if not key.startswith("_")} == {
        key: value for key, value in ours.items() if not key.startswith("_")
    }


def test_a_pipeline_is_copied_and_runs(tiny: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    out = unet_surgery.prune("bk_tiny", tiny, tmp_path / "out").folder
    before, after = folder_bytes(tiny), folder_bytes(out)
    others = {name: data for name, data in before.items() if not name.startswith("unet/") and name != "README.md"}
    assert {name: after[name] for name in others} == others
    assert set(after) - set(others) == {
        "LICENSE", "README.md", "architecture.svg", "plan.json", "recipe.yaml", "unet/config.json", f"unet/{WEIGHTS}",
    }  # fmt: skip
    pipeline = StableDiffusionPipeline.from_pretrained(out, local_files_only=True, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (32, 32, 3)
    assert np.isfinite(image).all()


def test_the_tiny_pipelines_own_parts_load_completely(tiny: Path) -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    _, info = AutoencoderKL.from_pretrained(tiny / "vae", output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info.values())
    _, info = CLIPTextModel.from_pretrained(tiny / "text_encoder", output_loading_info=True)
    assert not any(info.values())
    ids = CLIPTokenizer.from_pretrained(tiny / "tokenizer")("ab").input_ids
    assert ids[0] == 512
    assert ids[-1] == 513


def test_unet_only(tiny: Path, tmp_path: Path) -> None:
    result = unet_surgery.prune("bk_tiny", tiny, tmp_path / "out", unet_only=True)
    assert not result.is_pipeline
    names = ["LICENSE", "README.md", "architecture.svg", "config.json", WEIGHTS, "plan.json", "recipe.yaml"]
    assert entries(result.folder) == names
    unet_surgery.verify(result.folder, tiny)


def test_default_output_name(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert unet_surgery.prune("bk_tiny", teacher).folder == Path("sd1-bk_tiny")
    assert unet_surgery.prune("bk_tiny", "tiny-random").folder == Path("tiny-random-bk_tiny")
    assert entries(tmp_path) == ["sd1-bk_tiny", "tiny-random-bk_tiny"]


# --- law 5 and 7: the same bytes, nothing of this machine, rebuilt from its own folder ------------------------------


def test_same_inputs_same_bytes_wherever(teacher: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "sd1"
    shutil.copytree(teacher, moved)
    a = folder_bytes(unet_surgery.prune("bk_tiny", teacher, tmp_path / "a").folder)
    b = folder_bytes(unet_surgery.prune("bk_tiny", moved, tmp_path / "b").folder)
    assert a == b


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    config = {**CONFIGS["sd1"], "_name_or_path": "/mnt/somebody/models/mine"}
    folder = write_unet(tmp_path / "teacher", config)
    out = unet_surgery.prune("bk_tiny", folder, tmp_path / "out").folder
    for name, data in folder_bytes(out).items():
        assert str(tmp_path).encode() not in data, name
        assert b"somebody" not in data, name
    assert json.loads((out / "plan.json").read_text())["teacher"]["id"] == "local"


def test_a_hub_id_in_the_config_is_the_teachers_name(tmp_path: Path) -> None:
    config = {**CONFIGS["sd1"], "_name_or_path": "somebody/finetune"}
    folder = write_unet(tmp_path / "teacher", config)
    out = unet_surgery.prune("bk_tiny", folder, tmp_path / "out").folder
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front["base_model"] == "somebody/finetune"
    other = unet_surgery.prune("bk_tiny", folder, tmp_path / "other", teacher_id="org/name").folder
    assert "org/name" in (other / "README.md").read_text()


def test_a_student_rebuilds_from_its_own_folder(teacher: Path, tmp_path: Path) -> None:
    first = unet_surgery.prune("sdxs_512", teacher, tmp_path / "first").folder
    again = unet_surgery.prune(first / "recipe.yaml", teacher, tmp_path / "again").folder
    assert folder_bytes(first) == folder_bytes(again)
    assert "extends" not in yaml.safe_load((first / "recipe.yaml").read_text())


# --- how the teacher is stored --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_a_sharded_teacher_gives_the_same_student(teacher: Path, tmp_path: Path, num_shards: int) -> None:
    sharded = write_sharded(tmp_path / "sharded", CONFIGS["sd1"], num_shards)
    one = unet_surgery.prune("bk_tiny", teacher, tmp_path / "one").folder
    many = unet_surgery.prune("bk_tiny", sharded, tmp_path / "many").folder
    assert (one / WEIGHTS).read_bytes() == (many / WEIGHTS).read_bytes()
    unet_surgery.check(many, sharded)
    unet_surgery.check(many, teacher)


def test_large_students_are_sharded_as_diffusers_expects(teacher: Path, tmp_path: Path) -> None:
    whole = load_file(unet_surgery.prune("bk_tiny", teacher, tmp_path / "whole").folder / WEIGHTS)
    out = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out", max_shard_size="200KB").folder
    shards = sorted(out.glob("*.safetensors"))
    names = [f"diffusion_pytorch_model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
    assert [path.name for path in shards] == names
    assert len(shards) == 5
    index = json.loads((out / WEIGHTS_INDEX).read_text())
    for path in shards:
        tensors = load_file(path)
        assert sum(t.nbytes for t in tensors.values()) <= 200_000
        assert {name for name, file in index["weight_map"].items() if file == path.name} == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    unet_surgery.verify(out, teacher)
    loaded = unet_surgery.load_unet(out).state_dict()
    assert all(np.array_equal(loaded[name].numpy(), tensor) for name, tensor in whole.items())


def test_unsorted_and_padded_teachers_are_legal(teacher: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(teacher, odd)
    data = (teacher / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    text = json.dumps(dict(reversed(header.items())), indent=1).encode() + b"  \n "
    (odd / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    a = unet_surgery.prune("bk_tiny", teacher, tmp_path / "a").folder
    b = unet_surgery.prune("bk_tiny", odd, tmp_path / "b").folder
    assert (a / WEIGHTS).read_bytes() == (b / WEIGHTS).read_bytes()


def half_teacher(tmp_path: Path, teacher: Path) -> Path:
    """A teacher with plain fp32 weights and a fp16 variant."""
    both = tmp_path / "both"
    shutil.copytree(teacher, both)
    tensors = {name: tensor.astype(np.float16) for name, tensor in load_file(teacher / WEIGHTS).items()}
    save_file(tensors, both / "diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    return both


def test_variants(teacher: Path, tmp_path: Path) -> None:
    both = half_teacher(tmp_path, teacher)
    plain = unet_surgery.prune("bk_tiny", both, tmp_path / "plain")
    assert plain.plan.teacher_weights is not None
    assert plain.plan.teacher_weights.dtypes == {"F32": 686}
    half = unet_surgery.prune("bk_tiny", both, tmp_path / "half", variant="fp16")
    assert half.plan.teacher_weights is not None
    assert half.plan.teacher_weights.dtypes == {"F16": 686}
    assert half.plan.student_bytes * 2 == plain.plan.student_bytes
    # stored under the plain name, so that it loads without naming a variant
    assert (half.folder / WEIGHTS).stat().st_size < plain.plan.student_bytes
    unet_surgery.verify(half.folder)
    unet_surgery.check(half.folder, both, variant="fp16")
    with pytest.raises(TeacherError, match="no weights of variant 'bf16'") as caught:
        unet_surgery.plan("bk_tiny", both, variant="bf16")
    assert "--variant fp16" in str(caught.value)


def test_the_only_variant_is_taken_and_two_are_a_question(teacher: Path, tmp_path: Path) -> None:
    both = half_teacher(tmp_path, teacher)
    (both / WEIGHTS).unlink()
    assert unet_surgery.plan("bk_tiny", both).teacher_weights is not None
    shutil.copy(both / "diffusion_pytorch_model.fp16.safetensors", both / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(TeacherError, match="several variants"):
        unet_surgery.plan("bk_tiny", both)


def test_components_by_variant_and_without_pickles(tiny: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny, teacher)
    vae, text = teacher / "vae", teacher / "text_encoder"
    (vae / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    halves = {k: v.astype(np.float16) for k, v in load_file(vae / WEIGHTS).items()}
    save_file(halves, vae / "diffusion_pytorch_model.fp16.safetensors")
    (text / "model.safetensors").rename(text / "pytorch_model.bin")
    (teacher / "notes").mkdir()
    (teacher / "notes" / "huge.ckpt").write_bytes(b"not a component")
    half = {k: v.astype(np.float16) for k, v in load_file(teacher / "unet" / WEIGHTS).items()}
    save_file(half, teacher / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    plain = unet_surgery.prune("bk_tiny", teacher, tmp_path / "plain").folder
    assert entries(plain / "vae") == ["config.json", WEIGHTS]
    assert entries(plain / "text_encoder") == ["config.json", "pytorch_model.bin"]
    assert "notes" not in entries(plain)
    fp16 = unet_surgery.prune("bk_tiny", teacher, tmp_path / "fp16", variant="fp16").folder
    halves_file = vae / "diffusion_pytorch_model.fp16.safetensors"
    assert (fp16 / "vae" / WEIGHTS).read_bytes() == halves_file.read_bytes()
    unet_surgery.check(fp16, teacher, variant="fp16")


def test_link_shares_the_components_files(tiny: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny, teacher)
    out = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out", link=True).folder
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (teacher / name).samefile(out / name)
    assert not (teacher / "unet" / WEIGHTS).samefile(out / "unet" / WEIGHTS)


def test_a_folder_of_links_like_the_hub_cache(tiny: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    for number, path in enumerate(p for p in sorted(tiny.rglob("*")) if p.is_file()):
        blob = blobs / str(number)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(tiny)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    out = unet_surgery.prune("bk_tiny", snapshot, tmp_path / "out").folder
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert folder_bytes(out) == folder_bytes(unet_surgery.prune("bk_tiny", tiny, tmp_path / "b").folder)


# --- --dtype --------------------------------------------------------------------------------------------------------


def edge_values() -> np.ndarray:
    """fp32 values around every rounding boundary of the 16-bit formats: ties, subnormals, zeros, largest finite."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (rng.integers(0, 2**19, 50_000, dtype=np.uint32) << 13) | 0x1000
    bf16_ties = (rng.integers(0, 2**16, 50_000, dtype=np.uint32) << 16) | 0x8000
    special = np.array([0, 0x80000000, 1, 0x387FC000, 0x33000000, 0x33000001, 0x477FE000, 0x7F7F0000], np.uint32)
    values = np.concatenate([bits, ties, bf16_ties, special]).view(np.float32)
    return values[np.isfinite(values)]


@pytest.mark.parametrize(("target", "limit"), [("fp16", 65_504.0), ("bf16", 3.3e38), ("fp32", 3.4e38)])
@pytest.mark.parametrize("source", ["F32", "F64", "F16", "BF16"])
def test_conversion_equals_torch(source: str, target: str, limit: float) -> None:
    import torch

    from unet_surgery.checkpoint.cast import cast

    values = edge_values()
    values = values[np.abs(values) <= min(limit, 65_504.0 if source == "F16" else limit)]
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensor = torch.from_numpy(values).to(dtypes[source])
    if source == "F64":
        tensor += torch.from_numpy(values).double() * 2**-30
        tensor = tensor[tensor.abs() <= limit]
    names = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
    expected = tensor.to(dtypes[names[target]])
    keep = torch.isfinite(expected)
    tensor, expected = tensor[keep], expected[keep]
    assert len(tensor) > 100_000
    got = cast(tensor.contiguous().view(torch.uint8).numpy().tobytes(), source, names[target])
    assert got == expected.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_dtype_of_a_student(teacher: Path, tmp_path: Path, dtype: str) -> None:
    import torch

    result = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out", dtype=dtype)
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    originals = {name: torch.from_numpy(t) for name, t in load_file(teacher / WEIGHTS).items()}
    with safe_open(result.folder / WEIGHTS, framework="pt") as student:
        for name, source in result.plan.weights.items():
            assert source is not None
            assert torch.equal(student.get_tensor(name), originals[source].to(wanted))
    assert (result.folder / WEIGHTS).stat().st_size > result.plan.student_bytes
    unet_surgery.check(result.folder, teacher)
    unet_surgery.verify(result.folder)


def test_nan_and_inf_survive_conversion() -> None:
    from unet_surgery.checkpoint.cast import cast

    values = np.array([np.nan, -np.nan, np.inf, -np.inf], np.float32)
    odd = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], np.uint32).view(np.float32)  # payloads only in low bits
    half = np.frombuffer(cast(np.concatenate([values, odd]).tobytes(), "F32", "F16"), np.float16)
    brain = np.frombuffer(cast(np.concatenate([values, odd]).tobytes(), "F32", "BF16"), np.uint16).astype(np.uint32)
    for result in (half.astype(np.float32), (brain << 16).view(np.float32)):
        assert np.isnan(result[[0, 1, 4, 5, 6]]).all()
        np.testing.assert_array_equal(result[2:4], values[2:4])


def test_overflow_names_the_tensor_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["sd1"])
    tensors["up_blocks.3.resnets.2.conv2.weight"].flat[7] = 70_000
    folder = write_unet(tmp_path / "teacher", CONFIGS["sd1"], tensors)
    with pytest.raises(TeacherError, match="too large for F16") as caught:
        unet_surgery.prune("bk_tiny", folder, tmp_path / "out", dtype="fp16")
    assert "up_blocks.3.resnets.2.conv2.weight" in str(caught.value)
    assert "70000" in str(caught.value)
    assert entries(tmp_path) == ["teacher"]
    unet_surgery.prune("bk_tiny", folder, tmp_path / "out", dtype="bf16")


def test_bypassed_attentions_get_zeros(teacher: Path, tmp_path: Path) -> None:
    recipe = unet_surgery.Recipe(name="one", remove=("down.1.attentions.0",))
    out = unet_surgery.prune(recipe, teacher, tmp_path / "out").folder
    student = load_file(out / WEIGHTS)
    for leaf in ("weight", "bias"):
        assert not student[f"down_blocks.1.attentions.0.proj_out.{leaf}"].any()
        assert student[f"down_blocks.1.attentions.1.proj_out.{leaf}"].all()
    report = unet_surgery.verify(out, teacher)
    assert report.check.num_zero_tensors == 2


# --- law 6: whole or not at all -------------------------------------------------------------------------------------


def test_an_existing_output_is_not_touched(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        unet_surgery.prune("bk_tiny", teacher, out)
    with pytest.raises(OutputError, match="replaces students only"):
        unet_surgery.prune("bk_tiny", teacher, out, force=True)
    assert folder_bytes(out) == {"mine.txt": b"precious"}


@pytest.mark.parametrize("text", ['{"a": 1}', "garbage", "[]", "", '{"format": "terraform"}'])
def test_force_is_not_fooled_by_a_file_called_plan(teacher: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.json").write_text(text)
    (out / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="replaces students only"):
        unet_surgery.prune("bk_tiny", teacher, out, force=True)
    assert folder_bytes(out) == {"mine.txt": b"precious", "plan.json": text.encode()}


def test_force_keeps_what_users_added_to_a_student(tiny: Path, tmp_path: Path) -> None:
    out = unet_surgery.prune("bk_base", tiny, tmp_path / "out").folder
    (out / "checkpoints").mkdir()
    with pytest.raises(OutputError, match="prune did not write") as caught:
        unet_surgery.prune("bk_tiny", tiny, out, force=True)
    assert "checkpoints" in str(caught.value)
    (out / "checkpoints").rmdir()
    unet_surgery.prune("bk_tiny", tiny, out, force=True)
    unet_surgery.check(out, tiny)


@pytest.mark.parametrize("name", ["last.ckpt", "unet/optimizer.bin", "unet/notes.txt", "LICENSE-mine"])
def test_force_keeps_checkpoints_and_texts_of_users(tiny: Path, tmp_path: Path, name: str) -> None:
    out = unet_surgery.prune("bk_base", tiny, tmp_path / "out").folder
    (out / name).write_text("mine")
    with pytest.raises(OutputError, match="prune did not write"):
        unet_surgery.prune("bk_tiny", tiny, out, force=True)
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["tokenizer/notes.txt", "vae", "NOTICE"])
def test_no_link_leads_out_of_the_teacher(
    tiny: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What a student holds is made to be published."""
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny, teacher)
    (tmp_path / "secret").mkdir()
    if name == "vae":
        shutil.move(teacher / "vae", tmp_path / "secret" / "vae")
    else:
        (tmp_path / "secret" / Path(name).name).write_text("a key")
    (teacher / name).symlink_to(tmp_path / "secret" / Path(name).name)
    if name == "NOTICE":
        out = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out").folder
        assert "NOTICE cannot be carried along: a link leads out" in caplog.text
        assert "NOTICE" not in entries(out)
        return
    with pytest.raises(TeacherError, match="leads out of the teacher's folder"):
        unet_surgery.prune("bk_tiny", teacher, tmp_path / "out")


@pytest.mark.parametrize("normalize", [False, True])
def test_a_component_that_changes_after_it_was_looked_at(tiny: Path, tmp_path: Path, normalize: bool) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny, teacher)
    path = teacher / "text_encoder" / "model.safetensors"

    def change(done: int, total: int) -> None:
        if path.stat().st_size > 10:
            path.write_bytes(b"garbage")

    with pytest.raises(TeacherError, match=r"changed while it was read|ended while it was read"):
        unet_surgery.prune("bk_tiny", teacher, tmp_path / "out", progress=change, normalize=normalize)
    assert "out" not in entries(tmp_path)


@pytest.mark.parametrize("name", [f"unet/{WEIGHTS}", "README.md", "vae/config.json"])
def test_force_keeps_a_student_that_was_trained_or_edited(tiny: Path, tmp_path: Path, name: str) -> None:
    out = unet_surgery.prune("bk_base", tiny, tmp_path / "out").folder
    later = time.time() + 60
    os.utime(out / name, (later, later))
    with pytest.raises(OutputError, match="changed since prune wrote them") as caught:
        unet_surgery.prune("bk_tiny", tiny, out, force=True)
    assert name in str(caught.value)


def test_more_shards_than_can_be_read_back(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too many to be read back"):
        unet_surgery.prune("bk_tiny", teacher, tmp_path / "out", max_shard_size=1)
    assert entries(tmp_path) == []


def test_force_takes_an_empty_folder(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    unet_surgery.check(unet_surgery.prune("bk_tiny", teacher, tmp_path / "out", force=True).folder, teacher)


def test_force_replaces_a_student(teacher: Path, tmp_path: Path) -> None:
    unet_surgery.prune("bk_base", teacher, tmp_path / "out")
    unet_surgery.prune("bk_tiny", teacher, tmp_path / "out", force=True)
    fresh = unet_surgery.prune("bk_tiny", teacher, tmp_path / "fresh").folder
    assert folder_bytes(tmp_path / "out") == folder_bytes(fresh)
    assert entries(tmp_path) == ["fresh", "out"]


@pytest.mark.parametrize("where", [".", "inside", "link", "file"])
def test_the_output_may_not_be_the_teacher(unet_folders: dict[str, Path], tmp_path: Path, where: str) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(unet_folders["sd1"], teacher)
    before = folder_bytes(teacher)
    (tmp_path / "link").symlink_to(teacher)
    (tmp_path / "file").write_text("")
    out = {".": teacher, "inside": teacher / "out", "link": tmp_path / "link", "file": tmp_path / "file"}[where]
    with pytest.raises(OutputError):
        unet_surgery.prune("bk_tiny", teacher, out, force=True)
    assert folder_bytes(teacher) == before
    assert entries(tmp_path) == ["file", "link", "teacher"]


@pytest.mark.parametrize(
    "call", ["create", "write", "copy_range", "fsync", "rename_new", "fsync_folder", "make_folder"]
)
def test_a_full_disk_leaves_nothing(tiny: Path, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, call, full)
    with pytest.raises(OutputError, match="No space left"):
        unet_surgery.prune("bk_tiny", tiny, tmp_path / "out")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("refused", [errno.ENOSYS, errno.EXDEV, errno.EINVAL])
def test_copying_falls_back_where_the_kernel_refuses(
    teacher: Path, tmp_path: Path, refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = unet_surgery.prune("bk_tiny", teacher, tmp_path / "a").folder

    def refuse(*args: object) -> int:
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert folder_bytes(unet_surgery.prune("bk_tiny", teacher, tmp_path / "b").folder) == folder_bytes(whole)


def test_short_counts_are_continued(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = unet_surgery.prune("bk_tiny", teacher, tmp_path / "a").folder
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda s, t, n, offset: real(s, t, min(n, 1000), offset))
    assert folder_bytes(unet_surgery.prune("bk_tiny", teacher, tmp_path / "b").folder) == folder_bytes(whole)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_signals_leave_nothing_half_written(tiny: Path, tmp_path: Path, number: int, code: int) -> None:
    """A real process, stopped while it writes; after SIGKILL the next run clears what is left, and says so."""
    script = (
        "import sys, time\n"
        "from unet_surgery.checkpoint import disk\n"
        "real = disk.copy_range\n"
        "def slow(*args):\n"
        "    real(*args)\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(30)\n"
        "disk.copy_range = slow\n"
        "from unet_surgery.cli.main import main\n"
        "main()\n"
    )
    command = ["prune", "--recipe", "bk_tiny", "--teacher", str(tiny), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in stderr
    left = entries(tmp_path)
    assert left == ([".out.unet-surgery"] if number == signal.SIGKILL else [])
    tool = [sys.executable, "-m", "unet_surgery", *command]
    again = subprocess.run(tool, capture_output=True, text=True, check=True)
    assert ("interrupted run" in again.stderr) == (number == signal.SIGKILL)
    assert entries(tmp_path) == ["out"]


def test_a_second_writer_is_told_of_the_first(teacher: Path, tmp_path: Path) -> None:
    from unet_surgery.checkpoint.staging import Staging

    with Staging(tmp_path / "out"), pytest.raises(OutputError, match="another process is writing"):
        unet_surgery.prune("bk_tiny", teacher, tmp_path / "out")
    assert entries(tmp_path) == []
    unet_surgery.prune("bk_tiny", teacher, tmp_path / "out")


def test_a_teacher_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    folder = write_unet(tmp_path / "teacher", CONFIGS["sd1"])

    def touch(done: int, total: int) -> None:
        os.utime(folder / WEIGHTS, ns=(1, time.time_ns()))

    with pytest.raises(TeacherError, match="changed while it was read"):
        unet_surgery.prune("bk_tiny", folder, tmp_path / "out", progress=touch)
    assert entries(tmp_path) == ["teacher"]


def test_too_little_room_is_found_before_writing(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)
    with pytest.raises(OutputError, match="not enough room"):
        unet_surgery.prune("bk_tiny", teacher, tmp_path / "out")
    assert entries(tmp_path) == []


# --- teachers that contradict themselves ----------------------------------------------------------------------------


def broken(tmp_path: Path, change: str) -> Path:
    tensors = random_tensors(CONFIGS["sd1"])
    name = "up_blocks.1.resnets.2.conv1.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["up_blocks.9.conv.weight"] = np.ones(3, np.float32)
    elif change == "shape":
        tensors[name] = tensors[name][:, :-1].copy()
    elif change == "prefix":
        tensors = {f"module.{key}": value for key, value in tensors.items()}
    return write_unet(tmp_path / "teacher", CONFIGS["sd1"], tensors)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", r"1 missing: up_blocks.1.resnets.2.conv1.weight"),
        ("extra", r"1 unexpected: up_blocks.9.conv.weight"),
        ("shape", r"conv1.weight is \[32, 47, 3, 3\], expected \[32, 48, 3, 3\]"),
        ("prefix", r"with a prefix before every name"),
    ],
)
def test_weights_against_config(tmp_path: Path, change: str, says: str) -> None:
    folder = broken(tmp_path, change)
    with pytest.raises(WeightsMismatchError) as caught:
        unet_surgery.prune("bk_tiny", folder, tmp_path / "out")
    assert re.search(says, str(caught.value))
    assert entries(tmp_path) == ["teacher"]


def test_a_missing_component_is_named(tiny: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny, teacher)
    shutil.rmtree(teacher / "vae")
    with pytest.raises(TeacherError, match="component of the pipeline is missing"):
        unet_surgery.prune("bk_tiny", teacher, tmp_path / "out")
    assert entries(tmp_path) == ["teacher"]
    unet_surgery.prune("bk_tiny", teacher, tmp_path / "out", unet_only=True)
    unet_surgery.plan("bk_tiny", teacher)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: (t / "vae" / WEIGHTS).unlink(), "weights beside config.json"),
        (lambda t: (t / "vae" / "config.json").unlink(), "config.json beside the weights"),
        (lambda t: [p.unlink() for p in (t / "tokenizer").iterdir()], "expected: files"),
        (lambda t: (t / "vae" / "x.json").symlink_to("nowhere"), "a link that leads to a file"),
        (lambda t: (t / "model_index.json").write_text("{}"), "names no U-Net"),
        (lambda t: (t / "model_index.json").write_text("["), "not a valid JSON object"),
    ],
    ids=["no weights", "no config", "empty", "dangling", "empty index", "broken index"],
)
def test_incomplete_pipelines(tiny: Path, tmp_path: Path, change: Callable[[Path], object], says: str) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny, teacher)
    change(teacher)
    with pytest.raises(TeacherError) as caught:
        unet_surgery.prune("bk_tiny", teacher, tmp_path / "out")
    assert says in str(caught.value)
    assert entries(tmp_path) == ["teacher"]


def test_a_variant_among_several_is_enough(teacher: Path, tmp_path: Path) -> None:
    both = half_teacher(tmp_path, teacher)
    (both / WEIGHTS).rename(both / "diffusion_pytorch_model.ema.safetensors")
    plan = unet_surgery.prune("bk_tiny", both, tmp_path / "out", variant="ema").plan
    assert plan.teacher_weights is not None
    assert plan.teacher_weights.dtypes == {"F32": 686}


@pytest.mark.parametrize("teacher_id", ["", "a", "a/b/c", "a\n---\nx: y", "../up"])
def test_a_teacher_id_is_a_hub_id(teacher: Path, tmp_path: Path, teacher_id: str) -> None:
    with pytest.raises(UsageError, match="not a Hub id"):
        unet_surgery.prune("bk_tiny", teacher, tmp_path / "out", teacher_id=teacher_id)
