"""What tests share: configs of every shape the engine must serve, and teachers on disk with random weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from configs import CONFIGS
from hypothesis import HealthCheck, settings
from teachers import write_unet

# The same examples every time, so that a red run is red again; make test-extra draws new ones.
settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("extra", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# No test may reach the network or the user's own caches, whatever the machine's settings are.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    os.environ["UNET_SURGERY_CACHE"] = str(cache / "unet-surgery")
    os.environ["HF_HOME"] = str(cache / "hf")
    warm.of_the_session(os.environ)


@pytest.fixture(autouse=True)
def _environment(_own_caches: None) -> Iterator[None]:
    """Nothing that a test, or a library in it, sets outlives it: the next one's commands would not run in warm.py's."""
    before = dict(os.environ)
    yield
    for name in (before.keys() | os.environ.keys()) - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The whole small pipeline of ``--teacher tiny-random``."""
    from unet_surgery.hub import fetch_teacher, resolve_teacher

    return fetch_teacher(resolve_teacher("tiny-random"), progress=lambda done, total: None).folder


@pytest.fixture(scope="session")
def unet_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A U-Net folder with random weights for every small config."""
    root = tmp_path_factory.mktemp("unets")
    return {name: write_unet(root / name, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pruned student, pictures and their latent cache: for reading only."""
    from training import make_places

    return make_places(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small networks are slower with more; and the last bits depend on how many there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
