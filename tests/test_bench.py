"""The bench: exact counts, the order of the timing, medians of a known clock, what fails, and what a report reads."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from configs import CONFIGS
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from paper import write_paper_student
from teachers import write_unet
from test_cli import loaded, main_with, tool
from test_published import STUDENTS, TEACHERS, giga, plan_of

import unet_surgery as us
from unet_surgery.checkpoint.bundled import bundled_folder
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.cli import bench as cli
from unet_surgery.distill.partcosts import text_encoder_costs, vae_costs
from unet_surgery.errors import ConfigError, OutputError, SurgeryError, TeacherError, UsageError
from unet_surgery.evaluate import bench as of_api
from unet_surgery.evaluate import benchmodels, benchnets, benchparts, benchrun, peak
from unet_surgery.evaluate.benchmodels import find_models
from unet_surgery.evaluate.benchresult import BenchReport, BenchRow
from unet_surgery.evaluate.matmul import matmul_flops
from unet_surgery.evaluate.timing import Ratio, Spread, Timed, interleaved, ratio, spread
from unet_surgery.evaluate.why import OUT_OF_MEMORY, why_not
from unet_surgery.hub import ResolvedTeacher
from unet_surgery.recipe import load_recipe
from unet_surgery.results.formats import Bench
from unet_surgery.runtime.load import load_unet

QUICK: dict[str, Any] = {"device": "cpu", "latent": 8, "rounds": 1, "warm_up": 1, "memory": False, "guidance": 1.0}
CPU = torch.device("cpu")
COMMAND: Any = cli.bench
RUN = COMMAND.__wrapped__
"""The command as a function: its errors are raised, and what it replaces for tests is replaced."""


@pytest.fixture(scope="module", autouse=True)
def _quick(one_thread: None) -> Iterator[None]:
    """Machines differ in how fast they multiply, and no test asks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchrun, "matmul_flops", lambda *_: 1e9)
        yield


