"""``step_kd``: its loss beside a plain writing of it, which steps are guided, what it costs, and whole runs of it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training import metrics, run_command, run_data, write_run

import unet_surgery as us
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.data.batches import Batch, GuidedSteps
from unet_surgery.data.keyed import KeyedNoise
from unet_surgery.distill import RunConfig, distill, gallery, load_run
from unet_surgery.distill.compute import Preparation
from unet_surgery.distill.config import NoiseConfig, StepKd
from unet_surgery.distill.costs import stage_flops
from unet_surgery.distill.diffusion import NoiseSchedule, PredictionType
from unet_surgery.distill.dryrun import dry_run
from unet_surgery.distill.findbatch import find_batch
from unet_surgery.distill.networks import own_schedule
from unet_surgery.distill.state import load_state, state_folders
from unet_surgery.distill.step_compute import StepCompute
from unet_surgery.errors import RunError
from unet_surgery.runtime.parts import Parts, load_parts
from unet_surgery.runtime.taps import Tapped

KINDS = get_args(PredictionType)
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
WANTED = StepKd(weight=2.0, student_steps=4, teacher_steps=2)
STEP: dict[str, Any] = {"task": 0, "output_kd": 0, "feature_kd": 0, "step_kd": {"weight": 1.0, "guided": 0.5}}

STEPS = 4
SEED = 16


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the loss ---


@pytest.fixture(scope="module")
def networks(tiny: Path, places: dict[str, Path]) -> tuple[nn.Module, nn.Module, Parts]:
    """Student, teacher and parts in double precision."""
    student, teacher = (UNet2DConditionModel.from_pretrained(f / "unet").double() for f in (places["student"], tiny))
    return student, teacher.requires_grad_(False), load_parts(tiny, dtype=torch.float64)


def wave(*shape: int, pitch: float) -> Tensor:
    """A formula, not a generator: the same numbers on every version and machine."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * pitch).view(shape)


def a_batch(*, guided: bool) -> Batch:
    """Two samples of 16 × 16 latents, on the second and last rung of four."""
    moments = torch.cat([wave(2, 4, 16, 16, pitch=0.7), wave(2, 4, 16, 16, pitch=0.3).abs()], dim=1)
    latents = [wave(2, 4, 16, 16, pitch=pitch).float() for pitch in (1.3, 1.7)]
    ids = torch.arange(2 * 77).view(2, 77) % 50
    numbers = torch.tensor([[0.4, 0.5], [0.9, 0.5]])
    return Batch(moments.half(), ids, *latents, torch.zeros(2, 4), numbers, numbers[:, 0] if guided else None)


def compute_of(networks: tuple[nn.Module, nn.Module, Parts], ours: str, theirs: str, wanted: StepKd) -> StepCompute:
    student, teacher, parts = networks
    schedules = [NoiseSchedule.from_config({**SCHEDULER, "prediction_type": kind}) for kind in (ours, theirs)]
    prepare = Preparation(parts, schedules[0], NoiseConfig(), "moments", channels_last=False)
    with torch.no_grad():
        no_prompt = parts.text_encoder(torch.zeros(1, 77, dtype=torch.long))[0]
    return StepCompute(wanted, prepare, Tapped(student, ()), Tapped(teacher, ()), schedules[1], no_prompt)


