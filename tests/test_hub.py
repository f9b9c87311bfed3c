"""Teachers from the Hub: the real client against a stand-in on loopback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from hub_server import HubStandIn, client_env
from safetensors.numpy import load_file, save_file
from teachers import WEIGHTS, entries, folder_bytes
from test_cli import tool

REPOSITORY = "org/tiny"


@pytest.fixture
def repository(tiny: Path, tmp_path: Path) -> Path:
    """The tiny pipeline as people push it: beside what is needed, much that is not."""
    folder = tmp_path / "repository"
    shutil.copytree(tiny, folder)
    (folder / "v1-5-pruned.ckpt").write_bytes(b"not needed")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"not needed")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not needed")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not needed")
    return folder


@pytest.fixture
def hub(repository: Path) -> HubStandIn:
    hub = HubStandIn()
    hub.add(REPOSITORY, repository)
    return hub


OFFLINE = "http://127.0.0.1:9"
FIRST_BYTES = 128 << 10


def downloads(hub: HubStandIn) -> list[str]:
    """Return the name of every file whose bytes were fetched, by the Hub itself or by its store of large files."""
    small = [record.path.split("/", 5)[-1] for record in hub.seen("GET", "hub", "/resolve/")]
    return small + [parse_qs(record.query)["name"][0] for record in hub.seen("GET", "cdn")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET_SURGERY_CACHE", str(tmp_path / "cache"))


def test_plan_fetches_configs_and_the_header(hub: HubStandIn, tmp_path: Path) -> None:
    with hub.serve() as endpoint:
        env = client_env(endpoint, tmp_path / "hf")
        out, _ = tool("plan", "-r", "bk_tiny", "-t", REPOSITORY, "--json", cwd=tmp_path, env=env)
    teacher = json.loads(out)["teacher"]
    assert teacher["id"] == REPOSITORY
    assert teacher["commit"] == hub.repositories[REPOSITORY].history()[0].oid
    assert teacher["weights"]["dtypes"] == {"F32": 686}
    assert set(downloads(hub)) == {"model_index.json", "unet/config.json", f"unet/{WEIGHTS}"}
    assert sum(record.body_bytes for record in hub.seen("GET", "cdn")) <= 2 * FIRST_BYTES


def test_prune_fetches_what_it_needs_once(hub: HubStandIn, tiny: Path, tmp_path: Path) -> None:
    command = ["prune", "-r", "bk_tiny", "-t", f"{REPOSITORY}@main", "-q"]
    with hub.serve() as endpoint:
        env = client_env(endpoint, tmp_path / "hf")
        assert tool(*command, cwd=tmp_path, env=env)[0] == "tiny-bk_tiny\n"
        fetched = downloads(hub)
        assert f"unet/{WEIGHTS}" in fetched
        others = [name for name in fetched if name != f"unet/{WEIGHTS}"]  # which comes in ranges
        assert len(set(others)) == len(others)
        asked = [record.path + record.query for record in hub.requests]
        assert not [text for text in asked for name in (".bin", ".ckpt", "fp16", "v1-5") if name in text]
        tool(*command, "-o", "again", cwd=tmp_path, env=env)
        assert downloads(hub) == fetched
    # and with the Hub gone, from the cache
    _, err = tool(*command, "-o", "offline", cwd=tmp_path, env=client_env(OFFLINE, tmp_path / "hf"))
    assert "using the cached copy" in err
    students = [folder_bytes(tmp_path / name) for name in ("tiny-bk_tiny", "again", "offline")]
    assert students[0] == students[1] == students[2]
    tool("check", "tiny-bk_tiny", "-t", str(tiny), cwd=tmp_path)
    assert f"base_model: {REPOSITORY}" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ("org/nothing", "no such model"),
        ("org/gated", "gated"),
        ("org/tiny@nowhere", "no such revision"),
    ],
)
def test_refusals_are_told_apart(hub: HubStandIn, repository: Path, tmp_path: Path, teacher: str, says: str) -> None:
    hub.add("org/gated", repository, gated=True)
    with hub.serve() as endpoint:
        env = client_env(endpoint, tmp_path / "hf")
        _, err = tool("prune", "-r", "bk_tiny", "-t", teacher, cwd=tmp_path, code=5, env=env)
    assert says in err
    assert teacher.partition("@")[0] in err
    assert not [name for name in entries(tmp_path) if "bk_tiny" in name]


def test_the_cache_decides_nothing(repository: Path, tmp_path: Path) -> None:
    """After a fp16 prune the cache holds fp16 weights only; a plan or prune without a variant must not take them."""
    half = {name: tensor.astype("float16") for name, tensor in load_file(repository / "unet" / WEIGHTS).items()}
    save_file(half, repository / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    hub = HubStandIn()
    hub.add(REPOSITORY, repository)
    with hub.serve() as endpoint:
        env = client_env(endpoint, tmp_path / "hf")
        half_command = ["prune", "-r", "bk_tiny", "-t", REPOSITORY, "--variant", "fp16", "--unet-only", "-o", "half"]
        tool(*half_command, cwd=tmp_path, env=env)
    offline = client_env(OFFLINE, tmp_path / "hf")
    _, err = tool("prune", "-r", "bk_tiny", "-t", REPOSITORY, "--unet-only", cwd=tmp_path, code=5, env=offline)
    assert "its cache lacks these weights" in err
    assert "--variant fp16" in err
    tool(*half_command[:-1], "again", cwd=tmp_path, env=offline)
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "half")
    with hub.serve() as endpoint:
        env = client_env(endpoint, tmp_path / "hf")
        plan = json.loads(tool("plan", "-r", "bk_tiny", "-t", REPOSITORY, "--json", cwd=tmp_path, env=env)[0])
        assert plan["teacher"]["weights"]["dtypes"] == {"F32": 686}
        tool("prune", "-r", "bk_tiny", "-t", REPOSITORY, "--unet-only", "-o", "plain", cwd=tmp_path, env=env)
    stored = json.loads((tmp_path / "plain" / "plan.json").read_text())["teacher"]["weights"]["dtypes"]
    assert stored == {"F32": 686}


def test_an_unreachable_hub(tmp_path: Path) -> None:
    env = client_env(OFFLINE, tmp_path / "hf")
    _, err = tool("prune", "-r", "bk_tiny", cwd=tmp_path, code=5, env=env)
    assert "CompVis/stable-diffusion-v1-4" in err
    assert "built-in teacher such as sd-v1-random" in err