class Clock:
    """A clock that only calls move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: Iterator[float], name: str = "", log: list[str] | None = None) -> Callable[[], None]:
        def call() -> None:
            self.now += next(seconds)
            if log is not None:
                log.append(name)

        return call


# -- timing ------------------------------------------------------------------------------------------------------------


def test_models_take_turns_and_each_begins_a_round() -> None:
    clock, log = Clock(), []
    calls = [clock.taking(itertools.repeat(1.0), name, log) for name in "abc"]
    interleaved(calls, rounds=3, warm_up=1, clock=clock)
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"


def test_times_are_the_clocks_and_warm_up_does_not_count() -> None:
    clock = Clock()
    calls = [clock.taking(iter([99.0, 3.0, 1.0, 2.0])), clock.taking(iter([77.0, 40.0, 10.0, 20.0]))]
    first, second = interleaved(calls, rounds=3, warm_up=1, clock=clock)
    assert first.seconds == pytest.approx((3, 1, 2))
    assert second.seconds == pytest.approx((40, 10, 20))
    found = spread(first.seconds)
    assert (found.median, found.low, found.high, found.runs) == pytest.approx((2, 1.5, 2.5, 3))


def test_the_device_is_waited_for_inside_the_time() -> None:
    """A GPU's kernels run after the call has returned; the time of those before is nobody's."""
    clock, queued = Clock(), [5.0]

    def settle() -> None:
        clock.now += queued.pop() if queued else 0.0

    (timed,) = interleaved([lambda: queued.append(2.0)], rounds=1, warm_up=0, clock=clock, settle=settle)
    assert timed.seconds == pytest.approx((2.0,))


def test_one_that_fails_is_left_out_and_the_others_go_on() -> None:
    clock, log, done = Clock(), [], []
    turns = iter([1.0, 1.0])  # the third call finds no more

    def failing() -> None:
        try:
            clock.now += next(turns)
        except StopIteration:
            raise RuntimeError("no more") from None

    other = clock.taking(itertools.repeat(1.0), "b", log)
    first, second = interleaved(
        [failing, other], rounds=3, warm_up=1, clock=clock, why=str, on_run=lambda: done.append(1)
    )
    assert (first.failed, first.seconds) == ("no more", (1.0,))
    assert (second.failed, len(second.seconds), len(log)) == (None, 3, 4)
    assert len(done) == 8  # progress reaches the end whatever fails
    with pytest.raises(ZeroDivisionError):  # what has no explanation is a fault of ours
        interleaved([lambda: 1 // 0], rounds=1, warm_up=0, clock=clock)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40), st.floats(0.1, 10))
def test_a_ratio_is_that_of_each_round(base: list[float], factor: float) -> None:
    """Whatever the machine did meanwhile: one that always takes ``factor`` times as long has that ratio."""
    found = ratio([factor * seconds for seconds in base], base)
    assert found.value == pytest.approx(factor)
    if len(base) < 6:
        assert found.interval is None
        assert not found.is_clear
    else:
        assert found.interval == pytest.approx((factor, factor))


def test_the_interval_of_a_ratio_holds_95_of_100() -> None:
    """The ends are order statistics; their ranks by the binomial distribution, counted here in the other direction."""
    for num in range(6, 40):
        found = ratio([float(k + 1) for k in range(num)], [1.0] * num)
        assert found.interval is not None
        low = int(found.interval[0])
        assert found.interval[1] == num + 1 - low
        inside = sum(comb(num, k) for k in range(low, num - low + 1)) / 2**num
        narrower = sum(comb(num, k) for k in range(low + 1, num - low)) / 2**num
        assert inside >= 0.95 > narrower


def test_what_noise_allows() -> None:
    assert Ratio(0.6, (0.58, 0.62)).is_clear
    assert not Ratio(0.9, (0.7, 1.1)).is_clear
    assert Ratio(1.0, (0.999, 1.001)).is_clear  # more rounds would not find a difference either
    assert not Ratio(0.6, (0.3, 0.9)).is_clear  # smaller, but by what nobody knows
    assert not Ratio(0.6, None).is_clear


def test_no_difference_is_no_noise(capsys: pytest.CaptureFixture[str]) -> None:
    (model,) = find_models(["tiny-random"])
    row = replace(BenchRow.of(model), dtype="fp32", batch=1, unet_ms=Spread(1, 1, 1, 10))
    first = Timed((1.0,) * 10)
    same, other, noisy = (
        benchrun._compared(row, Timed(seconds), first)
        for seconds in ((0.999, 1.001) * 5, (0.8, 0.801) * 5, (0.7, 1.3) * 5)
    )
    assert [r.may_equal_first for r in (same, other, noisy)] == [True, False, False]
    assert [cli._ratio(r) for r in (same, other, noisy)] == ["1", "0.8", "1?"]
    cli._tell(BenchReport({}, (same, other)), quiet=False)
    told = capsys.readouterr().err
    assert "as fast as the first" in told
    assert "ratio is 0.999 to 1 with" in told
    assert "noise" not in told
    cli._tell(BenchReport({}, (noisy,)), quiet=False)
    assert "lost in the noise" in capsys.readouterr().err


def test_the_matrix_product_is_the_clocks() -> None:
    clock, sides = Clock(), []

    def settle() -> None:
        clock.now += 0.005

    def counted(*shape: int, **options: Any) -> torch.Tensor:
        sides.append(shape[0])
        return torch.zeros(*shape, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", counted)
        patch.setattr("unet_surgery.evaluate.matmul.LARGEST", 512)
        assert matmul_flops(CPU, torch.float32, settle, clock) == pytest.approx(2 * 512**3 / 0.005)
    assert sides == [256, 256, 512, 512]
    assert matmul_flops(CPU, torch.float32, lambda: None, lambda: 0.0) is None


# -- counting ----------------------------------------------------------------------------------------------------------

NAMES = {"sd1": "sd-v1-random", "sd2": "sd-v2-random", "sd2-768": "sd-v2-768-random", "sdxl": "sdxl-random"}


def test_the_command_has_the_published_counts(tmp_path: Path) -> None:
    """Of the teachers, and of every student by its plan: no weights are there."""
    plans = []
    for recipe, teacher, *_ in STUDENTS:
        plans.append(tmp_path / f"{recipe}-{teacher}.json")
        plans[-1].write_text(plan_of(load_recipe(recipe), teacher).to_json())
    out, _ = tool("bench", *(NAMES[t[0]] for t in TEACHERS), *map(str, plans), "--no-run", "--json")
    rows = json.loads(out)["rows"]
    known = [(t[1], t[3], t[4]) for t in TEACHERS] + [(s[2], s[4], s[5]) for s in STUDENTS]
    assert len(rows) == len(known) == 21
    for row, (params, macs, macs_all) in zip(rows, known, strict=True):
        assert row["parameters"] == params
        assert macs is None or giga(row["macs_conv_linear"]) == macs
        assert macs_all is None or giga(row["macs_all"]) == macs_all
        assert row["unet_ms"] is row["dtype"] is row["failed"] is None


def test_the_table_of_counts(tmp_path: Path) -> None:
    plan = write_paper_student(tmp_path / "mine.json", "bk_tiny", "sd-v1")
    out, err = tool("bench", "sd-v1-random", str(plan), "--no-run")
    line = next(line for line in out.splitlines() if "mine" in line)
    for text in ("323,384,964", "37.6%", "205.0 G", "242.8 G", "60.4%", "64×64", "BK-SDM-Tiny"):
        assert text in line, line
    assert err == ""


def test_counting_needs_no_torch(tmp_path: Path) -> None:
    modules = loaded(main_with("bench", "sd-v1-random", "sdxl-random", "--no-run"), tmp_path)
    assert "unet_surgery" in modules
    assert not modules & {"torch", "diffusers", "transformers", "numpy", "huggingface_hub"}


def test_another_latent_size() -> None:
    (row,) = us.bench(["sd-v2-random"], run=False, latent=96).rows
    (native,) = us.bench(["sd-v2-768-random"], run=False).rows
    assert (row.macs_conv_linear, row.macs_all, row.latent) == (native.macs_conv_linear, native.macs_all, (96, 96))
    (wide,) = us.bench(["sd-v1-random"], run=False, latent=(64, 32)).rows
    assert wide.latent == (64, 32)
    shown, _ = tool("bench", "sd-v1-random", "--no-run", "--latent", "64x32")
    assert "64×32" in shown  # as it was written
    assert "latent, w×h" in shown
    shown, _ = tool("bench", "sd-v2-random", "sd-v2-768-random", "--no-run")
    (line,) = (line for line in shown.splitlines() if "sd-v2-768-random" in line)
    assert line.count("%") == 1  # the parameters' share: the MACs of other latents are not compared


def test_names_are_not_shared_and_are_no_paths(tmp_path: Path) -> None:
    for where in ("a", "b"):
        write_unet(tmp_path / where / "student", CONFIGS["sd1"])
    folders = [tmp_path / where / "student" for where in ("a", "b")]
    report = us.bench([*folders, "tiny-random"], run=False)
    assert [row.model for row in report.rows] == ["student", "student (2)", "tiny-random"]
    assert str(tmp_path) not in json.dumps(report.to_json())


# -- running -----------------------------------------------------------------------------------------------------------


def test_what_a_bench_writes(tmp_path: Path, tiny: Path) -> None:
    """The agreed keys, with values of the right kinds, of whole pipelines with pictures, through the command."""
    out = tmp_path / "bench.json"
    words = ["bench", str(tiny), "toy", "--device", "cpu", "--latent", "8", "--rounds", "2", "--warm-up", "1"]
    words += ["--steps", "1", "--pictures", "1", "--out", str(out)]
    shown, err = tool(*words, env={"OMP_NUM_THREADS": "1"})
    data = json.loads(out.read_text())
    assert data["format"] == "unet-surgery-bench"
    assert data["format_version"] == 1
    assert data["machine"]["device"] == "cpu"
    assert data["machine"]["torch"] == torch.__version__
    assert data["machine"]["matmul_tflops"]["fp32"] > 0
    first, second = data["rows"]
    assert [row["model"] for row in data["rows"]] == ["tiny-random", "toy"]
    for row in (first, second):
        assert row["latent"] == [8, 8]
        assert (row["dtype"], row["batch"], row["compile"], row["weights"]) == ("fp32", 1, False, "loaded")
        for key, runs in (("unet_ms", 2), ("guided_ms", 2), ("picture_s", 1)):
            times = row[key]
            assert 0 < times["low"] <= times["median"] <= times["high"]
            assert times["runs"] == runs
        assert (row["picture_s"]["steps"], row["picture_s"]["guidance"]) == (1, 7.5)
        assert 4 * row["parameters"] < row["peak_bytes"] < 4 * row["parameters"] + 200e6
        flops = 2 * row["macs_all"] / (row["unet_ms"]["median"] / 1000)
        assert row["flop_share"] == pytest.approx(flops / (data["machine"]["matmul_tflops"]["fp32"] * 1e12))
        assert row["failed"] is None
    assert (first["ratio_to_first"], first["ratio_is_clear"]) == (1.0, None)
    assert (second["ratio_interval"], second["ratio_is_clear"]) == (None, False)  # two rounds say nothing
    assert "1 thread, torch" in shown
    assert "picture, s" in shown
    assert "lost in the noise" in err
    assert "the output exists" in tool(*words, code=4)[1]
    assert "the output is a folder" in tool(*words[:-1], str(tmp_path), "--force", code=4)[1]
    # a report reads it
    page = tmp_path / "report.html"
    us.report([out], page)
    text = page.read_text("utf-8")
    assert f"{first['parameters']:,}" in text
    assert f"{second['unet_ms']['median']:.4g} ms" in text
    assert "lost in the noise" in text


def test_what_was_measured_is_shown_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_given: Any, **_options: Any) -> None:
        raise OutputError("the file cannot be written", found="No space left on device")

    monkeypatch.setattr("unet_surgery.checkpoint.target.write_target", full)
    with pytest.raises(OutputError):
        RUN(["sd-v1-random"], run=False, out=tmp_path / "bench.json", as_json=True, quiet=True)
    assert json.loads(capsys.readouterr().out)["rows"][0]["parameters"] == 859_520_964


@pytest.mark.parametrize("part", [2, pytest.param(1, marks=pytest.mark.extra)], ids=["half", "all"])
def test_every_kind_of_unet_runs_with_random_weights(unet_folders: dict[str, Path], part: int) -> None:
    """By the config alone, in every shape; with a text encoder of one width."""
    names = sorted(name for name, config in CONFIGS.items() if isinstance(config["cross_attention_dim"], int))[::part]
    assert len(names) > 12 / part
    report = us.bench([unet_folders[name] for name in names], random=True, **QUICK)
    assert [row.model for row in report.rows] == names
    assert not [row.failed for row in report.rows if row.failed]
    for row, name in zip(report.rows, names, strict=True):
        assert row.parameters == sum(p.numel() for p in load_unet(unet_folders[name]).parameters())
        assert row.weights == "random"
        assert row.unet_ms is not None
        assert row.guided_ms is None


def test_random_weights_are_the_configs_network(unet_folders: dict[str, Path]) -> None:
    """Same tensors as diffusers makes, finite, no two matrices alike; a finite output; the global dice lie still."""
    config = CONFIGS["sdxl"]
    state = torch.random.get_rng_state()
    unet = benchnets.random_unet(config, CPU, torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), state)
    expected: Any = UNet2DConditionModel.from_config(config)
    made, wanted = unet.state_dict(), expected.state_dict()
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in wanted.items()}
    assert {v.dtype for v in made.values()} == {torch.bfloat16}
    assert all(torch.isfinite(v).all() for v in made.values())
    matrices = [v for v in made.values() if v.dim() > 1]
    assert len({tuple(v.flatten()[:16].tolist()) for v in matrices}) == len(matrices) > 100
    assert benchnets.forward(unet, (8, 8), 2)().isfinite().all()


def test_loaded_weights_are_the_files(unet_folders: dict[str, Path]) -> None:
    (model,) = find_models([unet_folders["sd2"]])
    mine = benchnets.load_network(model, CPU, torch.float32, random=False, channels_last=True)
    theirs = load_unet(unet_folders["sd2"]).eval()
    assert mine.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for batch in (1, 2):
        ours = benchnets.forward(mine, (8, 8), batch, channels_last=True)()
        assert ours.shape == (batch, 4, 8, 8)
        torch.testing.assert_close(ours, benchnets.forward(theirs, (8, 8), batch)(), rtol=1e-4, atol=1e-5)


def test_settings_stand_in_rows(unet_folders: dict[str, Path]) -> None:
    done: list[tuple[int, int]] = []
    folders = [unet_folders["sd1"], unet_folders["no-mid"]]
    settings = {**QUICK, "guidance": 2.0, "dtypes": ["fp32", "bf16"], "batches": [1, 3, 1]}
    report = us.bench(folders, channels_last=True, progress=lambda *at: done.append(at), **settings)
    assert [(r.dtype, r.batch, r.model) for r in report.rows] == [
        (dtype, batch, model) for dtype in ("fp32", "bf16") for batch in (1, 3) for model in ("sd1", "no-mid")
    ]
    assert all(row.guided_ms is not None and row.channels_last for row in report.rows)
    assert [row.ratio_to_first for row in report.rows[::2]] == [1.0] * 4
    assert [at[0] for at in done] == list(range(1, 33))  # 2 rounds × 2 models × 2 kinds × 2 batches × 2 dtypes
    assert {at[1] for at in done} == {32}
    assert set(report.machine["matmul_tflops"]) == {"fp32", "bf16"}


def test_other_latents_are_not_compared(unet_folders: dict[str, Path], tmp_path: Path) -> None:
    other = write_unet(tmp_path / "other", {**CONFIGS["sd1"], "sample_size": 16})
    options = {**QUICK, "latent": None}
    rows = us.bench([unet_folders["sd1"], other, unet_folders["sd2"]], **options).rows
    assert [row.latent for row in rows] == [(8, 8), (16, 16), (8, 8)]
    assert [row.ratio_to_first is None for row in rows] == [False, True, False]


class FullDevice:
    """Forwards of one model run out of memory: of those with at least ``samples``, or when it is loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], samples: int) -> None:
        make, run = benchrun.load_network, benchrun.forward

        def load(model: Any, *rest: Any, **options: Any) -> Any:
            if samples == 0 and dict(model.config) == config:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return make(model, *rest, **options)

        def forward(unet: Any, latent: Any, batch: int, **options: Any) -> Callable[[], Any]:
            def fail() -> None:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

            is_it = unet.config.block_out_channels == config["block_out_channels"]
            return fail if is_it and batch >= samples else run(unet, latent, batch, **options)

        monkeypatch.setattr(benchrun, "load_network", load)
        monkeypatch.setattr(benchrun, "forward", forward)