def plain(networks: Any, ours: str, theirs: str, batch: Batch, guidance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Task and step term: sample by sample, by diffusers' DDIM, with two forwards where they are guided."""
    student, teacher, parts = networks
    reference = partial(DDIMScheduler, **SCHEDULER, timestep_spacing="trailing", clip_sample=False)
    mine, ddim = reference(prediction_type=ours), reference(prediction_type=theirs)
    known = DDPMScheduler(**SCHEDULER)
    terms = []
    for i in range(len(batch.images)):
        mine.set_timesteps(8)
        ddim.set_timesteps(8)
        ids, first = batch.token_ids_BT[i : i + 1], int(batch.uniforms_B2[i, 0] * 4) * 2
        embeds, empty = (parts.text_encoder(x)[0].detach() for x in (ids, torch.zeros_like(ids)))
        t, w = ddim.timesteps[first : first + 1], None if guidance is None else guidance[i]
        mean, std = batch.images[i : i + 1].float().chunk(2, 1)
        latent = (mean + std * batch.posterior_BCHW[i]) * parts.vae.config.scaling_factor
        noise = batch.noise_BCHW[i : i + 1]
        start = z = known.add_noise(latent, noise, t).double()

        def of(net: nn.Module, z: Tensor, t: Tensor, w: Any = w, embeds: Tensor = embeds, empty: Tensor = empty) -> Any:
            prompted = net(z, t, embeds).sample
            return prompted, prompted if w is None else w * prompted - (w - 1) * net(z, t, empty).sample

        for step in ddim.timesteps[first : first + 2]:
            z = ddim.step(of(teacher, z, step)[1], step, z).prev_sample
        prompted, prediction = of(student, start, t)
        sample = mine.step(prediction, t[0], start).pred_original_sample
        bars = torch.cat([known.alphas_cumprod, torch.ones(1)]).double()
        now, end = bars[t], bars[ddim.timesteps[first + 2] if first < 6 else -1]
        ratio = ((1 - end) / (1 - now)).sqrt()
        wanted = (z - ratio * start) / (end.sqrt() - ratio * now.sqrt())
        target = {"epsilon": noise, "sample": latent, "v_prediction": known.get_velocity(latent, noise, t)}[ours]
        weight = (now / (1 - now)).clamp(min=1)
        terms.append(((prompted - target).square().mean(), (sample - wanted).square().mean() * weight[0]))
    task, step = (torch.stack(values) for values in zip(*terms, strict=True))
    return task, step


@pytest.mark.parametrize("is_guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("ours", "theirs"), [*zip(KINDS, KINDS, strict=True), ("epsilon", "v_prediction"), ("v_prediction", "epsilon")]
)
def test_the_loss_is_what_a_plain_trainer_computes(networks: Any, ours: str, theirs: str, is_guided: bool) -> None:
    """Values and gradients, of students of every kind, beside teachers of the same and of another."""
    student, batch = networks[0], a_batch(guided=is_guided)
    terms = compute_of(networks, ours, theirs, WANTED)(batch, torch.ones(0))
    gradients = torch.autograd.grad(terms.total, tuple(student.parameters()))
    guidance = 2 + 12 * batch.uniforms_B2[:, 0] if is_guided else None
    task, step = plain(networks, ours, theirs, batch, guidance)
    total = 2 * (step + 0.2 * (step / task).detach() * task).mean()
    assert terms.values_K.tolist() == pytest.approx([task.mean().item(), step.mean().item()], rel=1e-4)
    assert terms.total.item() == pytest.approx(total.item(), rel=1e-4)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, tuple(student.parameters()))])
    found = torch.cat([g.flatten() for g in gradients])
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_golden_losses_of_seeded_networks(networks: Any) -> None:
    """The numbers themselves: a change that moves one of them changes what is trained."""
    found = {}
    for name, ours, is_guided in (("epsilon", "epsilon", False), ("v guided", "v_prediction", True)):
        with torch.no_grad():
            terms = compute_of(networks, ours, "epsilon", WANTED)(a_batch(guided=is_guided), torch.ones(0))
        found[name] = [terms.total.item(), *terms.values_K.tolist()]
    assert found == {name: pytest.approx(values, rel=1e-4) for name, values in GOLDEN.items()}, found


GOLDEN = {
    "epsilon": [2.908693790435791, 0.5412508249282837, 1.2119557857513428],
    "v guided": [18.566614151000977, 0.2622860372066498, 7.73608922958374],
}


