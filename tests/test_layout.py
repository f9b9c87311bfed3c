"""Folders: shards and their index, what a teacher may be, and the file system's own refusals."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from configs import CONFIGS
from safetensors.numpy import load_file, save_file
from teachers import WEIGHTS, entries, folder_bytes, write_sharded, write_unet

import unet_surgery
from unet_surgery.checkpoint import disk
from unet_surgery.checkpoint.layout import component_files
from unet_surgery.checkpoint.teacher import is_hub_id
from unet_surgery.errors import ConfigError, ContainerError, OutputError, TeacherError

INDEX = "diffusion_pytorch_model.safetensors.index.json"
FIRST, SECOND = (f"diffusion_pytorch_model-{k:05d}-of-00002.safetensors" for k in (1, 2))


def change_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def put_in_both(folder: Path) -> None:
    both = load_file(folder / FIRST) | load_file(folder / SECOND)
    for name in (FIRST, SECOND):
        save_file({**load_file(folder / name), "conv_in.bias": both["conv_in.bias"]}, folder / name)


def swap(weight_map: dict[str, str]) -> None:
    weight_map["conv_in.bias"] = SECOND if weight_map["conv_in.bias"] == FIRST else FIRST


BROKEN_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: (f / SECOND).unlink(), "cannot be opened"),
    "outside the folder": (lambda f: change_index(f, lambda m: m.update(x="../x.safetensors")), "outside its folder"),
    "absolute": (lambda f: change_index(f, lambda m: m.update(x="/etc/passwd")), "outside its folder"),
    "wrong shard": (lambda f: change_index(f, swap), "index and the shards disagree"),
    "not in a shard": (lambda f: change_index(f, lambda m: m.update(x=FIRST)), "in no shard"),
    "not in the index": (lambda f: change_index(f, lambda m: m.pop("conv_in.bias") and None), "does not list"),
    "in two shards": (put_in_both, "stands in two shards"),
    "no map": (lambda f: (f / INDEX).write_text('{"weight_map": []}'), "no weight_map"),
    "not JSON": (lambda f: (f / INDEX).write_text("{"), "not a valid JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BROKEN_SHARDS))
def test_broken_shards(tmp_path: Path, case: str) -> None:
    folder = write_sharded(tmp_path / "teacher", CONFIGS["sd1"], 2)
    change, says = BROKEN_SHARDS[case]
    change(folder)
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises((TeacherError, ContainerError)) as caught:
        unet_surgery.prune("bk_tiny", folder, tmp_path / "out")
    assert says in str(caught.value)
    assert entries(tmp_path) == ["teacher"]
    if open_files:
        assert len(os.listdir("/proc/self/fd")) == open_files  # nothing stays open after an error


def test_a_sharded_variant(tmp_path: Path) -> None:
    folder = write_unet(tmp_path / "teacher", CONFIGS["sd1"])
    write_sharded(folder, CONFIGS["sd1"], 2, variant="fp16")
    plain = unet_surgery.prune("bk_tiny", folder, tmp_path / "plain").folder
    variant = unet_surgery.prune("bk_tiny", folder, tmp_path / "variant", variant="fp16")
    assert variant.plan.teacher_weights is not None
    assert len(variant.plan.teacher_weights.files) == 2
    assert (plain / WEIGHTS).read_bytes() == (variant.folder / WEIGHTS).read_bytes()


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_unet(tmp_path / "teacher", CONFIGS["sd1"])
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    with pytest.raises(TeacherError, match="not a regular file"):
        unet_surgery.plan("bk_tiny", folder)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "no tensors"),
        ("model.ckpt", b"PK\x03\x04....", "pickle"),
        ("page.safetensors", b"<html>", "HTML"),
    ],
)
def test_a_file_is_no_teacher(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TeacherError, match="U-Net|safetensors file") as caught:
        unet_surgery.plan("bk_tiny", tmp_path / name)
    assert says in str(caught.value)


def test_folders_that_hold_no_unet(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="an empty folder"):
        unet_surgery.plan("bk_tiny", tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ConfigError, match="not a conditional U-Net's") as caught:
        unet_surgery.plan("bk_tiny", tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(TeacherError, match="stands twice"):
        unet_surgery.plan("bk_tiny", tmp_path)


def test_a_pickle_is_named_and_not_opened(tmp_path: Path) -> None:
    folder = write_unet(tmp_path / "teacher", CONFIGS["sd1"])
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    assert unet_surgery.plan("bk_tiny", folder).teacher_weights is None  # the config is enough for that
    with pytest.raises(TeacherError, match="no safetensors weights") as caught:
        unet_surgery.prune("bk_tiny", folder, tmp_path / "out")
    assert "diffusion_pytorch_model.bin, a pickle, which is never opened" in str(caught.value)


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
COMPONENTS = [
    (["config.json", "model.safetensors", "pytorch_model.bin", "flax_model.msgpack"], None, {"model.safetensors"}),
    (["model.fp16.safetensors", "model.safetensors"], "fp16", {"model.safetensors"}),
    (["model.fp16.safetensors", "pytorch_model.bin"], None, {"model.safetensors"}),
    (["pytorch_model.bin", "pytorch_model.fp16.bin"], None, {"pytorch_model.bin"}),
    (["pytorch_model.bin", "pytorch_model.fp16.bin"], "fp16", {"pytorch_model.bin"}),
    (["vocab.json", "merges.txt"], "fp16", set()),
    ([*SHARDS, "x.onnx"], None, set(SHARDS)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "variant", "weights"), COMPONENTS, ids=[str(c[0])[:40] + str(c[1]) for c in COMPONENTS]
)
def test_files_of_a_component(names: list[str], variant: str | None, weights: set[str]) -> None:
    files = component_files(names, variant)
    others = {name for name in names if name.endswith((".txt", ".json")) and "index" not in name}
    assert set(files.values()) == weights | others
    if variant == "fp16" and weights:
        assert any("fp16" in source for source in files)


MIXED = [f"model{tag}-0000{k}-of-00002.safetensors" for tag in ("", ".ema", ".non_ema") for k in (1, 2)]
MIXED += [f"model.safetensors.index{tag}.json" for tag in ("", ".ema", ".non_ema")]


@pytest.mark.parametrize(("variant", "tag"), [(None, ""), ("ema", ".ema"), ("non_ema", ".non_ema")])
def test_shards_of_one_variant_only(variant: str | None, tag: str) -> None:
    shards = {f"model{tag}-0000{k}-of-00002.safetensors" for k in (1, 2)}
    files = component_files(MIXED, variant)
    # the index loses its tag, so that the student loads without naming a variant; it names the shards as they are
    assert files == {s: s for s in shards} | {f"model.safetensors.index{tag}.json": "model.safetensors.index.json"}


def test_a_sharded_variant_of_a_component_loads(tiny: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    teacher = tmp_path / "teacher"
    shutil.copytree(tiny, teacher)
    folder = teacher / "text_encoder"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = [f"model.fp16-0000{k}-of-00002.safetensors" for k in (1, 2)]
    parts = [dict(sorted(tensors.items())[k::2]) for k in (0, 1)]
    for name, part in zip(shards, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, part in zip(shards, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    out = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out").folder
    _, info = CLIPTextModel.from_pretrained(out / "text_encoder", output_loading_info=True)
    assert not any(info.values())


def test_sharded_pickles_of_a_component_are_copied() -> None:
    names = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    names += ["pytorch_model.bin.index.json", "tf_model.h5"]
    assert set(component_files(names, None)) == set(names) - {"tf_model.h5"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("org/name", True), ("a/b-c.d_e", True), ("/abs/path", False), ("./a", False), ("a/b/c", False), ("name", False),
     ("C:\\models\\x", False), ("~/models", False), ("", False), (None, False), (3, False)],
)  # fmt: skip
def test_hub_ids(text: object, expected: bool) -> None:
    assert is_hub_id(text) == expected


# --- where the system cannot swap or rename without replacing ---------------------------------------------------------


@pytest.fixture
def no_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(disk, "_renameat2", refuse)


@pytest.mark.usefixtures("no_renameat2")
def test_old_systems_still_replace_students(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_unet(tmp_path / "teacher", CONFIGS["sd1"])
    unet_surgery.prune("bk_base", folder, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        unet_surgery.prune("bk_tiny", folder, tmp_path / "out")
    unet_surgery.prune("bk_tiny", folder, tmp_path / "out", force=True)
    assert "not atomic" in caplog.text
    unet_surgery.check(tmp_path / "out", folder)
    assert entries(tmp_path) == ["out", "teacher"]


@pytest.mark.parametrize("old", [False, True], ids=["renameat2", "without"])
def test_an_output_that_appears_meanwhile_is_kept(
    tmp_path: Path, old: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if old:
        request.getfixturevalue("no_renameat2")
    folder = write_unet(tmp_path / "teacher", CONFIGS["sd1"])
    out = tmp_path / "out"

    def appear(done: int, total: int) -> None:
        if not out.exists():
            out.mkdir()
            (out / "theirs").write_text("x")

    with pytest.raises(OutputError, match="appeared while"):
        unet_surgery.prune("bk_tiny", folder, out, progress=appear)
    assert folder_bytes(out) == {"theirs": b"x"}
    assert entries(tmp_path) == ["out", "teacher"]


def test_link_across_file_systems_says_so(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputError, match="hard-linked") as caught:
        unet_surgery.prune("bk_tiny", tiny, tmp_path / "out", link=True)
    assert "leave --link out" in str(caught.value)
    assert entries(tmp_path) == []


def test_a_read_only_teacher(tmp_path: Path) -> None:
    folder = write_unet(tmp_path / "teacher", CONFIGS["sd1"])
    for path in (folder / WEIGHTS, folder / "config.json", folder):
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        out = unet_surgery.prune("bk_tiny", folder, tmp_path / "out").folder
    finally:
        folder.chmod(0o755)
    mask = os.umask(0)
    os.umask(mask)
    assert (out / WEIGHTS).stat().st_mode & 0o777 == 0o666 & ~mask
    shutil.rmtree(out)


def test_names_with_spaces_and_accents(tmp_path: Path) -> None:
    folder = write_unet(tmp_path / "mon modèle été", CONFIGS["sd1"])
    out = unet_surgery.prune("bk_tiny", folder, tmp_path / "élève 1").folder
    unet_surgery.check(f"{out}/", f"{folder}/")
    assert entries(tmp_path) == ["mon modèle été", "élève 1"]
