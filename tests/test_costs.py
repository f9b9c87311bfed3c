"""What a run costs: counted against torch's own counters, shown before anything is paid, and measured while it goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from paper import FAMILIES, TEXT_V1, VAE, write_paper_pipeline, write_paper_student
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from training import ROOT, command, environment, metrics, run_command, run_data, write_pictures, write_run

import unet_surgery as us
from unet_surgery.checkpoint.bundled import bundled_folder
from unet_surgery.cli.distillreport import _dealt, device_name
from unet_surgery.distill import RunConfig, distill, findbatch, load_run
from unet_surgery.distill.batchsearch import largest_fitting
from unet_surgery.distill.choice import choose_pairs
from unet_surgery.distill.costs import PEAKS, at_size, image_flops, peak_flops
from unet_surgery.distill.dealing import micro_batch_sizes
from unet_surgery.distill.dryrun import dry_run
from unet_surgery.distill.findbatch import available_bytes, find_batch
from unet_surgery.distill.flopuse import FlopUse
from unet_surgery.distill.footprint import activation_values, memory
from unet_surgery.distill.networks import find_folders, recompute
from unet_surgery.distill.partcosts import text_encoder_costs, vae_costs
from unet_surgery.distill.setup import open_base, set_up
from unet_surgery.distill.world import join_world
from unet_surgery.errors import RunError, TeacherError, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = ROOT / "examples" / "runs"
EXAMPLES = sorted(path.name for path in RUNS.glob("*.yaml") if not path.name.startswith("toy"))


@pytest.fixture(autouse=True)
def _a_disk_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run is refused for does not depend on the disk of the machine that tests it."""
    monkeypatch.setattr("unet_surgery.checkpoint.disk.free_bytes", lambda _: 1 << 50)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of tiny-random."""
    return us.prune("bk_tiny", "tiny-random", tmp_path_factory.mktemp("costs") / "student").folder


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configs of SD's pipelines."""
    root = tmp_path_factory.mktemp("paper")
    for family in FAMILIES:
        write_paper_pipeline(root / family, family)
    return root


def toy_run(out: Path, student: Path, **changes: Any) -> RunConfig:
    return RunConfig.from_data(run_data(out, student, {"toy": {"count": 8}}, **changes))


# --- operations ---


@pytest.mark.parametrize(
    ("recipe", "tflop", "with_vae"), [("bk_base", 2.372, 3.489), ("bk_small", 2.336, 3.453), ("bk_tiny", 2.260, 3.376)]
)
def test_a_sample_of_bk_sdm(recipe: str, tflop: float, with_vae: float) -> None:
    plan = us.plan(recipe, "sd-v1-random")
    ours, theirs = at_size(plan.student_config, (64, 64)), at_size(plan.teacher_config, (64, 64))
    flops = image_flops(ours, theirs)
    assert flops.model == flops.total
    assert round(flops.model / 1e12, 3) == tflop
    online = image_flops(ours, theirs, vae_macs=vae_costs(VAE, (512, 512)).macs)
    assert round(online.model / 1e12, 3) == with_vae


def test_the_parts_of_stable_diffusion() -> None:
    vae, text = vae_costs(VAE, (512, 512)), text_encoder_costs(TEXT_V1)
    assert (vae.params, round(vae.macs / 1e9)) == (83_653_863, 558)
    assert text.params == 123_060_480
    assert 0.005 < 2 * text.macs / 2.372e12 < 0.006