def test_the_student_runs_once_the_teacher_k_times(networks: Any) -> None:
    """Two forwards of the student before its backward would be one too many for DDP and FSDP2."""
    seen: list[tuple[str, int]] = []
    compute = compute_of(networks, "epsilon", "epsilon", WANTED)
    hooks = [
        net.register_forward_pre_hook(lambda _m, inputs, name=name: seen.append((name, len(inputs[0]))))
        for name, net in (("student", compute.student), ("teacher", compute.teacher))
    ]
    for is_guided, rows in ((False, 2), (True, 4)):
        seen.clear()
        compute(a_batch(guided=is_guided), torch.ones(0))
        assert seen == [("teacher", rows)] * 2 + [("student", rows)]
    for hook in hooks:
        hook.remove()


def test_a_guidance_of_one_is_none(networks: Any) -> None:
    wanted = StepKd(weight=1.0, student_steps=4, teacher_steps=2, guidance=(1.0, 1.0))
    compute = compute_of(networks, "v_prediction", "epsilon", wanted)
    with torch.no_grad():
        plain, guided = (compute(a_batch(guided=is_guided), torch.ones(0)).total for is_guided in (False, True))
    assert guided.item() == pytest.approx(plain.item(), rel=1e-5)


# --- which steps are guided ---


@given(
    st.integers(0, 2**40), st.integers(0, 10**6), st.integers(1, 64), st.integers(0, 200), st.integers(0, 63), st.data()
)
def test_whole_steps_are_guided_however_they_are_dealt_out(
    seed: int, first: int, batch: int, number: int, offset: int, data: st.DataObject
) -> None:
    steps, noise = GuidedSteps(0.5, first, batch), KeyedNoise(seed)
    begins = first + number * batch
    whole = steps.uniforms(noise, begins, batch)
    start = offset % batch
    count = data.draw(st.integers(1, batch - start))
    part = steps.uniforms(noise, begins + start, count)
    if whole is None:
        assert part is None
    else:
        assert part is not None
        assert torch.equal(part, whole[start : start + count])


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.1, 0.08, 0.12), (1.0, 1, 1)])
def test_the_share_of_guided_steps(share: float, low: float, high: float) -> None:
    noise, steps = KeyedNoise(3), GuidedSteps(share, 5, 4)
    guided = [steps.uniforms(noise, 5 + 4 * number, 2) is not None for number in range(4000)]
    assert low <= sum(guided) / len(guided) <= high


# --- teachers ---


def test_teachers_of_other_predictions_and_of_other_noise(tmp_path: Path) -> None:
    ours = NoiseSchedule.from_config(SCHEDULER)
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    assert own_schedule(tmp_path, "teacher", SCHEDULER, ours, same_prediction=True) is ours
    path.write_text(str({**SCHEDULER, "prediction_type": "v_prediction"}).replace("'", '"'))
    assert own_schedule(tmp_path, "teacher", SCHEDULER, ours, same_prediction=False).prediction_type == "v_prediction"
    with pytest.raises(RunError, match="predict different things"):
        own_schedule(tmp_path, "teacher", SCHEDULER, ours, same_prediction=True)
    for change in ({"beta_end": 0.013}, {"num_train_timesteps": 999}):
        path.write_text(str({**SCHEDULER, **change}).replace("'", '"'))
        with pytest.raises(RunError, match="other noise"):
            own_schedule(tmp_path, "teacher", SCHEDULER, ours, same_prediction=False)


def test_more_steps_than_timesteps_are_refused_before_the_first(places: dict[str, Path], tmp_path: Path) -> None:
    objectives = {**STEP, "step_kd": {"weight": 1, "student_steps": 400, "teacher_steps": 3}}
    data = run_data(tmp_path / "run", places["student"], {"cache": str(places["cache"])}, objectives=objectives)
    with pytest.raises(RunError, match="fewer timesteps") as caught:
        distill(RunConfig.from_data(data))
    assert caught.value.found == "400 × 3"


# --- what it costs ---


