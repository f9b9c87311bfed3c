"""``doctor``: what works, what is broken and by what name, and what to install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from unet_surgery import doctor
from unet_surgery.version import __version__

TRAP = "raise RuntimeError('operator torchvision::nms does not exist')\n"


def install(folder: Path, name: str, version: str, code: str) -> None:
    """Put a distribution on a path, as pip would."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def run(path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(path or ""), **environment}
    return subprocess.run(
        [sys.executable, "-m", "unet_surgery", "doctor", "--json"], capture_output=True, text=True, env=env, timeout=200
    )


@pytest.fixture
def wants(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requirements of a small package, to be filled."""
    requirements: list[str] = []
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    return requirements


def test_this_installation_is_healthy() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["version"] == __version__
    assert found["problems"] == []
    packages = {p["name"]: p for p in found["packages"]}
    assert {"numpy", "pyyaml", "torch", "diffusers", "transformers"} <= packages.keys()
    assert "pytest" not in packages
    assert packages["torch"]["extra"] == "torch"
    assert packages["numpy"]["extra"] is None
    here = [p for p in packages.values() if p["extra"] != "demo"]  # which has an environment of its own
    assert all(p["version"] and p["error"] is None and p["seconds"] is not None for p in here)
    assert found["devices"]
    assert [place["writable"] for place in found["places"]] == [True, True, True]


def test_the_torchvision_trap_has_a_name(tmp_path: Path) -> None:
    install(tmp_path, "torchvision", "0.20.1", TRAP)
    done = run(tmp_path)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert len([p for p in found["problems"] if p.startswith("torchvision 0.20.1 does not work beside torch")]) == 1
    assert "pip uninstall torchvision" in found["problems"][0]
    assert "operator torchvision::nms does not exist" in found["problems"][0]


def test_a_package_that_ends_the_process_is_one_line(
    tmp_path: Path, wants: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "crasher", "1.0", "import os\nos.kill(os.getpid(), 11)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wants += ["numpy>=1", "crasher", "pyyaml>=6"]
    found = doctor.diagnose()
    states = {p.name: p.error for p in found.packages}
    assert states == {"numpy": None, "pyyaml": None, "crasher": "importing it ended the process, or took minutes"}
    assert found.problems == ("crasher 1.0 does not work: importing it ended the process, or took minutes",)


def test_errors_and_noise_of_packages_are_escaped(
    tmp_path: Path, wants: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "noisy", "1.0", "print('hello @ [')\nraise OSError('\\x1b[2J broken\\nsecond line')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wants += ["noisy"]
    (problem,) = doctor.diagnose().problems
    assert problem == "noisy 1.0 does not work: OSError: \\u001b[2J broken"


def test_what_is_missing_is_named_with_its_extra(wants: list[str]) -> None:
    wants += ["numpy>=1", "absent-one>=2", 'absent-two; extra == "png"', 'absent-three>=1; extra == "dev"']
    found = doctor.diagnose()
    assert found.problems == ("absent-one is not installed: pip install 'unet-surgery'",)
    assert "the extra png (draw --out picture.png) lacks absent-two: pip install 'unet-surgery[png]'" in found.advice
    assert "absent-three" not in str(found)


def test_a_version_that_is_too_old(wants: list[str]) -> None:
    wants += ["numpy>=999"]
    (problem,) = doctor.diagnose().problems
    assert problem.startswith("numpy ")
    assert "is not >=999" in problem


def test_a_cache_that_cannot_be_made(wants: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNET_SURGERY_CACHE", str(tmp_path / "file" / "below"))
    (problem,) = doctor.diagnose().problems
    assert "cannot be written (built-in teachers" in problem


def test_nothing_in_the_current_folder_is_imported(
    wants: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A downloaded model may hold a torch.py."""
    for name in ("json", "numpy", "warnings"):
        (tmp_path / f"{name}.py").write_text("open('canary', 'w')\n")
    monkeypatch.chdir(tmp_path)
    wants += ["numpy>=1"]
    assert doctor.diagnose().problems == ()
    assert not (tmp_path / "canary").exists()


def test_a_password_in_the_endpoint_is_not_shown(wants: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://me:s3cret@hub.example")
    assert doctor.diagnose().hub["endpoint"] == "hub.example"
