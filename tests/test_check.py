"""``check`` and ``verify`` find what is wrong with a student, and name it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from teachers import WEIGHTS

import unet_surgery
from unet_surgery.errors import TeacherError, VerificationError
from unet_surgery.lower import SurgeryPlan


@pytest.fixture
def student(unet_folders: dict[str, Path], tmp_path: Path) -> Path:
    return unet_surgery.prune("bk_tiny", unet_folders["sd1"], tmp_path / "student").folder


def edit(student: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(student / WEIGHTS)
    change(tensors)
    save_file(tensors, student / WEIGHTS, metadata={"format": "pt"})


A, B = "up_blocks.2.resnets.0.conv2.weight", "up_blocks.2.resnets.1.conv2.weight"


def test_a_good_student(student: Path, unet_folders: dict[str, Path]) -> None:
    report = unet_surgery.check(student, unet_folders["sd1"])
    assert (report.num_tensors, report.compared_tensors) == (358, 358)
    assert report.compared_bytes == report.plan.student_bytes
    assert unet_surgery.check(student).compared_bytes == 0
    assert unet_surgery.verify(student, unet_folders["sd1"]).output_shape == (1, 4, 8, 8)


def test_one_flipped_bit_is_found_and_named(student: Path, unet_folders: dict[str, Path]) -> None:
    def flip(tensors: dict[str, np.ndarray]) -> None:
        tensors[A].view(np.uint32).flat[123] ^= 1

    edit(student, flip)
    unet_surgery.check(student)  # nothing to compare with
    with pytest.raises(VerificationError, match="1 tensors differ from the teacher's") as caught:
        unet_surgery.check(student, unet_folders["sd1"])
    assert A in str(caught.value)


def test_the_wrong_teacher_layer_of_equal_shape_is_found(student: Path, unet_folders: dict[str, Path]) -> None:
    def swap(tensors: dict[str, np.ndarray]) -> None:
        assert tensors[A].shape == tensors[B].shape
        tensors[A], tensors[B] = tensors[B], tensors[A]

    edit(student, swap)
    with pytest.raises(VerificationError, match="2 tensors differ") as caught:
        unet_surgery.check(student, unet_folders["sd1"])
    assert A in str(caught.value)
    assert B in str(caught.value)


def test_missing_and_unexpected_tensors(student: Path) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        tensors["nowhere.weight"] = tensors.pop(A)

    edit(student, rename)
    for tool in (unet_surgery.check, unet_surgery.verify):
        with pytest.raises(VerificationError, match="do not fit the plan") as caught:
            tool(student)
        assert f"1 missing: {A}" in str(caught.value)
        assert "1 unexpected: nowhere.weight" in str(caught.value)


def test_a_cut_file(student: Path) -> None:
    data = (student / WEIGHTS).read_bytes()
    (student / WEIGHTS).write_bytes(data[:-10])
    with pytest.raises(VerificationError, match="cut short"):
        unet_surgery.check(student)


def test_a_changed_config(student: Path) -> None:
    config = json.loads((student / "config.json").read_text())
    config["attention_head_dim"] = 4  # fits every shape, and is another network
    (student / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="config is not the plan's") as caught:
        unet_surgery.check(student)
    assert "attention_head_dim" in str(caught.value)


@pytest.mark.parametrize("value", [2.0, True, "2"])
def test_configs_are_compared_as_json(student: Path, value: object) -> None:
    config = json.loads((student / "config.json").read_text())
    assert config["attention_head_dim"] == 2
    (student / "config.json").write_text(json.dumps({**config, "attention_head_dim": value}))
    with pytest.raises(VerificationError, match="config is not the plan's"):
        unet_surgery.check(student)


def test_another_dtype_is_found_without_the_teacher(student: Path) -> None:
    tensors = {name: tensor.astype(np.float16) for name, tensor in load_file(student / WEIGHTS).items()}
    save_file(tensors, student / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="dtypes are not the plan's"):
        unet_surgery.check(student)


def test_zeros_that_are_not(unet_folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = unet_surgery.Recipe(name="one", remove=("down.1.attentions.0",))
    student = unet_surgery.prune(recipe, unet_folders["sd1"], tmp_path / "student").folder

    def fill(tensors: dict[str, np.ndarray]) -> None:
        tensors["down_blocks.1.attentions.0.proj_out.bias"][3] = 1e-9

    edit(student, fill)
    with pytest.raises(VerificationError, match="must be zero"):
        unet_surgery.check(student)


def test_another_teacher(student: Path, unet_folders: dict[str, Path]) -> None:
    with pytest.raises(TeacherError, match="not the teacher"):
        unet_surgery.check(student, unet_folders["sd2"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_verify_names_what_is_not_finite(student: Path, value: float) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[B].flat[5] = value

    edit(student, spoil)
    with pytest.raises(VerificationError, match="NaN or Inf") as caught:
        unet_surgery.verify(student)
    assert B in str(caught.value)


def test_a_changed_component(tiny: Path, tmp_path: Path) -> None:
    out = unet_surgery.prune("bk_tiny", tiny, tmp_path / "out").folder
    unet_surgery.check(out, tiny)
    path = out / "vae" / "config.json"
    path.write_text(path.read_text().replace("32", "33"))
    with pytest.raises(VerificationError, match="copied file differs"):
        unet_surgery.check(out, tiny)


@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json", f"vae/{WEIGHTS}", "tokenizer/vocab.json"])
def test_a_pipeline_must_be_whole(tiny: Path, tmp_path: Path, name: str) -> None:
    out = unet_surgery.prune("bk_tiny", tiny, tmp_path / "out").folder
    (out / name).unlink()
    with pytest.raises(VerificationError):
        unet_surgery.check(out, tiny)
    if name != "tokenizer/vocab.json":  # without the teacher nobody can know that a tokenizer had this file
        with pytest.raises(VerificationError):
            unet_surgery.verify(out)


def test_an_edited_index(tiny: Path, tmp_path: Path) -> None:
    out = unet_surgery.prune("bk_tiny", tiny, tmp_path / "out").folder
    index = json.loads((out / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps({**index, "requires_safety_checker": True}))
    with pytest.raises(VerificationError, match="copied file differs"):
        unet_surgery.check(out, tiny)


@pytest.mark.parametrize(("side", "key"), [("teacher", "params"), ("student", "params"), ("student", "macs_all")])
def test_edited_sizes(student: Path, side: str, key: str) -> None:
    data = json.loads((student / "plan.json").read_text())
    data[side][key] += 1
    (student / "plan.json").write_text(json.dumps(data))
    with pytest.raises(VerificationError, match="sizes are not those"):
        unet_surgery.check(student)


@pytest.mark.parametrize("text", [None, "name: x\nremove: [mid]\n", "[", ""])
def test_an_edited_recipe(student: Path, text: str | None) -> None:
    (student / "recipe.yaml").unlink()
    if text is not None:
        (student / "recipe.yaml").write_text(text)
    with pytest.raises(VerificationError, match="recipe"):
        unet_surgery.check(student)


def test_a_folder_that_is_no_student(tiny: Path) -> None:
    with pytest.raises(VerificationError, match="no readable plan.json"):
        unet_surgery.check(tiny)


# --- plan.json ------------------------------------------------------------------------------------------------------


def test_plans_survive_json(student: Path, unet_folders: dict[str, Path]) -> None:
    text = (student / "plan.json").read_text()
    plan = SurgeryPlan.from_json(text)
    assert plan.to_json() == text
    assert plan == unet_surgery.plan("bk_tiny", unet_folders["sd1"])
    data = json.loads(text)
    assert data["teacher"]["params"] == plan.teacher.params
    assert data["student"]["params"] == plan.student.params
    assert data["student"]["macs"] == plan.student.macs
    assert data["student"]["config"] == json.loads((student / "config.json").read_text())
    assert data["weights"]["up_blocks.0.resnets.1.conv1.weight"] == "up_blocks.1.resnets.2.conv1.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(format_version=2), "format_version 1"),
        (lambda d: d["student"].update(params="many"), "plan.student.params"),
        (lambda d: d["student"].update(params=True), "plan.student.params"),
        (lambda d: d.pop("weights"), "plan.weights"),
        (lambda d: d["weights"].update(x=3), "plan.weights"),
        (lambda d: d["features"]["bk"][0]["student"].update(at="left"), "input or output"),
        (lambda d: d["parts"].append(3), r"plan.parts\[10\]"),
    ],
)
def test_plans_are_checked_when_read(student: Path, change: Callable[[dict], None], says: str) -> None:
    data = json.loads((student / "plan.json").read_text())
    change(data)
    with pytest.raises(VerificationError, match=says):
        SurgeryPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}', "[" * 100_000])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(VerificationError):
        SurgeryPlan.from_json(text)


def test_a_plan_whose_map_was_edited(student: Path) -> None:
    data = json.loads((student / "plan.json").read_text())
    del data["weights"][A]
    (student / "plan.json").write_text(json.dumps(data))
    with pytest.raises(VerificationError, match="does not follow from what it removes"):
        unet_surgery.check(student)


def test_sharded_and_single_files_side_by_side(student: Path) -> None:
    shutil.copy(student / WEIGHTS, student / "diffusion_pytorch_model.fp16.safetensors")
    unet_surgery.check(student)
