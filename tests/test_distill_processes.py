"""The same run on one process or two, by accumulation, DDP or FSDP2, through the real launcher: the same to rounding.

What equality means: losses of 20 steps to 1e-5, the first gradient's norm to 1e-5, weights to a tenth of the rate (Adam
turns rounding into a step of the rate where a gradient is nearly 0).
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training import environment, metrics, run_data, write_run

from unet_surgery.distill import RunConfig, distill
from unet_surgery.distill.state import load_state, state_folders
from unet_surgery.distill.world import join_world
from unet_surgery.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 20
LR = 5e-5
ENGINES = {"ddp": ["--multi_gpu"], "fsdp2": ["--use_fsdp", "--fsdp_version", "2"]}


def steady(out: Path, places: dict[str, Path], **changes: Any) -> dict[str, Any]:
    data = run_data(out, places["student"], {"cache": str(places["cache"])}, steps=STEPS)
    return {**data, "optimizer": {"lr": LR}, "save": {"every": 10}, "objectives": OBJECTIVES, **changes}


OBJECTIVES = {"feature_kd": {"normalise": "teacher_power"}}


@pytest.fixture(scope="module")
def alone(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run on one process, the whole batch at once."""
    out = tmp_path_factory.mktemp("alone") / "run"
    distill(RunConfig.from_data(steady(out, places)))
    return out


def launch(engine: str, run: Path, **more: str) -> None:
    """Start the run on two processes with ``accelerate launch``, as a user does, on the CPU with gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "accelerate.commands.launch", *ENGINES[engine], "--num_processes", "2", "--num_machines", "1"]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    words += ["-m", "unet_surgery.distill", str(run), "-q"]
    done = subprocess.run(
        [sys.executable, *words],
        env=environment(ACCELERATE_USE_CPU="true", **more),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def assert_equal_to_rounding(ours: Path, theirs: Path) -> None:
    lines = metrics(ours)
    assert len(lines) == STEPS
    for line, other in zip(lines, metrics(theirs), strict=True):
        assert line.pop("stage") == other.pop("stage")
        assert line == pytest.approx(other, rel=1e-5), line["step"]
    a, b = (load_state(state_folders(run)[-1]).tensors for run in (ours, theirs))
    assert a.keys() == b.keys()
    for name, tensor in a["weights"].items():
        # each of 20 steps may turn rounding into a tenth of the rate
        torch.testing.assert_close(tensor, b["weights"][name], rtol=0, atol=0.1 * LR * STEPS)


def num_processes(run: Path) -> int:
    """Return how many processes wrote the last checkpoint: a launcher may start fewer than it was told to."""
    return int(load_state(state_folders(run)[-1]).facts["processes"])


def test_accumulation(alone: Path, places: dict[str, Path], tmp_path: Path) -> None:
    distill(RunConfig.from_data(steady(tmp_path / "run", places, micro_batch=1)))
    assert_equal_to_rounding(tmp_path / "run", alone)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes(alone: Path, places: dict[str, Path], tmp_path: Path, engine: str) -> None:
    launch(engine, write_run(tmp_path / "run.yaml", steady(tmp_path / "run", places, micro_batch=1)))
    assert num_processes(tmp_path / "run") == 2
    assert_equal_to_rounding(tmp_path / "run", alone)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "run" / "student" / weights).stat().st_size == (alone / "student" / weights).stat().st_size


@pytest.mark.extra
@pytest.mark.parametrize("engine", ENGINES)
def test_half_on_two_processes_half_on_one(alone: Path, places: dict[str, Path], tmp_path: Path, engine: str) -> None:
    """A checkpoint of two processes is one of one process: the run goes on with the same data and noise."""
    out = tmp_path / "run"
    launch(engine, write_run(tmp_path / "run.yaml", steady(out, places, steps=STEPS // 2)))
    assert num_processes(out) == 2
    distill(RunConfig.from_data(steady(out, places)))
    assert_equal_to_rounding(out, alone)


@pytest.mark.extra
@pytest.mark.parametrize("engine", ENGINES)
def test_short_weights_on_two_processes(places: dict[str, Path], tmp_path: Path, engine: str) -> None:
    """bf16 as it is by default, with accumulation: gradients are summed in fp32, and meet so."""
    data = steady(tmp_path / "one", places, steps=3, speed={"dtype": "bf16"}, micro_batch=1)
    distill(RunConfig.from_data(data))
    launch(engine, write_run(tmp_path / "run.yaml", {**data, "output": str(tmp_path / "two")}))
    assert num_processes(tmp_path / "two") == 2
    for line, other in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2)


@pytest.mark.extra
@pytest.mark.parametrize("engine", ENGINES)
def test_steps_on_two_processes(places: dict[str, Path], tmp_path: Path, engine: str) -> None:
    """Guided steps and plain ones: all processes take the same kind, and the same guidance for a sample."""
    terms = {"task": 0, "output_kd": 0, "feature_kd": 0, "step_kd": {"weight": 1.0, "guided": 0.5}}
    data = steady(tmp_path / "one", places, steps=3, objectives=terms, micro_batch=1, seed=16)
    distill(RunConfig.from_data(data))
    launch(engine, write_run(tmp_path / "run.yaml", {**data, "output": str(tmp_path / "two")}))
    assert num_processes(tmp_path / "two") == 2
    lines = metrics(tmp_path / "two")
    assert len(lines) == 3
    for line, other in zip(lines, metrics(tmp_path / "one"), strict=True):
        assert line.pop("stage") == other.pop("stage")
        assert line == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1"),
    ],
    ids=["deepspeed", "megatron", "fsdp1"],
)
def test_other_engines_are_refused_by_name(variables: dict[str, str], name: str) -> None:
    with pytest.raises(UsageError, match=name):
        join_world({"WORLD_SIZE": "2", "RANK": "0", **variables})
