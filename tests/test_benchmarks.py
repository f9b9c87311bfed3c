"""The benchmarks: what they compare is the same work, and what they print is what was measured."""

from __future__ import annotations

import json
import runpy
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))

import generation
from gradients import agreement
from our_loop import Choices, OurLoop
from plain_loop import Drawn, PlainLoop
from step_parts import Clock, Reads, breakdown, step_seconds
from training_sizes import Size, random_ids, random_pictures, size_named

from unet_surgery.data.batches import Batch
from unet_surgery.data.encode import encode_moments

CPU = torch.device("cpu")
FP32 = Choices(dtype="fp32", latents="pixels")
BATCH = 2


@pytest.fixture(scope="module", params=("tiny", "toy"))
def size(request: pytest.FixtureRequest) -> Size:
    """Predicts epsilon (tiny), and v with a last timestep of noise alone (toy)."""
    return size_named(request.param, "bk_base")


@pytest.fixture(scope="module")
def tiny() -> Size:
    return size_named("tiny", "bk_base")


def ours(size: Size, choices: Choices, batch: int = BATCH) -> OurLoop:
    return OurLoop(size, CPU, batch=batch, micro_batch=BATCH, choices=choices)


def plain(size: Size, dtype: str = "fp32", batch: int = BATCH) -> PlainLoop:
    return PlainLoop(size, CPU, batch=batch, micro_batch=BATCH, dtype=dtype)


def drawn(size: Size) -> Drawn:
    generator = torch.Generator().manual_seed(7)
    shape = (BATCH, *size.latent_shape)
    posterior, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return Drawn(posterior, noise, torch.tensor([3, 871]))


def our_batch(size: Size, images: torch.Tensor, chance: Drawn) -> Batch:
    places = (chance.timesteps_B + 0.5) / 1000
    uniforms = torch.stack([places, torch.ones(BATCH)], dim=1)
    ids, offset = random_ids(size, BATCH), torch.zeros(BATCH, size.latent_shape[0])
    return Batch(images, ids, chance.posterior_BCHW, chance.noise_BCHW, offset, uniforms)


def our_terms(loop: OurLoop, batch: Batch) -> tuple[list[float], torch.Tensor]:
    """Return task, output and summed feature term, and the whole gradient."""
    trainer: Any = loop.trainer
    terms = trainer._compute(batch, torch.ones_like(trainer._power.sums_P))
    terms.total.backward()
    values = terms.values_K
    grads = [p.grad.flatten() for p in trainer.weights.masters]
    return [float(values[0]), float(values[1]), float(values[2 : 2 + len(terms.power_P)].sum())], torch.cat(grads)


def test_both_loops_compute_the_same_terms_and_gradients(size: Size) -> None:
    chance, pictures = drawn(size), random_pictures(size, BATCH)
    reference, trained = plain(size), ours(size, FP32)
    losses = reference.losses(pictures, random_ids(size, BATCH), chance)
    (losses.task + losses.output_kd + losses.feature_kd).backward()
    expected = [t.item() for t in (losses.task, losses.output_kd, losses.feature_kd)]
    gradient = torch.cat([p.grad.flatten() for p in reference.student.parameters()])
    values, ours_gradient = our_terms(trained, our_batch(size, pictures, chance))
    assert values == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 1e-3  # 0 would agree with 0
    assert float((ours_gradient - gradient).norm() / gradient.norm()) < 1e-4
    trained.close()


def test_cached_moments_give_the_same_terms_as_pictures(tiny: Size) -> None:
    chance, pictures = drawn(tiny), random_pictures(tiny, BATCH)
    online, cached = ours(tiny, FP32), ours(tiny, replace(FP32, latents="moments"))
    moments = encode_moments(cached.base.parts.vae, pictures).half()
    expected, _ = our_terms(online, our_batch(tiny, pictures, chance))
    values, _ = our_terms(cached, our_batch(tiny, moments, chance))
    assert values == pytest.approx(expected, rel=2e-3)  # a half's mantissa
    online.close()
    cached.close()


@pytest.mark.parametrize(
    "undone",
    [
        {"fused": False},
        {"autocast": True, "dtype": "bf16"},
        pytest.param({"checkpointing": "full"}, marks=pytest.mark.extra),
        pytest.param({"log_every": 1, "ema_every": 1}, marks=pytest.mark.extra),
    ],
    ids="-".join,
)
def test_every_ablation_trains(tiny: Size, undone: dict[str, Any]) -> None:
    loop = ours(tiny, replace(FP32, latents="moments", channels_last=False, **undone))
    before = [m.detach().clone() for m in loop.trainer.weights.masters]
    loop.step()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, loop.trainer.weights.masters, strict=True))
    assert moved == len(before)
    loop.close()


@pytest.mark.parametrize("choices", [Choices(), replace(FP32, latents="moments")], ids=["bf16", "fp32"])
def test_our_step_asks_the_device_for_nothing(tiny: Size, choices: Choices) -> None:
    loop = ours(tiny, choices, batch=2 * BATCH)
    loop.step()  # the optimizer makes its state
    with Reads() as reads:
        loop.step()
    assert reads.num_operations > 1000
    assert not reads.found
    loop.close()