def test_parts_are_counted_as_torch_does(tiny: Path) -> None:
    from unet_surgery.runtime.parts import load_parts

    parts = load_parts(tiny)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as encoding, torch.no_grad():
        parts.vae.encode(torch.zeros(1, 3, 64, 32))
    vae = vae_costs(dict(parts.vae.config), (64, 32))
    assert 2 * vae.macs == encoding.get_total_flops()
    assert vae.params == sum(p.numel() for p in parts.vae.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as reading, torch.no_grad():
        parts.text_encoder(torch.zeros(1, 77, dtype=torch.long))
    text = text_encoder_costs(parts.text_encoder.config.to_dict())
    assert 2 * text.macs == reading.get_total_flops()
    assert text.params == sum(p.numel() for p in parts.text_encoder.parameters())


def test_training_is_counted_as_torch_does(tiny: Path) -> None:
    """Forward and backward by torch's counter. Latents, prompt and time need no gradient, which spares a little.

    What is recomputed is exact; torch then stops a segment before its last operation, which is left out here.
    """
    seen, counted = {}, {}
    for checkpointing in ("none", "high_resolution", "full"):
        unet = us.load_unet(tiny).train()
        recompute(unet, checkpointing)
        # torch cannot count the attention that a CPU would take
        with (
            set_checkpoint_early_stop(False),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            unet(torch.zeros(1, 4, 32, 16), torch.zeros(1), torch.zeros(1, 77, 32)).sample.sum().backward()
        seen[checkpointing] = counter.get_total_flops()
        counted[checkpointing] = image_flops(at_size(dict(unet.config), (32, 16)), None, checkpointing=checkpointing)
    for checkpointing, flops in counted.items():
        assert seen[checkpointing] == pytest.approx(flops.total, rel=0.01)
        assert seen[checkpointing] - seen["none"] == flops.recomputed
        assert flops.model == counted["none"].total
    assert 0 < counted["high_resolution"].recomputed < counted["full"].recomputed < counted["full"].student / 3


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA GH200 480GB", "bf16", 989.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA L40S", "fp16", 362.05),
        ("NVIDIA L40", "fp16", 181.05),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 5090", "bf16", 209.5),
        ("NVIDIA RTX A6000", "bf16", 154.8),
        ("AMD Instinct MI300X", "bf16", None),
        ("", "bf16", None),
    ],
)
def test_peaks_by_name(name: str, dtype: str, tflops: float | None) -> None:
    assert peak_flops(name, dtype) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_every_peak_is_found_by_its_name() -> None:
    assert len(PEAKS) >= 20
    for name, (bf16, fp16, fp32) in PEAKS.items():
        assert peak_flops(f"NVIDIA {name}", "fp32") == fp32 * 1e12
        assert bf16 in (None, fp16)


