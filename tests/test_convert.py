"""Pickles become safetensors in a process of their own: values stay, no code runs, nothing half-written is left."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import CONFIGS
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from teachers import entries
from test_cli import tool

import unet_surgery
from unet_surgery.errors import MissingExtraError, OutputError, SurgeryError, TeacherError
from unet_surgery.runtime import convert_child
from unet_surgery.runtime.convert import ConvertResult, convert, default_output

parent = sys.modules["unet_surgery.runtime.convert"]  # whose name in the package is the function's

PLAIN = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a.weight": torch.arange(4).half(),
    "step": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "brain": torch.ones(3, dtype=torch.bfloat16),
    "eight": torch.ones(5).to(torch.float8_e4m3fn),
    "empty": torch.ones(0, 3),
    "complex": torch.ones(2, dtype=torch.complex64),
}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open pickles here, as the other process does: starting one takes seconds, and what it finds is the same."""

    def run(source: Path, fd: int) -> dict[str, Any]:
        with _quiet():  # as the other process is
            return parent._accept(convert_child.attempt(str(source), fd, source.stat().st_size), source)

    monkeypatch.setattr(parent, "_run", run)


def converted(content: object, folder: Path, **save: Any) -> tuple[ConvertResult, dict[str, torch.Tensor]]:
    torch.save(content, folder / "x.pt", **save)
    result = convert(folder / "x.pt")
    assert entries(folder) == ["x.pt", "x.safetensors"]
    return result, load_file(result.file)


@pytest.mark.parametrize("save", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "before torch 1.6"])
def test_bytes_are_those_that_safetensors_writes(save: dict[str, Any], tmp_path: Path) -> None:
    content = {n: t for n, t in PLAIN.items() if not save or n != "eight"}  # which is younger than that format
    result, _ = converted(content, tmp_path, **save)
    save_file(content, tmp_path / "reference.safetensors", metadata={"format": "pt"})
    assert result.file.read_bytes() == (tmp_path / "reference.safetensors").read_bytes()
    assert (result.num_tensors, result.num_dropped, result.num_shared, result.wrapper) == (len(content), 0, 0, None)


W = torch.ones(2)
WRAPPED: dict[str, tuple[object, str, list[str]]] = {
    "state_dict": ({"state_dict": {"a": W}, "global_step": 3, "epoch": 1}, "state_dict", ["global_step", "epoch"]),
    "state_dict before the others": (
        {"ema": {"a": W + 1}, "state_dict": OrderedDict(a=W), "optimizer": {"state": {0: W}}},
        "state_dict",
        ["ema", "optimizer"],
    ),
    "model": ({"model": {"a": W, "n": 3}, "iteration": torch.tensor(5)}, "model", ["iteration", "model.n"]),
    "module": ({"module": {"a": W}}, "module", []),
    "ema": ({"ema": {"a": W}, "model": {"lr": 0.1}}, "ema", ["model"]),
    "two deep": ({"model": {"state_dict": {"a": W}, "x": None}}, "model.state_dict", ["model.x"]),
    "none": ({"a": W, 5: W, "config": {"x": 1}}, "", ["5", "config"]),
    "a parameter": ({"a": torch.nn.Parameter(W)}, "", []),
}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("case", sorted(WRAPPED))
def test_state_dicts_are_found(case: str, tmp_path: Path) -> None:
    content, wrapper, dropped = WRAPPED[case]
    result, tensors = converted(content, tmp_path)
    assert (result.wrapper or "", list(result.dropped)) == (wrapper, dropped)
    assert tensors.keys() == {"a"}
    assert torch.equal(tensors["a"], W)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("deflated", ["all", "one"])
def test_a_compressed_archive_holds_the_same_numbers(deflated: str, tmp_path: Path) -> None:
    """torch maps such a file all the same, and takes the compressed bytes for the numbers."""
    state = {f"w{i}": torch.randn(64, 64) for i in range(4)} | {"zeros": torch.zeros(200, 200)}
    torch.save(state, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "x.pt", "w") as packed:
        for record in plain.infolist():
            small = deflated == "all" or record.filename.endswith("data/1")
            kind = zipfile.ZIP_DEFLATED if small else zipfile.ZIP_STORED
            packed.writestr(record.filename, plain.read(record), compress_type=kind)
    found = load_file(convert(tmp_path / "x.pt").file)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_bomb_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(40_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record), compress_type=zipfile.ZIP_DEFLATED)
    (tmp_path / "plain.pt").unlink()
    with pytest.raises(TeacherError, match="implausibly larger"):
        convert(tmp_path / "x.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_shared_and_strided_tensors_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    content = {"a": base, "b": base, "c": base.T, "d": base[1], "e": torch.arange(3.0)[::2], "f": base[:1].expand(3, 4)}
    result, tensors = converted(content, tmp_path)
    assert result.shared == ("b", "c", "d", "f")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in content.items())