def test_everything_is_fetched_once_before_anything_is_measured(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that breaks off in the second dtype would take the first one's times with it."""
    log: list[str] = []

    def fetch(found: ResolvedTeacher, **options: Any) -> ResolvedTeacher:
        log.append("parts" if options.get("parts_only") else "weights")
        options["progress"](1, 2)
        return replace(found, folder=tiny)

    elsewhere = tmp_path / "elsewhere"  # where the configs lie; the weights come to another folder
    for name in ("model_index.json", *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_bytes((tiny / name).read_bytes())
    (elsewhere / "scheduler").mkdir()
    (elsewhere / "scheduler/scheduler_config.json").write_bytes((tiny / "scheduler/scheduler_config.json").read_bytes())
    monkeypatch.setattr(of_api, "check_weights", lambda _models: None)
    monkeypatch.setattr(benchnets, "fetch_teacher", fetch)
    monkeypatch.setattr(benchparts, "fetch_teacher", fetch)
    monkeypatch.setattr(benchrun, "matmul_flops", lambda *_: log.append("matmul"))
    told: list[tuple[int, int]] = []
    options = {**QUICK, "steps": 1, "pictures": 1, "dtypes": ["fp32", "bf16"]}
    rows = us.bench([elsewhere], fetching=lambda *at: told.append(at), **options).rows
    assert [row.failed for row in rows] == [None, None]
    assert log == ["weights", "parts", "matmul", "matmul"]
    assert told == [(1, 2)] * 2


def test_weights_of_the_hub_are_safetensors_or_none(
    unet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository of .bin files is refused at once, not when it is fetched."""
    hub: Any = SimpleNamespace(repository=SimpleNamespace(id="org/name", commit="0" * 40), inside="", file=None)
    found = ResolvedTeacher(unet_folders["sd1"], "org/name", "name", None, hub=hub)
    monkeypatch.setattr(benchmodels, "resolve_teacher", lambda _text: found)
    with pytest.raises(UsageError, match="no weights that can be loaded"):
        us.bench(["org/name"], **QUICK)


def test_a_damaged_model_is_a_row(unet_folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(unet_folders["sd1"], tmp_path / "bad")
    config = {**CONFIGS["sd1"], "layers_per_block": 1}
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    good, bad = us.bench([unet_folders["sd1"], tmp_path / "bad"], **QUICK).rows
    assert (good.failed, bad.unet_ms) == (None, None)
    assert bad.failed is not None
    assert bad.failed.startswith("diffusers cannot load the student: Error(s) in loading")


def test_the_exit_code_says_that_a_row_failed(
    unet_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    FullDevice(monkeypatch, dict(CONFIGS["two-levels"]), 1)
    out = tmp_path / "bench.json"
    words = [str(unet_folders[name]) for name in ("sd1", "two-levels")]
    options = {"device": "cpu", "latent": "8", "rounds": 1, "warm_up": 1, "memory": False, "guidance": 1.0}
    with pytest.raises(typer.Exit) as ended:
        RUN(words, out=out, quiet=True, **options)
    assert ended.value.exit_code == 1
    assert [row["failed"] for row in json.loads(out.read_text())["rows"]] == [None, OUT_OF_MEMORY]
    assert OUT_OF_MEMORY in capsys.readouterr().err
    RUN(words[:1], quiet=True, **options)  # which ends as it should


@pytest.mark.parametrize("samples", [0, 1, 2, 4], ids=["loading", "forward", "guided", "batch"])
def test_out_of_memory_is_a_row(
    unet_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """Whichever call it is, the others go on and have their times; and a report shows it."""
    FullDevice(monkeypatch, dict(CONFIGS["two-levels"]), samples)
    folders = [unet_folders[name] for name in ("two-levels", "sd1", "sd2")]
    options = {**QUICK, "guidance": 2.0, "batches": [1, 4]}
    report = us.bench(folders, **options)
    for start, batch in ((0, 1), (3, 4)):
        bad, *others = report.rows[start : start + 3]
        once, twice = batch < samples, 2 * batch < samples
        assert (bad.unet_ms is not None, bad.guided_ms is not None) == (once, twice)
        expected = None if twice else f"with guidance: {OUT_OF_MEMORY}" if once else OUT_OF_MEMORY
        assert bad.failed == expected
        assert all(row.failed is None and row.unet_ms is not None and row.guided_ms is not None for row in others)
        assert all((row.ratio_to_first is not None) == once for row in others)  # there is no first to compare with
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report.to_json()))
    us.report([path], tmp_path / "report.html")
    assert OUT_OF_MEMORY in (tmp_path / "report.html").read_text()


def test_the_memory_of_what_failed_is_given_back(
    unet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDevice(monkeypatch, dict(CONFIGS["two-levels"]), 1)
    us.bench([unet_folders["two-levels"], unet_folders["sd1"]], **QUICK)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is UNet2DConditionModel]


def test_a_cpu_is_not_asked_for_more_than_is_free(
    unet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux would end the process; so what does not fit is not tried, at loading and at each batch."""
    folders = [unet_folders["sd1"], unet_folders["sdxl"]]
    small, large = (row.parameters * 4 for row in us.bench(folders, run=False).rows)
    assert large > 1.2 * small
    monkeypatch.setattr(benchrun, "available_bytes", lambda: int(1.2 * small))
    first, second = us.bench(folders, **QUICK).rows
    assert first.failed is None
    assert second.failed is not None
    assert second.failed.startswith("out of memory beside 1 other model: it takes 0.0 GB more")
    found = {1: peak.Peak(small + 1000), 8: peak.Peak(3 * small)}
    monkeypatch.setattr(benchrun, "cpu_peaks", lambda _model, samples, **_: {n: found[n] for n in samples})
    rows = us.bench(folders[:1], **{**QUICK, "memory": True, "batches": [1, 8]}).rows
    assert [row.failed is None for row in rows] == [True, False]
    assert rows[0].peak_bytes == small + 1000


def test_nor_is_the_process_that_measures(unet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchrun, "available_bytes", lambda: 1000)
    monkeypatch.setattr(benchrun, "cpu_peaks", _never)
    (row,) = us.bench([unet_folders["sd1"]], **{**QUICK, "memory": True}).rows
    assert row.failed is not None
    assert row.failed.startswith("out of memory: it takes")


def test_one_forward_runs_where_two_at_once_do_not_fit(
    unet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = us.bench([unet_folders["sd1"]], run=False).rows[0].parameters * 4
    found = {1: peak.Peak(small + 1000), 2: peak.Peak(3 * small)}
    monkeypatch.setattr(benchrun, "available_bytes", lambda: int(1.2 * small))
    monkeypatch.setattr(benchrun, "cpu_peaks", lambda _model, samples, **_: {n: found[n] for n in samples})
    (row,) = us.bench([unet_folders["sd1"]], **{**QUICK, "memory": True, "guidance": 2.0}).rows
    assert row.unet_ms is not None
    assert row.guided_ms is None
    assert row.failed is not None
    assert row.failed.startswith("with guidance: out of memory")


def test_memory_that_could_not_be_measured_is_said(
    unet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = peak.Peak(failed="ImportError: no")
    monkeypatch.setattr(benchrun, "cpu_peaks", lambda _model, samples, **_: dict.fromkeys(samples, failed))
    (row,) = us.bench([unet_folders["sd1"]], **{**QUICK, "memory": True}).rows
    assert row.unet_ms is not None
    assert (row.failed, row.peak_bytes, row.peak_is) == ("memory: ImportError: no", None, None)


def test_what_an_allocator_held_outlives_its_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measured peak starts the counter anew. A stand-in for torch's: there may be no GPU here."""
    held = {"now": 500, "most": 900}  # of before

    def reset(_device: torch.device) -> None:
        held["most"] = held["now"]

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _device: held["most"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 150)
    reserved = benchrun._Reserved(torch.device("cuda"))
    held["most"] = 800
    reserved.note()
    assert peak.cuda_peak(lambda: None, 7, torch.device("cuda")) == 57
    assert held["most"] == 500
    assert reserved.most() == 800
    assert benchrun._Reserved(CPU).most() is None


def test_what_a_process_of_its_own_says() -> None:
    lines = b'{"num_bytes": 10}\n{"num_bytes": 20}\n'
    assert peak.read_peaks([1, 2], 0, lines, b"") == {1: peak.Peak(10), 2: peak.Peak(20)}
    killed = peak.read_peaks([1, 2, 4], -9, lines + b'{"num_by', b"")
    assert killed[2] == peak.Peak(20)
    assert killed[4].failed == "out of memory: the system ended the process (signal 9)"
    assert peak.read_peaks([1], -11, b"", b"")[1].failed == "the process ended by signal 11"  # no want of memory
    stray = b'Intel MKL WARNING\n[1]\n{"num_bytes": "many"}\n' + lines
    assert peak.read_peaks([1, 2], 0, stray, b"") == {1: peak.Peak(10), 2: peak.Peak(20)}
    stopped = peak.read_peaks([1, 2, 4], 0, b'{"num_bytes": null}\n{"failed": "out of memory"}\n', b"")
    assert stopped == {1: peak.Peak(), 2: peak.Peak(failed=OUT_OF_MEMORY), 4: peak.Peak(failed=OUT_OF_MEMORY)}
    assert peak.read_peaks([1], 1, b"", b"Traceback\nValueError: no\x1b[1m\n")[1].failed == "ValueError: no\\u001b[1m"
    assert peak.read_peaks([1], 0, b'{"failed": "out of memory"}\n', b"")[1].failed == OUT_OF_MEMORY


def test_why_a_network_could_not_be_run() -> None:
    for error in (torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("[enforce fail] can't allocate memory")):
        assert why_not(error) == OUT_OF_MEMORY
    assert why_not(RuntimeError("\"conv\" not implemented for 'Half'\nmore")) == "\"conv\" not implemented for 'Half'"
    assert why_not(ValueError("too many steps")) == why_not(IndexError("too many steps")) == "too many steps"
    assert why_not(KeyError("x")) is None


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_unet_alone_draws_with_the_parts_of_another(tiny: Path, tmp_path: Path) -> None:
    student = us.prune("bk_tiny", tiny, tmp_path / "student", unet_only=True).folder
    options = {**QUICK, "steps": 2, "pictures": 1}
    with pytest.raises(UsageError, match="a VAE and a text encoder") as refused:
        us.bench([student], **options)
    assert refused.value.hint is not None
    assert "--base" in refused.value.hint
    for scheduler, name in ((None, "DDIMScheduler"), ("pndm", "PNDMScheduler")):
        report = us.bench([tiny, student], base=tiny, scheduler=scheduler, **options)
        for row in report.rows:
            assert row.picture_s is not None
            assert (row.picture_s.scheduler, row.picture_s.steps) == (name, 2)


def test_pictures_take_the_unet_as_often_as_they_say(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    make = benchrun.load_network

    def counting(*given: Any, **options: Any) -> Any:
        unet = make(*given, **options)
        unet.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
        return unet

    monkeypatch.setattr(benchrun, "load_network", counting)
    options = {**QUICK, "batches": [3], "pictures": 1, "steps": 4}
    us.bench([tiny], **options)
    assert seen == [3] * 2 + [3] * 8  # one warm-up of each
    seen.clear()
    us.bench([tiny], **{**options, "guidance": 3.0})
    assert seen == [3] * 2 + [6] * 2 + [6] * 8


def test_random_parts_are_those_of_the_configs(tiny: Path) -> None:
    """A pipeline's own; and stand-ins for a U-Net alone, which have the size of SD v1's and v2's."""
    options = {**QUICK, "steps": 1, "pictures": 1}
    (row,) = us.bench(["tiny-random"], random=True, **options).rows
    assert row.failed is None
    assert row.picture_s is not None
    for name, text_params in (("sd-v1-random", 123_060_480), ("sd-v2-random", 340_387_840)):
        (model,) = find_models([name])
        configs = benchparts.find_parts(model, None, random=True)
        parts = benchparts.load_all_parts(configs, torch.device("meta"), torch.float16, random=True)
        assert sum(p.numel() for p in parts.vae.parameters()) == 83_653_863
        assert sum(p.numel() for p in parts.text_encoder.parameters()) == text_params
        assert parts.vae.dtype == parts.text_encoder.dtype == torch.float16
        assert vae_costs(configs.vae, (512, 512)).params == 83_653_863
        assert text_encoder_costs(configs.text_encoder).params == text_params
    with pytest.raises(UsageError, match="conditions beside time and text|does not fit"):
        us.bench(["sdxl-random"], random=True, base="toy", **options)
    with pytest.raises(UsageError, match="a VAE and a text encoder"):
        us.bench(["sdxl-random"], random=True, **options)


# -- compiling ---------------------------------------------------------------------------------------------------------


def test_a_compiled_unet_is_compared_with_itself_at_each_size(
    unet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile is another's; here it is replaced by what leaves forwards as they are, or spoils those of one size.

    Each size is a compilation of its own.
    """

    def compiling(unet: Any, *, dynamic: bool) -> None:
        assert not dynamic
        off = {1: 1.0, 2: 1.0001, 3: 1.0, 6: 1.01}
        unet._compiled_call_impl = lambda x, *rest, **options: (off[len(x)] * unet.forward(x, *rest, **options)[0],)

    monkeypatch.setattr(UNet2DConditionModel, "compile", compiling)
    options = {**QUICK, "batches": [1, 3], "guidance": 2.0}
    first, second = us.bench([unet_folders["sd1"]], compiled=True, **options).rows
    assert first.compile
    assert first.failed is None
    assert first.compile_difference == pytest.approx(1e-4, rel=0.1)
    assert second.unet_ms is not None
    assert second.guided_ms is None
    assert second.compile_difference == 0
    assert second.failed is not None
    assert "with guidance: the compiled U-Net gives another output: it differs by 0.01 of its norm" in second.failed


@pytest.mark.extra
def test_torch_compiles_every_model_at_every_size(unet_folders: dict[str, Path]) -> None:
    """More models and sizes than torch's own limit of recompilations, beyond which it would run them eagerly."""
    pytest.importorskip("torch._inductor")
    import torch._dynamo

    folders = [unet_folders[name] for name in ("two-levels", "no-mid")]
    config: Any = torch._dynamo.config
    with config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        rows = us.bench(folders, compiled=True, **{**QUICK, "batches": [1, 2]}).rows
    assert [row.failed for row in rows] == [None] * 4
    assert all(row.compile_difference is not None and row.compile_difference < 1e-4 for row in rows)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtypes": ["fp8"]}, "no such dtype"),
        ({"batches": [0]}, "batch must be 1 or more"),
        ({"batches": []}, "no batch"),
        ({"steps": 0}, "steps must be"),
        ({"rounds": 0}, "rounds must be"),
        ({"warm_up": 0}, "warm-up must be"),
        ({"base": "toy"}, "a base is for whole pictures"),
        ({"scheduler": "ddmi", "steps": 1}, "no scheduler"),
        ({"scheduler": "lcm", "steps": 51}, "does not take this number of steps"),
        ({"scheduler": "ddim", "steps": 1001}, "does not take this number of steps"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"latent": 0}, "no size of latents"),
        ({"device": "abacus"}, "no such device"),
        ({"models": []}, "no model"),
        ({"models": [""]}, "empty text"),
    ],
    ids=str,
)
def test_wrong_arguments(options: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchrun, "load_network", _never)
    with pytest.raises(UsageError, match=match):
        us.bench(options.pop("models", ["tiny-random"]), **{**QUICK, **options})


def _never(*_given: Any, **_options: Any) -> Any:
    raise AssertionError("something was loaded")


def test_wrong_models_are_refused_before_any_is_loaded(
    tmp_path: Path, unet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchrun, "load_network", _never)
    config = read_object(bundled_folder("sd-v1-random") / "config.json")
    plan = write_paper_student(tmp_path / "mine.json", "bk_tiny", "sd-v1")
    for name, changed in (("bare", config), ("other", {**config, "_class_name": "FluxTransformer2DModel"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(changed))
    cases: list[tuple[Any, type[SurgeryError], str]] = [
        ("tiny-randmo", TeacherError, "no model"),
        (tmp_path / "other", ConfigError, "not a conditional U-Net"),
        (tmp_path / "bare", UsageError, "no weights"),
        (plan, UsageError, "no weights"),
        (unet_folders["sd1"] / "diffusion_pytorch_model.safetensors", TeacherError, "no U-Net in the original layout"),
    ]
    for model, error, match in cases:
        with pytest.raises(error, match=match):
            us.bench(["tiny-random", model], **QUICK)


def test_a_plan_is_benched_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.json").write_text(us.plan("bk_tiny", "tiny-random").to_json())
    row = us.bench(["tiny-random", tmp_path / "mine.json"], random=True, **QUICK).rows[1]
    assert (row.model, row.failed) == ("mine", None)
    assert row.ratio_to_first is not None


def test_the_json_is_what_a_report_reads(unet_folders: dict[str, Path], tmp_path: Path) -> None:
    """Of a bench that ran and of one that counted, through JSON and with nothing that JSON has not."""
    ran = us.bench([unet_folders["sd1"]], **QUICK)
    counted = us.bench(["sd-v1-random"], run=False)
    for report in (ran, counted):
        text = json.dumps(report.to_json(), allow_nan=False)
        assert Bench.model_validate(json.loads(text)).rows[0].parameters == report.rows[0].parameters
        path = tmp_path / f"{len(text)}.json"
        path.write_text(text)
        us.report([path], tmp_path / f"{len(text)}.html")
    page = (tmp_path / f"{len(text)}.html").read_text("utf-8")
    assert "859,520,964" in page
    assert "counted only" in page
    assert isinstance(ran, BenchReport)


def test_the_peak_grows_with_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process: the rise holds the weights, once, and more for more samples.

    It imports what this one does, whatever lies in the folder where it starts.
    """
    (tmp_path / "json.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", ".")])
    (model,) = find_models(["tiny-random"], latent=(32, 32))
    found = peak.cpu_peaks(model, [4, 1], dtype="fp32", channels_last=False)
    weights = 4 * model.counts.params
    assert [of.failed for of in found.values()] == [None, None]
    if found[1].num_bytes is None:
        pytest.skip("this system does not say how much memory a process has")
    assert found[4].num_bytes is not None
    assert weights < found[1].num_bytes <= found[4].num_bytes < weights + 400e6


def test_linux_ends_the_measured_process_first() -> None:
    score = Path("/proc/self/oom_score_adj")
    if not score.exists():
        pytest.skip("this is not Linux")
    code = f"from unet_surgery.runtime.machine import offer_memory; offer_memory(); print(open({str(score)!r}).read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1000"


def test_a_missing_torch_is_named(tmp_path: Path) -> None:
    code = f"import sys; sys.modules['torch'] = None\n{main_with('bench', 'tiny-random')}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "--no-run counts parameters and MACs without them" in done.stderr


def test_every_dtype_has_a_name() -> None:
    assert set(of_api.DTYPE_NAMES) == set(benchrun.DTYPES) == set(benchrun.COMPILED_TOLERANCE)