def test_the_gpu_is_found_without_torch(tmp_path: Path) -> None:
    gpu = tmp_path / "0000:01:00.0"
    gpu.mkdir()
    (gpu / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 95\n")
    assert device_name(tmp_path) == "NVIDIA H200"


# --- memory ---


def kept_bytes(unet: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Return the bytes that autograd keeps of a forward, parameters apart."""
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(*inputs, return_dict=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("recipe", ["bk_base", "bk_tiny"])
def test_activations_are_what_autograd_keeps(recipe: str) -> None:
    """Full size, bf16, without computing: torch's fake tensors."""
    from diffusers import UNet2DConditionModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    plan = us.plan(recipe, "sd-v1-random")
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            unet = UNet2DConditionModel.from_config(plan.student_config).train()
            kept = kept_bytes(unet, torch.zeros(1, 4, 64, 64), torch.zeros(1).long(), torch.zeros(1, 77, 768))
        finally:
            torch.set_default_dtype(torch.float32)
    assert 2 * activation_values(at_size(plan.student_config, (64, 64))) == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("checkpointing", ["none", "high_resolution", "full"])
def test_recomputing_keeps_less(student: Path, checkpointing: str) -> None:
    """What a checkpointed forward keeps is the estimate without the one segment that comes back in the backward."""
    unet = us.load_unet(student).train()
    graph = at_size(dict(unet.config), (64, 64))
    recompute(unet, checkpointing)
    kept = kept_bytes(unet, torch.zeros(1, 4, 64, 64), torch.zeros(1).long(), torch.zeros(1, 77, 32))
    estimate = 4 * activation_values(graph, checkpointing)
    largest = 4 * (28 * 16 * 64 * 64 + 2 * 16 * 77)  # a transformer block of the finest level
    assert kept == pytest.approx(estimate - largest * (checkpointing != "none"), rel=0.04)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_is_held_between_steps_is_exact(student: Path, tmp_path: Path, dtype: str) -> None:
    config = toy_run(tmp_path / "out", student, speed={"dtype": dtype, "channels_last": False})
    world = join_world({})
    folders = find_folders(config, us.api.surgery.no_progress)
    base = open_base(config, folders, world)
    trainer = set_up(config, 0, folders, base, world)
    trainer._update._begin()

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())

    weights, compute = trainer.weights, trainer._compute
    plan = us.plan("bk_tiny", "tiny-random")
    graphs = (at_size(plan.student_config, (16, 16)), at_size(plan.teacher_config, (16, 16)))
    parts = (base.parts.vae, base.parts.text_encoder)
    expected = memory(
        config, *graphs, part_params=tuple(sum(p.numel() for p in part.parameters()) for part in parts), micro_batch=4
    )
    assert expected.weights == size(weights.run.parameters())
    assert expected.masters == (0 if dtype == "fp32" else size(weights.masters))
    assert expected.average == size(trainer.ema.state().values())
    adam = trainer._update._adamw.state
    assert expected.optimizer == size(adam[m][kind] for m in weights.masters for kind in ("exp_avg", "exp_avg_sq"))
    assert compute.teacher is not None
    assert expected.teacher == size(compute.teacher.parameters())
    assert expected.parts == sum(size(part.parameters()) for part in parts)
    # a gradient for each weight, in its dtype, and where there are masters one for each of them
    masters = [] if dtype == "fp32" else weights.masters
    assert expected.gradients == size(weights.run.parameters()) + size(masters)


# --- the share of the peak ---


def test_the_share_of_the_peak_counts_no_recomputation(student: Path, tmp_path: Path) -> None:
    pictures, seen = write_pictures(tmp_path / "pictures"), []
    data = run_data(tmp_path / "run", student, {"images": str(pictures), "resolution": 32}, steps=2)
    data["speed"]["checkpointing"] = "full"
    data["log"]["peak_tflops"] = 0.5
    config = RunConfig.from_data(data)
    distill(config, on_progress=seen.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    parts = bundled_folder("tiny-random")
    vae, text = (json.loads((parts / part / "config.json").read_text()) for part in ("vae", "text_encoder"))
    plan = us.plan("bk_tiny", "tiny-random")
    flops = image_flops(
        at_size(plan.student_config, (16, 16)),
        at_size(plan.teacher_config, (16, 16)),
        vae_macs=vae_costs(vae, (32, 32)).macs,
        text_macs=text_encoder_costs(text).macs,
    )
    assert len(lines) == len(seen) == 2
    for line, progress in zip(lines, seen, strict=True):
        assert line["mfu"] == pytest.approx(line["images_per_second"] * flops.model / 0.5e12)
        assert progress.mfu == line["mfu"]


def test_no_share_of_an_unknown_peak(student: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    distill(toy_run(tmp_path / "run", student, steps=1), on_progress=seen.append)
    assert [progress.mfu for progress in seen] == [None]
    assert "mfu" not in metrics(tmp_path / "run")[0]


# --- dry runs ---


def test_a_dry_run_needs_no_torch(student: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run.yaml", run_data(tmp_path / "out", student, {"toy": {"count": 64}}))
    code = (
        "import sys\nfrom unet_surgery.cli.main import app\n"
        "try: app()\nfinally: assert not {'torch', 'diffusers', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    arguments = ["distill", str(run), "--dry-run", "--json", "--tflops", "100"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    (stage,) = data["stages"]
    assert data["student_params"] == 815_140
    assert data["latent_size"] == [16, 16]
    assert stage["images"] == 24
    assert stage["pairs"][0] == {"student": "down_blocks.0", "teacher": "down_blocks.0", "shape": [16, 8, 8]}
    assert data["hours"] == pytest.approx(24 * stage["flops"]["total"] / 100e12 / 3600)
    assert data["refused"] == []
    assert not (tmp_path / "out").exists()


def test_a_dry_run_for_people(student: Path, tmp_path: Path) -> None:
    data = run_data(tmp_path / "out", student, {"cache": str(tmp_path / "none")}, micro_batch=3)
    run = write_run(tmp_path / "run.yaml", data)
    result = run_command("distill", str(run), "--dry-run")
    assert result.returncode == 2
    assert "activations (estimated)" in result.stdout
    assert "--tflops" in result.stdout
    assert "a step: 4 samples, which cannot be dealt out in micro-batches of 3\n" in result.stdout
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("would be refused: ")
    assert "would be refused: the batch cannot be dealt out evenly" in result.stderr
    assert "would be refused: this is not a latent cache" in result.stderr
    assert last == "this run would be refused, for 2 reasons: see the beginning"
    together = subprocess.run(
        command("distill", str(run), "--dry-run"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    ).stdout.splitlines()
    assert [line.startswith("would be refused: ") for line in together[:3]] == [True, True, False]


@pytest.mark.parametrize(
    ("size", "accumulated", "processes", "says"),
    [
        (4, 1, 1, "1 micro-batch of 4 samples"),
        (1, 4, 1, "4 micro-batches of 1 sample"),
        (2, 1, 2, "1 micro-batch of 2 samples on each device"),
        (3, 1, 1, "4 samples, which cannot be dealt out in micro-batches of 3"),
    ],
)
def test_a_step_is_said_in_words(size: int, accumulated: int, processes: int, says: str) -> None:
    stage: Any = SimpleNamespace(batch=4, micro_batch=size, accumulated=accumulated)
    assert _dealt(stage, processes) == f"a step: {says}"


def test_counts_are_at_the_datas_size(paper: Path, tmp_path: Path) -> None:
    plan = write_paper_student(tmp_path / "plan.json", "bk_base", "sd-v1")
    data = {"output": str(tmp_path / "o"), "student": str(plan), "teacher": str(paper / "sd-v1")}
    sizes = {}
    for resolution in (256, 512, 768):
        pictures = {"images": str(tmp_path), "resolution": resolution}
        paper_run = dry_run(RunConfig.from_data({**data, "data": pictures}))
        assert paper_run.refused == ()
        assert paper_run.latent_size == (resolution // 8, resolution // 8)
        sizes[resolution] = paper_run.stages[0].flops
        assert round(sizes[resolution].vae / vae_costs(VAE, (resolution, resolution)).macs) == 2
    assert 4 < sizes[512].teacher / sizes[256].teacher < 5  # attention is more than linear
    assert round((sizes[512].student + sizes[512].teacher) / 1e12, 3) == 2.372


def test_the_teacher_of_a_stage_without_its_terms_costs_nothing(paper: Path, tmp_path: Path) -> None:
    plan = write_paper_student(tmp_path / "plan.json", "bk_base", "sd-v1")
    config = RunConfig.from_data(
        {
            "output": str(tmp_path / "o"),
            "student": str(plan),
            "base": str(paper / "sd-v1"),
            "data": {"toy": {}},
            "stages": [
                {"objectives": {"output_kd": 0, "feature_kd": 0}},
                {"teacher": str(paper / "sd-v1"), "objectives": {"feature_kd": {"pairs": "similarity"}}},
            ],
        }
    )
    alone, taught = dry_run(config, rate=1e14).stages
    assert (alone.flops.teacher, alone.memory.teacher, alone.pairs) == (0, 0, ())
    assert taught.flops.teacher > 0
    assert taught.pairs is None
    assert alone.hours is not None
    assert taught.hours is not None
    assert taught.hours > alone.hours


def test_many_devices_share_the_time_and_the_batch(student: Path, tmp_path: Path) -> None:
    config = toy_run(tmp_path / "o", student, batch=8)
    one, two = dry_run(config, rate=1e12), dry_run(config, rate=1e12, num_processes=2)
    assert one.hours == pytest.approx(2 * (two.hours or 0))
    assert (one.stages[0].micro_batch, two.stages[0].micro_batch) == (8, 4)
    assert "dealt out" in dry_run(config, num_processes=3).refused[0]


def test_pairs_on_paper_are_those_of_the_run(student: Path, tmp_path: Path) -> None:
    for kind in ("bk", "plan", "attn1"):
        config = toy_run(tmp_path / "o", student, objectives={"feature_kd": {"pairs": kind}})
        (stage,) = dry_run(config).stages
        assert stage.pairs is not None
        assert len(stage.pairs) == len(choose_pairs(kind, us.plan("bk_tiny", "tiny-random"))) > 3
        if kind == "attn1":
            assert stage.pairs[0].shape == (256, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "tiny-random"}, "only with a plan"),
        ({"student": "tiny-random", "teacher": "sd-v1-random"}, "of another kind"),
        ({"data": {"images": "nowhere/at/all"}}, "no such training data"),
        ({"data": {"images": ".", "resolution": 33}}, "does not fit the VAE"),
        ({"base": "sd-v1-random"}, "no pipeline brings"),
        ({"micro_batch": 5}, "dealt out evenly"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_refused(student: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = RunConfig.from_data({**run_data(tmp_path / "o", student, {"toy": {}}), **changes})
    refused = dry_run(config).refused
    assert any(message in line for line in refused), refused


def test_other_predictions_and_encoders_would_be_refused(paper: Path, tmp_path: Path) -> None:
    plan = write_paper_student(tmp_path / "plan.json", "bk_base", "sd-v2-768")
    data = {
        "output": str(tmp_path / "o"),
        "student": str(plan),
        "data": {"toy": {}},
        "teacher": str(paper / "sd-v2-768"),
    }
    assert dry_run(RunConfig.from_data(data)).refused == ()
    (line,) = dry_run(RunConfig.from_data({**data, "base": str(paper / "sd-v2-base")})).refused
    assert "predict different things" in line
    lines = dry_run(RunConfig.from_data({**data, "base": str(paper / "sd-v1")})).refused
    assert any("text encoder is not of this U-Net's kind" in line for line in lines)


def test_what_cannot_be_counted_is_an_error(student: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such student yet"):
        dry_run(toy_run(tmp_path / "o", Path("not-there")))
    with pytest.raises(TeacherError, match="no model 'no-teacher'"):
        dry_run(toy_run(tmp_path / "o", student, teacher="no-teacher"))
    xl = RunConfig.from_data({**run_data(tmp_path / "o", student, {"toy": {}}), "student": "sdxl-random"})
    assert any("cannot be trained here yet" in line for line in dry_run(xl).refused)


def test_a_disk_without_room_would_be_refused(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_run(tmp_path / "o", student, save={"keep": 3})
    whole = dry_run(config)
    assert whole.disk.checkpoint == 815_140 * 16
    assert whole.disk.checkpoints == 4 * whole.disk.checkpoint
    monkeypatch.setattr("unet_surgery.checkpoint.disk.free_bytes", lambda _: whole.disk.checkpoints)
    (line,) = dry_run(config).refused
    assert "no room" in line


def test_a_checkpoint_is_as_large_as_said(student: Path, tmp_path: Path) -> None:
    config = toy_run(tmp_path / "o", student, steps=1)
    distill(config)
    (folder,) = (tmp_path / "o" / "checkpoints").glob("step-*")
    size = sum(path.stat().st_size for path in folder.iterdir())
    said = dry_run(config).disk
    assert said.checkpoint < size < 1.02 * said.checkpoint + 200_000  # headers, manifest
    assert said.student == pytest.approx(
        (tmp_path / "o/student/unet/diffusion_pytorch_model.safetensors").stat().st_size, rel=0.02
    )


# --- the batch that fits ---


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40, unique=True).map(sorted), st.integers(0, 6000))
def test_the_search_finds_the_largest(sizes: list[int], bound: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= bound

    assert largest_fitting(sizes, fits) == max((s for s in sizes if s <= bound), default=None)
    assert len(tried) == len(set(tried))
    fitting = [s for s in sizes if s <= bound]
    too_large = [s for s in tried if s > bound]
    # never far beyond what is known to fit: at most double, or the next size there is
    for size in too_large:
        known = max((s for s in tried[: tried.index(size)] if s <= bound), default=0)
        assert size <= 2 * known or size == next(s for s in sizes if s > known)
    assert len(tried) <= 2 * len(sizes).bit_length() + len(fitting).bit_length() + 13


def test_sizes_divide_every_stage(student: Path, tmp_path: Path) -> None:
    stages = [{"batch": 12}, {"batch": 18}]
    data = {**run_data(tmp_path, student, {"toy": {}}), "stages": stages}
    assert micro_batch_sizes(RunConfig.from_data(data)) == [1, 2, 3, 6]
    assert micro_batch_sizes(RunConfig.from_data(data), 2) == [1, 3]
    assert micro_batch_sizes(RunConfig.from_data(data), 4) == []


def test_real_steps_until_memory_ends(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real networks and steps; memory that is spent from 3 samples on, as a GPU says it."""
    config = toy_run(tmp_path / "out", student, batch=8)
    steps, spent = findbatch._Search._steps, []

    def until_spent(self: Any, size: int) -> float:
        rate = float(steps(self, size))
        if size > 2:
            spent.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rate

    monkeypatch.setattr(findbatch._Search, "_steps", until_spent)
    found = find_batch(config)
    assert [(trial.micro_batch, trial.fits) for trial in found.trials] == [(1, True), (2, True), (4, False)]
    assert (found.micro_batch, found.batch, spent) == (2, 8, [4])
    assert all((trial.images_per_second or 0) > 0 for trial in found.trials if trial.fits)
    assert found.fastest in found.trials
    assert not (tmp_path / "out").exists()


def test_a_cpu_is_bounded_by_its_memory(student: Path, tmp_path: Path) -> None:
    """With no memory at all one sample is too much; what the first one took says that two are, without trying."""
    found = find_batch(toy_run(tmp_path / "out", student, batch=4), limit=1)
    assert found.micro_batch is None
    assert [trial.fits for trial in found.trials] == [False]
    assert found.trials[0].num_bytes is not None

    search = findbatch._Search.__new__(findbatch._Search)
    search.limit, search.trials, search._empty_bytes = 1000, [findbatch.Trial(2, True, 700, 1.0)], 300
    search._on_trial = lambda _: None
    assert not search.fits(4)  # 300 + 2 × 400 is more than 1000
    assert search.trials[-1] == findbatch.Trial(4, False, 1100, None)


@pytest.mark.extra
def test_the_command_prints_a_line_for_the_run_file(student: Path, tmp_path: Path) -> None:
    data = run_data(tmp_path / "out", student, {"toy": {"count": 4}}, batch=2)
    result = run_command("distill", str(write_run(tmp_path / "run.yaml", data)), "--find-batch")
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout.splitlines()[-1]) == {"micro_batch": 2}
    assert "micro-batch 1: " in result.stderr
    assert "on a CPU" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_batch_of_many_processes_is_looked_for_in_one(student: Path, tmp_path: Path) -> None:
    """Sizes are those that deal out the batch of 12 to three; what cannot be dealt out is refused before any step."""
    data = run_data(tmp_path / "out", student, {"toy": {"count": 4}}, batch=12)
    run = write_run(tmp_path / "run.yaml", data)
    result = run_command("distill", str(run), "--find-batch", "--processes", "3")
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout.splitlines()[-1]) == {"micro_batch": 4}
    assert "12 = 4 × 1 × 3 processes" in result.stderr
    assert "accelerate launch --num_processes 3" in result.stderr
    with pytest.raises(RunError, match="cannot be dealt out evenly"):
        find_batch(RunConfig.from_data(data), num_processes=5)


def test_sizes_beyond_eight_are_still_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many recompilations dynamo gives up, and every later size would be timed uncompiled."""
    run = torch.compile(torch.nn.Linear(2, 2), backend="eager", dynamic=False)
    search = findbatch._Search.__new__(findbatch._Search)
    search.limit, search.trials, search._on_trial = None, [], lambda _: None
    search._device, search._use, search._empty_bytes = torch.device("cpu"), FlopUse(), 0
    search._trainer = SimpleNamespace(weights=SimpleNamespace(run=run))  # type: ignore[assignment]
    monkeypatch.setattr(search, "_steps", lambda size: float(len(run(torch.zeros(size, 2)))))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert largest_fitting(range(1, 13), search.fits) == 12
        assert all(search.fits(size) for size in range(1, 13))


@pytest.mark.parametrize(
    "words", [["--json"], ["--tflops", "3"], ["--processes", "2"], ["--find-batch", "--tflops", "3"]]
)
def test_an_option_that_would_do_nothing_is_refused(student: Path, tmp_path: Path, words: list[str]) -> None:
    run = write_run(tmp_path / "run.yaml", run_data(tmp_path / "out", student, {"toy": {"count": 4}}))
    result = run_command("distill", str(run), *words)
    assert result.returncode == 2
    assert f"{words[-2] if words[-1][0] != '-' else words[-1]} goes with --" in result.stderr
    assert not (tmp_path / "out").exists()


def test_available_memory(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:    42 kB\n")
    assert available_bytes(tmp_path / "meminfo") == 42 * 1024
    assert available_bytes() > 1 << 20
    for text in (None, "MemTotal: 100 kB\n"):
        path = tmp_path / f"other-{text is None}"
        if text is not None:
            path.write_text(text)
        with pytest.raises(TrainingError, match="does not say"):
            available_bytes(path)


# --- the published runs ---

BK = {"task": 1.0, "output_kd": 1.0, "feature_kd": 1.0, "pairs": "bk"}
# file: family, recipe, stages of (steps, batch, micro-batch, lr, schedule, warm-up, objectives)
PUBLISHED: dict[str, tuple[str, str, list[tuple[int, int, int, float, str, int, dict[str, Any]]]]] = {
    "bk_base.yaml": ("sd-v1", "bk_base", [(50_000, 256, 64, 5e-5, "constant", 0, BK)]),
    "bk_small.yaml": ("sd-v1", "bk_small", [(50_000, 256, 64, 5e-5, "constant", 0, BK)]),
    "bk_tiny.yaml": ("sd-v1", "bk_tiny", [(50_000, 256, 64, 5e-5, "constant", 0, BK)]),
    "bk_base_2m.yaml": ("sd-v1", "bk_base", [(50_000, 256, 64, 5e-5, "constant", 0, BK)]),
    "bk_small_v2_base.yaml": ("sd-v2-base", "bk_small", [(50_000, 128, 32, 5e-5, "constant", 0, BK)]),
    "bk_small_v2_768.yaml": ("sd-v2-768", "bk_small", [(50_000, 128, 32, 5e-5, "constant", 0, BK)]),
    "segmind_small.yaml": (
        "sd-v1",
        "segmind_small",
        [(100_000, 32, 32, 1e-5, "cosine", 0, {**BK, "output_kd": 0.5, "feature_kd": 0.5})],
    ),
    "segmind_tiny.yaml": (
        "sd-v1",
        "segmind_tiny",
        [(125_000, 32, 32, 1e-5, "cosine", 0, {**BK, "output_kd": 0.5, "feature_kd": 0.5})],
    ),
    "ofa_small.yaml": (
        "sd-v1",
        "ofa_small",
        [
            (500_000, 128, 8, 1e-5, "constant", 10_000, {"task": 1.0, "output_kd": 0.0, "feature_kd": 0.0}),
            (400_000, 128, 8, 1e-5, "constant", 5_000, {"task": 0.5, "output_kd": 0.5, "feature_kd": 0.0}),
            (
                200_000,
                128,
                8,
                1e-5,
                "constant",
                5_000,
                {"task": 0.5, "output_kd": 0.5, "feature_kd": 1.0, "pairs": "similarity"},
            ),
        ],
    ),
}
TEACHERS = {
    "bk_small_v2_base.yaml": ["stabilityai/stable-diffusion-2-1-base"],
    "bk_small_v2_768.yaml": ["stabilityai/stable-diffusion-2-1"],
    "segmind_small.yaml": ["SG161222/Realistic_Vision_V4.0"],
    "segmind_tiny.yaml": ["SG161222/Realistic_Vision_V4.0"],
    "ofa_small.yaml": [None, "CompVis/stable-diffusion-v1-4", "stable-diffusion-v1-5/stable-diffusion-v1-5"],
}


def test_all_published_runs_are_here() -> None:
    assert set(EXAMPLES) == PUBLISHED.keys()
    readme = (RUNS / "README.md").read_text()
    assert [name for name in EXAMPLES if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_published_settings_are_the_authors(name: str) -> None:
    config = load_run(RUNS / name).config
    found = []
    for stage in config.stages:
        wanted = stage.objectives
        terms = {"task": wanted.task, "output_kd": wanted.output_kd, "feature_kd": wanted.feature_kd.weight}
        if wanted.feature_kd.weight:
            terms["pairs"] = wanted.feature_kd.pairs
        optimizer = stage.optimizer
        assert (optimizer.kind, optimizer.betas, optimizer.weight_decay, optimizer.clip) == (
            "adamw", (0.9, 0.999), 0.01, 1.0,
        )  # fmt: skip
        rate = (optimizer.lr, optimizer.schedule, optimizer.warmup)
        found.append((stage.steps, stage.batch, config.micro_batch, *rate, terms))
    assert found == PUBLISHED[name][2]
    assert [s.teacher for s in config.stages] == TEACHERS.get(name, ["CompVis/stable-diffusion-v1-4"])
    text = (RUNS / name).read_text()
    for word in (
        "unet-surgery prune --recipe",
        "unet-surgery cache",
        f"--out {config.student}",
        "Expect:",
        "Settings:",
    ):
        assert word in text
    assert f"--out {config.data.cache}" in text


@pytest.mark.parametrize("name", EXAMPLES)
def test_published_runs_on_paper(name: str, paper: Path, tmp_path: Path) -> None:
    """With the family's configs in place of the authors' weights, nothing but the cache is missing."""
    family, recipe, stages = PUBLISHED[name]
    plan = write_paper_student(tmp_path / "plan.json", recipe, family)
    changes = [f"student={plan}", f"output={tmp_path / 'out'}"]
    changes += [f"base={paper / family}"] if name.startswith("ofa") else [f"teacher={paper / family}"]
    if len(stages) > 1:
        changes += [f"stages.{i}.teacher={paper / family}" for i in range(1, len(stages))]
    result = dry_run(load_run(RUNS / name, changes).config, rate=0.4 * 989.5e12)
    assert [line for line in result.refused if "not a latent cache" not in line and "no room" not in line] == []
    assert result.latent_size == ((96, 96) if family == "sd-v2-768" else (64, 64))
    text = (RUNS / name).read_text()
    assert f"{result.stages[-1].flops.total / 1e12:.2f} TFLOP a sample" in text
    hours = result.hours or 0
    assert f"{hours:.1f} hours" in text or f"{hours:.0f} hours" in text
    assert f"Memory: {max(stage.memory.total for stage in result.stages) / 1e9:.0f} GB" in text


def test_the_builtin_teacher_is_enough(tmp_path: Path) -> None:
    """The command of the issue: a published file, a built-in random teacher, a student on paper, no network."""
    write_paper_student(tmp_path / "plan.json", "bk_base", "sd-v1")
    arguments = [f"student={tmp_path / 'plan.json'}", "teacher=sd-v1-random", f"output={tmp_path / 'out'}"]
    sets = [word for change in arguments for word in ("--set", change)]
    result = run_command("distill", str(RUNS / "bk_base.yaml"), "--dry-run", "--tflops", "356", *sets)
    assert "2.372" in result.stdout
    assert "time: 23.7 hours at 356 TFLOP/s" in result.stdout
    assert result.returncode == 2  # neither VAE nor cache is there
