"""``--normalize``: parts that transformers 5 saved become what every version reads, and no value changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from teachers import entries, folder_bytes

import unet_surgery
from unet_surgery.errors import VerificationError

PREFIX = "text_model."


@pytest.fixture
def modern(tiny: Path, tmp_path: Path) -> Path:
    """The tiny pipeline, with a text encoder and a tokenizer as transformers 5 saves fresh ones."""
    from transformers import CLIPTextModel, CLIPTokenizer

    teacher = tmp_path / "teacher"
    shutil.copytree(tiny, teacher)
    loaded = CLIPTextModel.from_pretrained(tiny / "text_encoder")
    fresh = CLIPTextModel(loaded.config)
    fresh.load_state_dict(loaded.state_dict())
    for name, part in (("text_encoder", fresh), ("tokenizer", CLIPTokenizer.from_pretrained(tiny / "tokenizer"))):
        shutil.rmtree(teacher / name)
        part.save_pretrained(teacher / name)
    assert not any(key.startswith(PREFIX) for key in load_file(teacher / "text_encoder" / "model.safetensors"))
    assert entries(teacher / "tokenizer") == ["tokenizer.json", "tokenizer_config.json"]
    return teacher


def test_a_fault_is_said_and_copied(modern: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = unet_surgery.prune("bk_tiny", modern, tmp_path / "out").folder
    assert "text_encoder was copied with a fault" in caplog.text
    assert "tokenizer was copied with a fault" in caplog.text
    assert "--normalize" in caplog.text
    for part in ("text_encoder", "tokenizer"):
        assert folder_bytes(out / part) == folder_bytes(modern / part)
    unet_surgery.check(out, modern)


def test_mended_names_and_the_same_values(
    modern: Path, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import CLIPTextModel

    out = unet_surgery.prune("bk_tiny", modern, tmp_path / "out", normalize=True).folder
    assert "fault" not in caplog.text
    theirs = load_file(modern / "text_encoder" / "model.safetensors")
    ours = load_file(out / "text_encoder" / "model.safetensors")
    assert (
        ours.keys()
        == {PREFIX + name for name in theirs}
        == load_file(tiny / "text_encoder" / "model.safetensors").keys()
    )
    for name, values in theirs.items():
        np.testing.assert_array_equal(values, ours[PREFIX + name])
    _, info = CLIPTextModel.from_pretrained(out / "text_encoder", output_loading_info=True)
    assert not any(info.values())
    assert "Stored in the layout that every version of transformers reads" in (out / "README.md").read_text()
    report = unet_surgery.check(out, modern)
    assert report.compared_files > 5


def test_the_old_tokenizer_files_say_the_same(modern: Path, tiny: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    out = unet_surgery.prune("bk_tiny", modern, tmp_path / "out", normalize=True).folder / "tokenizer"
    original = tiny / "tokenizer"
    assert json.loads((out / "vocab.json").read_text()) == json.loads((original / "vocab.json").read_text())
    assert (out / "merges.txt").read_text() == (original / "merges.txt").read_text()
    text = "A red circle, é 3."
    expected = CLIPTokenizer.from_pretrained(modern / "tokenizer")(text).input_ids
    assert CLIPTokenizer.from_pretrained(out)(text).input_ids == expected
    (out / "tokenizer.json").unlink()  # what an older reader, which knows the two files only, makes of it
    assert CLIPTokenizer.from_pretrained(out)(text).input_ids == expected


@pytest.mark.parametrize("merges", [[["a", "b"], ["ab", "c</w>"]], ["a b", "ab c</w>"]], ids=["pairs", "texts"])
def test_merges_of_both_forms(modern: Path, tmp_path: Path, merges: list[object]) -> None:
    path = modern / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["merges"] = merges
    data["added_tokens"].append({"id": 999, "content": "<new>"})
    path.write_text(json.dumps(data))
    out = unet_surgery.prune("bk_tiny", modern, tmp_path / "out", normalize=True).folder / "tokenizer"
    assert (out / "merges.txt").read_text() == "#version: 0.2\na b\nab c</w>\n"
    assert json.loads((out / "vocab.json").read_text())["<new>"] == 999


def test_a_sharded_text_encoder(modern: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    part = modern / "text_encoder"
    whole = CLIPTextModel(CLIPTextModel.from_pretrained(part).config)
    (part / "model.safetensors").unlink()
    whole.save_pretrained(part, max_shard_size="50KB")
    assert (part / "model.safetensors.index.json").is_file()
    out = unet_surgery.prune("bk_tiny", modern, tmp_path / "out", normalize=True).folder
    loaded, info = CLIPTextModel.from_pretrained(out / "text_encoder", output_loading_info=True)
    assert not any(info.values())
    index = json.loads((out / "text_encoder" / "model.safetensors.index.json").read_text())
    assert all(name.startswith(PREFIX) for name in index["weight_map"])
    for (name, ours), theirs in zip(loaded.state_dict().items(), whole.state_dict().values(), strict=True):
        assert ours.equal(theirs), name
    unet_surgery.check(out, modern)


@pytest.mark.parametrize("name", ["text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"])
@pytest.mark.parametrize("where", [0, -1], ids=["first", "last"])
def test_check_compares_what_was_mended(modern: Path, tmp_path: Path, name: str, where: int) -> None:
    out = unet_surgery.prune("bk_tiny", modern, tmp_path / "out", normalize=True).folder
    data = bytearray((out / name).read_bytes())
    data[where] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(VerificationError):
        unet_surgery.check(out, modern)


def test_what_needs_no_mending_is_copied(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = unet_surgery.prune("bk_tiny", tiny, tmp_path / "plain").folder
    mended = unet_surgery.prune("bk_tiny", tiny, tmp_path / "mended", normalize=True).folder
    before, after = folder_bytes(plain), folder_bytes(mended)
    assert {name for name in before if before[name] != after[name]} == {"README.md"}  # its command has --normalize
    assert "fault" not in caplog.text


def test_tokenizers_of_another_kind_are_left_alone(modern: Path, tmp_path: Path) -> None:
    for text in ('{"model": {"type": "Unigram"}}', '{"model": 3}', "{}", '{"model": {"type": "BPE", "vocab": 3}}'):
        (modern / "tokenizer" / "tokenizer.json").write_text(text)
        out = unet_surgery.prune("bk_tiny", modern, tmp_path / "out", normalize=True).folder
        assert folder_bytes(out / "tokenizer") == folder_bytes(modern / "tokenizer")
        shutil.rmtree(out)


def test_an_unknown_prefixless_encoder_is_left_alone(modern: Path, tmp_path: Path) -> None:
    path = modern / "text_encoder" / "model.safetensors"
    save_file({"something.else": np.zeros(3, np.float32)}, path, metadata={"format": "pt"})
    out = unet_surgery.prune("bk_tiny", modern, tmp_path / "out", normalize=True).folder
    assert (out / "text_encoder" / "model.safetensors").read_bytes() == path.read_bytes()