def test_a_unet_that_diffusers_loads(tmp_path: Path) -> None:
    """diffusers' own .bin in its folder: the default output has the name that diffusers looks for."""
    unet = UNet2DConditionModel.from_config(CONFIGS["sd1"])
    unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    file = tmp_path / "unet" / "diffusion_pytorch_model.bin"
    with pytest.raises(TeacherError, match=f"unet-surgery convert {file} makes safetensors of it"):
        unet_surgery.prune("bk_tiny", tmp_path / "unet", tmp_path / "student")
    result = convert(file)
    file.unlink()
    assert result.file.name == "diffusion_pytorch_model.safetensors"
    loaded = unet_surgery.load_unet(tmp_path / "unet").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in unet.state_dict().items())
    unet_surgery.prune("bk_tiny", tmp_path / "unet", tmp_path / "student")


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.fp16.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
        ("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"),
        ("v1-5.pruned.ckpt", "v1-5.pruned.safetensors"),
        ("weights", "weights.safetensors"),
    ],
)
def test_default_names(name: str, output: str) -> None:
    assert default_output(Path("some") / name) == Path("some") / output


# --- refused ---------------------------------------------------------------------------------------------------------


class Payload:
    """What runs when it is unpickled: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


class Training:
    """A class of somebody's trainer."""


@pytest.mark.parametrize("form", ["zip", pytest.param("old", marks=pytest.mark.extra), "plain"])
def test_code_is_named_and_not_run(form: str, tmp_path: Path) -> None:
    content = {"x": Payload(tmp_path / "hit")} if form == "plain" else {"a": W, "x": Payload(tmp_path / "hit")}
    if form == "plain":
        (tmp_path / "x.ckpt").write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(TeacherError, match=r"asks for code to be run, which is never done(?s:.*)posix\.system"):
        convert(tmp_path / "x.ckpt")
    assert entries(tmp_path) == ["x.ckpt"]
    torch.load(tmp_path / "x.ckpt", weights_only=False) if form != "plain" else pickle.loads(
        (tmp_path / "x.ckpt").read_bytes()
    )
    assert (tmp_path / "hit").exists()  # so there was something to run


