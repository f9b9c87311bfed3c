"""A token in the environment, and one in the login file, is in nothing that any command prints or writes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from configs import CONFIGS
from hub_faults import ALWAYS, Fault
from hub_server import HubStandIn, client_env
from teachers import write_unet
from warm import Warm

import unet_surgery

TOKEN = "hf_" + "PlantedByATestXyZ0123456789AbCdEf"
LOGIN = "hf_" + "OfTheLoginFileXyZ0123456789AbCdEf"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(LOGIN)
    return {**os.environ, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "UNET_SURGERY_CACHE": str(tmp_path / "cache")}


COMMANDS: list[tuple[list[str], int]] = [
    (["--version"], 0),
    (["inspect", "teacher"], 0),
    (["inspect", "teacher", "--json"], 0),
    (["plan", "-r", "bk_tiny", "-t", "teacher"], 0),
    (["plan", "-r", "bk_tiny", "-t", "teacher", "--json"], 0),
    (["draw", "-r", "bk_tiny", "-t", "teacher", "-o", "picture.svg"], 0),
    (["prune", "-r", "bk_tiny", "-t", "teacher", "-o", "out"], 0),
    (["prune", "-r", "bk_tiny", "-t", "tiny-random", "-o", "whole", "--normalize"], 0),
    (["check", "out", "-t", "teacher"], 0),
    (["verify", "out"], 0),
    (["push", "whole", "me/model", "--dry-run"], 0),
    (["--debug", "push", "whole", "me/model"], 5),
    (["controlnet", "out", "-o", "control"], 0),
    (["transplant", "nothing", "--plan", "out"], 3),
    (["convert", "nothing"], 3),
    (["cache", "nothing", "-m", "tiny-random", "-o", "latents"], 3),
    (["generate", "teacher", "-p", "a circle", "-o", "pictures"], 2),
    (["score", "nothing"], 2),
    (["bench", "nothing"], 3),
    (["bench", "teacher", "--no-run", "--json"], 0),
    (["score", "nothing", "-m", "is"], 3),
    (["stats", "nothing", "-o", "stats.npz"], 3),
    (["demo", "nothing", "--port", "0"], 3 if importlib.util.find_spec("gradio") else 1),
    (["report", "out", "-o", "report.html"], 0),
    (["data", "ls"], 0),
    (["data", "get", "hpsv2", "--base-url", "http://127.0.0.1:9/"], 5),
    (["--debug", "data", "get", "hpsv2", "-o", "prompts", "--base-url", "http://127.0.0.1:9/"], 5),
    (["recipes"], 0),
    (["recipes", "show", "bk_tiny"], 0),
    (["recipes", "copy", "bk_tiny", "mine.yaml"], 0),
    (["recipes", "check", "mine.yaml"], 0),
    (["recipes", "diff", "bk_base", "bk_tiny"], 0),
    (["doctor", "--json"], 0),
    (["prune", "-r", "bk_tiny", "-t", "teacher", "-o", "out"], 4),
    (["prune", "-r", "nothing", "-t", "teacher", "-o", "new"], 2),
    (["check", "teacher"], 6),
    (["--debug", "inspect", "nobody"], 3),
]


def test_no_command_shows_or_stores_a_token(tmp_path: Path, environment: dict[str, str]) -> None:
    work = tmp_path / "work"
    work.mkdir()
    write_unet(work / "teacher", CONFIGS["sd1"])
    shown = ""
    with Warm(environment) as warm:
        for words, code in COMMANDS:
            done = warm.run(words, cwd=work)
            assert done.returncode == code, (words, done.stderr)
            shown += done.stdout + done.stderr
    assert "there is one" in shown  # doctor sees the token, so there is one to be shown
    assert_free(shown, work, tmp_path / "cache")


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_hub_that_repeats_the_token_is_not_quoted(tmp_path: Path, environment: dict[str, str], status: int) -> None:
    """The stand-in sends back, in the body and in its error header, whatever authorization it was given."""
    work = tmp_path / "work"
    work.mkdir()
    hub = HubStandIn(repeats_tokens=True)
    hub.faults.append(Fault("status", times=ALWAYS, parameter=status))
    with hub.serve() as endpoint:
        environment |= {**client_env(endpoint, tmp_path / "home"), "UNET_SURGERY_PATIENCE": "1"}
        for debug in ([], ["--debug"]):
            words = [*debug, "prune", "-r", "bk_tiny", "-t", "me/private", "-o", "out"]
            done = subprocess.run(
                [sys.executable, "-m", "unet_surgery", *words],
                cwd=work,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 5, done.stderr
            assert_free(done.stdout + done.stderr, work)
    assert any(TOKEN in (record.authorization or "") for record in hub.requests)  # it was sent where it belongs


STEPS = ["/api/repos/create", "/api/models/me/model", "/api/validate-yaml", "*/preupload/*", "*/objects/batch",
         "/objects/*", "*/commit/*"]  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unet_surgery.prune("bk_tiny", "tiny-random", tmp_path_factory.mktemp("student") / "student").folder


@pytest.mark.parametrize(
    ("step", "debug"),
    [*((step, "") for step in (None, *STEPS)), ("/api/validate-yaml", "--debug"), ("*/commit/*", "--debug")],
)
def test_a_push_to_a_hub_that_repeats_the_token(
    tmp_path: Path, environment: dict[str, str], student: Path, step: str | None, debug: str
) -> None:
    """Every step of a push is refused once, in the words of whoever wrote the token into the request."""
    hub = HubStandIn(repeats_tokens=True)
    hub.tokens[TOKEN] = "write"
    if step is not None:
        hub.faults.append(Fault("status", step, times=ALWAYS, parameter=400))
    with hub.serve() as endpoint:
        environment |= {**client_env(endpoint, tmp_path / "home"), "UNET_SURGERY_PATIENCE": "1"}
        words = [*debug.split(), "push", str(student), "me/model", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "unet_surgery", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == (0 if step is None else 5), done.stderr
    assert ("Traceback" in done.stderr) == bool(debug)
    assert_free(done.stdout + done.stderr)
    authorizations = {record.authorization for record in hub.requests if record.host == "hub"}
    assert authorizations == {f"Bearer {TOKEN}"}
    assert all(record.authorization is None for record in hub.seen(host="cdn"))


def assert_free(text: str, *folders: Path) -> None:
    num_files = 0
    for token in (TOKEN, LOGIN):
        assert token not in text
        for path in (p for folder in folders for p in folder.rglob("*") if p.is_file()):
            num_files += 1
            assert token.encode() not in path.read_bytes(), path
    assert num_files > 20 or len(folders) < 2