def test_the_plain_step_reads_four_losses_a_micro_batch(tiny: Size) -> None:
    loop: Any = plain(tiny, batch=2 * BATCH)
    loop._update = lambda: None  # torch's AdamW reads its step counts, which lie on the CPU wherever it works
    with Reads() as reads:
        loop.step()
    assert reads.found == {"aten::_local_scalar_dense": 8}


@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_the_parts_of_a_step_are_all_seen(tiny: Size, kind: str) -> None:
    loop: OurLoop | PlainLoop = ours(tiny, Choices(log_every=1)) if kind == "ours" else plain(tiny)
    loop.step()
    parts = breakdown(loop, CPU, 1)
    common = {"data", "text encoder", "teacher forward", "student forward", "losses", "backward", "norm and clip"}
    only = {"rounding", "gradients to fp32"} if kind == "ours" else {"VAE"}
    assert common | only | {"AdamW", "average", "reading losses", "rest", "noise and latents"} == set(parts)
    assert all(milliseconds > 0 for milliseconds in parts.values())
    assert parts["rest"] < 0.2 * sum(parts.values())
    held = vars(loop.trainer._update) if isinstance(loop, OurLoop) else vars(loop)
    assert not {"apply", "_backward"} & set(held)  # what was patched is as it was
    loop.close()


def test_a_clock_counts_the_inner_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("step_parts.time.perf_counter", lambda: next(now))
    clock = Clock(CPU)
    with clock.part("outer"), clock.part("inner"):
        pass
    assert clock.seconds() == {"outer": 5.0, "inner": 2.0}


def test_on_cuda_steps_are_timed_by_events_in_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CUDA: each step takes the device 250 ms, of which the host sees nothing."""
    done = [0]

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = done[0] * 250.0

        def elapsed_time(self, later: Any) -> float:
            return float(later.at - self.at)

    def step() -> None:
        done[0] += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cuda: Any = SimpleNamespace(type="cuda")
    loop: Any = SimpleNamespace(step=step, watched=lambda clock: clock.patched([(loop, "step", "all of it")]))
    assert step_seconds(loop, cuda, seconds=0, least=3) == [0.25] * 3
    assert breakdown(loop, cuda, 2) == {"all of it": 250.0, "rest": 0.0}


def test_gradients_in_bf16_are_compared_with_fp32(tiny: Size) -> None:
    loop = ours(tiny, Choices())
    found = agreement(loop)
    assert found.run_to_eager == 0  # nothing is compiled
    assert 1e-4 < found.run_to_fp32 < 0.1
    loop.close()


@pytest.mark.extra
def test_the_benchmark_runs_in_processes(tmp_path: Path) -> None:
    words = ["--size", "tiny", "--batch", "2", "--seconds", "0.1", "--rounds", "1", "--json", str(tmp_path / "rows")]
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "training.py"), *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["plain loop", "ours"]
    assert all(row["images_per_second"] > 0 and row["process_bytes"] > 1e8 for row in rows)


@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_a_row_is_measured(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "training.py"))
    choices = asdict(Choices(dtype="fp32", checkpointing="none" if kind == "ours" else "full"))
    row = {"name": "x", "loop": kind, "batch": 1, "micro_batch": 1, "choices": choices, "seconds": 0.01, "parts": True}
    monkeypatch.setattr(sys, "argv", ["training.py", "--one", json.dumps(row)])
    benchmark["main"].__globals__.update(WARM_STEPS=1, LEAST_STEPS=2, PARTS_STEPS=1)
    benchmark["main"]()
    result = json.loads(capsys.readouterr().out)
    assert len(result["step_seconds"]) == 2
    assert result["images_per_second"] == pytest.approx(1 / statistics.median(result["step_seconds"]))
    assert sum(result["parts"].values()) == pytest.approx(1e3 * min(result["step_seconds"]), rel=2)
    assert result["process_bytes"] > 1e8


def test_sd1_is_the_full_size() -> None:
    size = size_named("sd1", "bk_base")
    assert (size.plan.teacher.params, size.plan.student.params) == (859_520_964, 579_384_964)
    assert size.latent_shape == (4, 64, 64)
    assert size.pixel_side == 512
    assert size.flops == pytest.approx(2.372e12, rel=1e-3)


def test_generate_is_timed_beside_the_plain_loop(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both draw every picture, once to warm up and once a round: the rows are there, with the ratio to the first."""
    rows = tmp_path / "rows.jsonl"
    drawn = []
    remove = shutil.rmtree

    def counting(folder: Any, *args: Any, **options: Any) -> None:
        drawn.append(len(list(Path(folder).rglob("*.png"))))
        remove(folder, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", counting)
    generation.compare(
        SimpleNamespace(
            size="toy", recipe=None, device="cpu", dtype="fp32", batches=[2], steps=1, pictures=3, rounds=1,
            channels_last=True, compile=False, json=rows,
        )
    )  # fmt: skip
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["row"] for row in found] == ["plain loop", "generate", "generate, channels last"]
    assert found[0]["ratio"] == 1
    assert [count for count in drawn if count] == [3] * 6
    assert all(row["pictures_a_second"] > 0 for row in found)
    assert capsys.readouterr().out.count("pictures/s") == 3