def torch_file(content: object) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def data(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def cut(path: Path) -> None:
    torch.save({"a": torch.ones(5000)}, path)
    path.write_bytes(path.read_bytes()[:-2000])


def cut_old(path: Path) -> None:
    torch.save({"a": torch.ones(5000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-2000])


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())


def script(path: Path) -> None:
    with _quiet():
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def _quiet() -> Any:
    import warnings

    return warnings.catch_warnings(action="ignore")


def quantised(path: Path) -> None:
    with _quiet():
        torch.save({"q": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, path)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a class": (torch_file({"a": W, "t": Training()}), r"asks for code.*test_convert\.Training"),
    "a zip cut short": (cut, "cut short, damaged"),
    "an old one cut short": (cut_old, "cut short, damaged"),
    "a tar": (tar, "a tar archive"),
    "an HTML page": (data(b"<!DOCTYPE html><html>no such model</html>"), "an HTML or XML page"),
    "an LFS pointer": (data(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "LFS pointer"),
    "a safetensors file": (lambda path: save_file({"a": W}, path), "a safetensors file already.*nothing to convert"),
    "GGUF": (data(b"GGUF" + bytes(99)), "a GGUF file"),
    "noise": (data(bytes(range(99))), "bytes that begin with"),
    "nothing in it": (data(b""), "an empty file"),
    "a plain pickle": (data(pickle.dumps({"a": 1}, 5)), "no checkpoint that torch can open"),
    "a program": (script, "a TorchScript program"),
    "quantised": (quantised, "cannot be stored.*tensor q.*quantised"),
    "sparse": (torch_file({"s": torch.eye(3).to_sparse()}), "cannot be stored.*tensor s.*not dense"),
    "meta": (torch_file({"m": torch.ones(2, device="meta")}), "cannot be stored.*tensor m.*without data"),
    "complex128": (torch_file({"c": torch.ones(2, dtype=torch.complex128)}), "tensor c.*complex128"),
    "a bad name": (torch_file({"a\x1b[31m": W}), "a name that safetensors cannot hold"),
    "a tensor alone": (torch_file(W), "no named tensors.*Tensor"),
    "no tensors": (torch_file({"lr": 1, "betas": [1]}), "no named tensors.*lr, betas"),
    "two sets": (torch_file({"model": {"a": W}, "ema": {"a": W}}), "several sets of tensors.*model, ema"),
    "a set and tensors": (torch_file({"model": {"a": W}, "b": W}), "several sets of tensors.*model, b"),
    "a bomb": (torch_file({"a": torch.ones(1).expand(1 << 40)}), "implausibly larger than the file"),
}  # fmt: skip


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    make(tmp_path / "x.ckpt")
    with pytest.raises(TeacherError, match=f"(?s){message}") as caught:
        convert(tmp_path / "x.ckpt")
    assert str(tmp_path / "x.ckpt") in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert entries(tmp_path) == ["x.ckpt"]


def test_a_sharded_checkpoint_is_explained_and_the_way_works(tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_config(CONFIGS["two-levels"])
    unet.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="200KB")
    index = tmp_path / "diffusion_pytorch_model.bin.index.json"
    with pytest.raises(TeacherError, match="the index of a sharded checkpoint") as caught:
        convert(index)
    shards = list(tmp_path.glob("*.bin"))
    assert len(shards) > 1
    for shard in shards:
        convert(shard)
        shard.unlink()
    command = (caught.value.hint or "").partition("then: ")[2]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    index.unlink()
    loaded = unet_surgery.load_unet(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in unet.state_dict().items())
    pytorch = tmp_path / "pytorch_model.bin.index.json"
    pytorch.write_text('{"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}')
    with pytest.raises(TeacherError) as caught:
        convert(pytorch)
    subprocess.run((caught.value.hint or "").partition("then: ")[2], shell=True, cwd=tmp_path, check=True)
    assert "model-00001-of-00001.safetensors" in (tmp_path / "model.safetensors.index.json").read_text()
    assert "pytorch_model" not in (tmp_path / "model.safetensors.index.json").read_text()


@pytest.mark.parametrize(
    ("file", "out", "force", "error", "message"),
    [
        ("nothing.pt", None, False, TeacherError, "no such file"),
        (".", None, False, TeacherError, "this is a folder"),
        ("fifo", None, False, TeacherError, "not a regular file"),
        ("x.pt", "x.pt", True, OutputError, "the output is the input"),
        ("x.pt", "there", False, OutputError, "the output exists"),
        ("x.pt", "folder", True, OutputError, "the output is a folder"),
        ("x.pt", "no/out", False, OutputError, "does not exist"),
    ],
    ids=["no file", "a folder", "a FIFO", "onto itself", "exists", "a folder's place", "no folder"],
)
def test_wrong_arguments(
    file: str, out: str | None, force: bool, error: type[SurgeryError], message: str, tmp_path: Path
) -> None:
    torch.save({"a": W}, tmp_path / "x.pt")
    (tmp_path / "there").write_text("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    before = entries(tmp_path)
    with pytest.raises(error, match=message):
        convert(tmp_path / file, None if out is None else tmp_path / out, force=force)
    assert entries(tmp_path) == before
    assert (tmp_path / "there").read_text() == "mine"


# --- the other process -----------------------------------------------------------------------------------------------


def replaced_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run ``code`` in place of the module that opens the pickle, with its arguments and its environment."""
    real = subprocess.Popen

    def start(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return real(
            [words[0], "-c", f"import os, sys, time\nsource, fd = sys.argv[1], int(sys.argv[2])\n{code}", *words[-3:]],
            **options,
        )

    monkeypatch.setattr(subprocess, "Popen", start)


def test_it_has_nothing_of_the_users_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "HOME", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "hf_secret")
    torch.save({"a": W}, tmp_path / "x.pt")
    listing = tmp_path / "environment"
    replaced_child(monkeypatch, f"open({str(listing)!r}, 'w').write(repr(dict(os.environ)) + os.getcwd())")
    with pytest.raises(SurgeryError, match="did not finish"):
        convert(tmp_path / "x.pt")
    text = listing.read_text()
    assert "hf_secret" not in text
    assert "PYTHONPATH" in text
    assert text.endswith("}/")


def test_a_module_in_the_working_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": W}, tmp_path / "x.pt")
    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'hit')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    convert("x.pt")
    assert entries(tmp_path) == ["torch.py", "x.pt", "x.safetensors"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("os.write(fd, b'half'); os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("os.write(fd, b'half'); sys.exit(3)", "exit status 3"),
        ("os.write(fd, b'half'); os.write(1, b'{')", "exit status 0"),
        ("os.write(fd, b'half'); raise ValueError('broken')", "ValueError: broken"),
    ],
    ids=["killed", "exit", "half a report", "a traceback"],
)
def test_a_dead_child_leaves_nothing(code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": W}, tmp_path / "x.pt")
    (tmp_path / "x.safetensors").write_text("the old one")
    replaced_child(monkeypatch, code)
    with pytest.raises(SurgeryError, match=message) as caught:
        convert(tmp_path / "x.pt", force=True)
    assert caught.value.exit_code == 1
    assert entries(tmp_path) == ["x.pt", "x.safetensors"]
    assert (tmp_path / "x.safetensors").read_text() == "the old one"


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.extra), signal.SIGKILL],
    ids=lambda n: n.name,
)
def test_signals_leave_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """The real command, stopped while its child reads a FIFO in the place of what it imports: slow as a disk can be."""
    torch.save({"a": W}, tmp_path / "x.pt")
    package = tmp_path / "slow"
    package.mkdir()
    (package / "torch.py").write_text(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))\n"
                                      "__import__('time').sleep(60)\n")  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "unet_surgery", "convert", "x.pt"]
    parent = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    pid = wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    parent.send_signal(number)
    parent.communicate(timeout=30)
    assert parent.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not alive(int(pid)))
    left = [".x.safetensors.unet-surgery"] if number == signal.SIGKILL else []
    assert entries(tmp_path) == [*left, "pid", "slow", "x.pt"]
    convert(tmp_path / "x.pt")  # and what a kill left is no obstacle
    assert not (tmp_path / ".x.safetensors.unet-surgery").exists()


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": W}, tmp_path / "x.pt")
    report = json.dumps({"error": {"kind": "disk", "what": "No space left on device", "errno": 28}})
    replaced_child(monkeypatch, f"os.write(fd, b'half'); os.write(1, {report.encode()!r})")
    with pytest.raises(OutputError, match=r"(?s)cannot be written.*No space left"):
        convert(tmp_path / "x.pt")
    assert entries(tmp_path) == ["x.pt"]


def test_a_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": W}, tmp_path / "x.pt")
    replaced_child(monkeypatch, "os.utime(source, (1, 1)); os.write(1, b'{}')")
    with pytest.raises(TeacherError, match="changed while it was read"):
        convert(tmp_path / "x.pt")
    assert entries(tmp_path) == ["x.pt"]


def test_a_torch_that_is_missing_or_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": W}, tmp_path / "x.pt")
    package = tmp_path / "fake"
    package.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]))
    for code, message in (
        ("raise ImportError('no torch here')", r"(?s)does not import.*no torch here.*unet-surgery doctor"),
        ("__version__ = '2.5.1'", r"(?s)cannot open a pickle safely.*2\.6 or newer.*2\.5\.1"),
    ):
        (package / "torch.py").write_text(code)
        with pytest.raises(MissingExtraError, match=message):
            convert(tmp_path / "x.pt")
    shutil.rmtree(package)
    assert entries(tmp_path) == ["x.pt"]


def test_every_dtype_that_safetensors_has() -> None:
    from unet_surgery.checkpoint.header import DTYPE_BITS

    for name, code in convert_child._DTYPES.items():
        assert getattr(torch, name).itemsize * 8 == DTYPE_BITS[code], name
    assert len(convert_child._DTYPES) == 18


def test_command_line(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": W, "b": W}, "global_step": 1, "lr": 0.1}, tmp_path / "x.ckpt")
    out, err = tool("convert", "x.ckpt", cwd=tmp_path)
    assert out == "x.safetensors\n"
    assert "2 tensors, 0.0 MB, found behind state_dict\n" in err
    assert "left out 2 that are no tensors of it: global_step, lr\n" in err
    assert "1 shared memory with another and are written by themselves: b\n" in err
    tool("convert", "x.ckpt", cwd=tmp_path, code=4)
    assert tool("convert", "x.ckpt", "--force", "-q", cwd=tmp_path) == ("x.safetensors\n", "")
    _, err = tool("inspect", "x.ckpt", cwd=tmp_path, code=3)
    assert "unet-surgery convert x.ckpt makes safetensors of it" in err