def step_run(out: Path, places: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """Return a run of four steps, of which the first and the last are guided."""
    changes = {"objectives": STEP, "seed": SEED, "steps": STEPS, "optimizer": {"lr": 5e-5}, **changes}
    return run_data(out, places["student"], {"cache": str(places["cache"])}, **changes)


def test_operations_are_counted_as_torch_does(networks: Any, places: dict[str, Path], tmp_path: Path) -> None:
    """A plain step and a guided one by torch's counter, and the mean that a dry run says."""
    student, teacher, _ = networks
    seen = []
    for is_guided in (False, True):
        compute = compute_of(networks, "epsilon", "epsilon", StepKd(weight=1.0, teacher_steps=2))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            compute(a_batch(guided=is_guided), torch.ones(0)).total.backward()
        seen.append(counter.get_total_flops() / 2)
    student.zero_grad()
    step = {"weight": 1.0, "teacher_steps": 2, "guided": 0.25}
    config = RunConfig.from_data(step_run(tmp_path / "run", places, objectives={**STEP, "step_kd": step}))
    configs = {"student": dict(student.config), "teacher": dict(teacher.config), "latent_size": (16, 16)}
    encoder = read_object(places["student"] / "text_encoder" / "config.json")
    counted = stage_flops(config, config.stages[0], **configs, text_encoder=encoder)
    assert 0.75 * seen[0] + 0.25 * seen[1] == pytest.approx(counted.model, rel=0.01)


def test_a_dry_run_knows_the_guided_steps(places: dict[str, Path], tmp_path: Path) -> None:
    at_one_level = dry_run(RunConfig.from_data(step_run(tmp_path, places, objectives={"feature_kd": 0})))
    objectives = {**STEP, "step_kd": {"weight": 1, "teacher_steps": 4, "guided": 0.5}}
    steps = dry_run(RunConfig.from_data(step_run(tmp_path, places, objectives=objectives)))
    (before,), (after,) = at_one_level.stages, steps.stages
    assert steps.refused == ()
    assert after.flops.teacher == 1.5 * 4 * before.flops.teacher
    assert after.flops.student == 1.5 * before.flops.student
    assert after.flops.text == before.flops.text
    assert after.memory.activations == 2 * before.memory.activations  # the largest step decides
    assert after.memory.teacher == before.memory.teacher
    assert after.pairs == ()
    result = run_command(
        "distill", str(write_run(tmp_path / "run.yaml", step_run(tmp_path / "o", places, objectives=objectives))),
        "--dry-run", "--tflops", "1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.extra
def test_the_batch_that_fits_is_that_of_guided_steps(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    predict = StepCompute._predict

    def noted(self: StepCompute, network: nn.Module, *args: Any) -> Any:
        if network is self.student:
            rows.append(len(args[0]) * (1 if args[-1] is None else 2))
        return predict(self, network, *args)

    monkeypatch.setattr(StepCompute, "_predict", noted)
    found = find_batch(RunConfig.from_data(step_run(tmp_path / "run", places, batch=1)))
    assert found.micro_batch == 1
    assert set(rows) == {1, 2}
    assert rows[0] == 2  # the larger first


# --- runs ---


@pytest.fixture(scope="module")
def whole(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by its file."""
    root = tmp_path_factory.mktemp("whole")
    data = step_run(root / "run", places, save={"every": 1, "keep": 9})
    distill(load_run(write_run(root / "run.yaml", data)).config)
    return root / "run"


def test_a_run_learns_and_says_what_it_did(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert set(lines[0]) >= {"loss", "task", "step_kd", "grad_norm", "lr"}
    assert "output_kd" not in lines[0]
    for line in lines:
        assert line["loss"] == pytest.approx(1.2 * line["step_kd"], rel=1e-5)
    card = (whole / "student" / "README.md").read_text()
    assert "1 step distillation (16 → 8 steps, 50% guided by 2 to 14) + 0.2 task, scaled to it" in card
    assert "| step distillation |" in card
    assert "step distillation" in (whole / "student" / "training.svg").read_text()
    assert us.verify(whole / "student", "tiny-random").check.is_trained


def test_steps_are_guided_by_their_place(whole: Path, places: dict[str, Path], tmp_path: Path) -> None:
    """A share moves which steps are guided, never how: the first, which is, is that of a run where all are."""
    noise, steps = KeyedNoise(SEED), GuidedSteps(0.5, 0, 4)
    assert [steps.uniforms(noise, 4 * number, 4) is not None for number in range(STEPS)] == [True, False, False, True]
    first = {}
    for share in (0.0, 1.0):
        objectives = {**STEP, "step_kd": {"weight": 1.0, "guided": share}}
        distill(RunConfig.from_data(step_run(tmp_path / str(share), places, objectives=objectives, steps=1)))
        (first[share],) = metrics(tmp_path / str(share))
    assert first[1.0] == metrics(whole)[0]
    assert first[0.0]["task"] == pytest.approx(first[1.0]["task"], rel=1e-5)
    assert first[0.0]["step_kd"] < first[1.0]["step_kd"]


def tensors_of(run: Path) -> dict[str, dict[str, Tensor]]:
    return dict(load_state(state_folders(run)[-1]).tensors)


def test_a_run_goes_on_bit_for_bit(whole: Path, places: dict[str, Path], tmp_path: Path) -> None:
    left, out = 2, tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    for folder in state_folders(whole):
        if load_state(folder).step <= left:
            (out / "checkpoints" / folder.name).symlink_to(folder)
    (out / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes())
    distill(RunConfig.from_data(step_run(out, places, save={"every": 1, "keep": 9})))
    ours, theirs = tensors_of(out), tensors_of(whole)
    assert ours.keys() == theirs.keys()
    for group, tensors in theirs.items():
        assert all(torch.equal(tensor, ours[group][name]) for name, tensor in tensors.items()), group
    assert metrics(out) == metrics(whole)


def test_micro_batches_and_recomputation_change_nothing(whole: Path, places: dict[str, Path], tmp_path: Path) -> None:
    """A scale of the task term that is a batch's would differ between micro-batches."""
    speed = {"dtype": "fp32", "channels_last": False, "checkpointing": "full"}
    distill(RunConfig.from_data(step_run(tmp_path / "run", places, micro_batch=2, speed=speed)))
    lines = metrics(tmp_path / "run")
    assert len(lines) == STEPS
    for ours, theirs in zip(lines, metrics(whole), strict=True):
        assert ours.pop("stage") == theirs.pop("stage")
        assert ours == pytest.approx(theirs, rel=1e-5), ours["step"]


@pytest.mark.extra
def test_a_stage_of_steps_by_a_teacher_of_another_kind(
    places: dict[str, Path], tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages of different terms in one run: their lines, their card, and pictures by what each network predicts."""
    shutil.copytree(tiny, tmp_path / "teacher")
    path = tmp_path / "teacher" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    drawn: list[str] = []
    sample = gallery.sample

    def noted(unet: nn.Module, parts: Parts, *args: Any, **options: Any) -> Any:
        drawn.append(parts.scheduler_config.get("prediction_type", "epsilon"))
        return sample(unet, parts, *args, **options)

    monkeypatch.setattr(gallery, "sample", noted)
    steps = {"name": "steps", "steps": 1, "objectives": STEP, "teacher": str(tmp_path / "teacher")}
    data = step_run(tmp_path / "run", places, stages=[{"name": "features", "steps": 1, "objectives": {}}, steps])
    del data["objectives"]
    data |= {"speed": {"dtype": "bf16"}, "pictures": {"prompts": ["a house"], "steps": 2, "scheduler": "ddim-trailing"}}
    config = RunConfig.from_data(data)
    assert dry_run(config).refused == ()
    distill(config)
    first, last = metrics(tmp_path / "run")
    assert "step_kd" not in first
    assert "output_kd" not in last
    assert last["bad_steps"] == 0
    assert drawn == ["v_prediction", "epsilon", "epsilon"]
    assert (
        "| step | loss | task | output | features | step distillation |"
        in (tmp_path / "run" / "student" / "README.md").read_text()
    )
    # the first stage compares predictions as they are
    other = RunConfig.from_data({**data, "output": str(tmp_path / "o"), "teacher": steps["teacher"]})
    assert "predict different things" in dry_run(other).refused[0]
    with pytest.raises(RunError, match="predict different things"):
        distill(other)
