"""Run files: what they say, what ``--set`` changes, and errors that know their line. All of it without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training import ROOT, run_command

from unet_surgery.distill import RunConfig, load_run, to_yaml
from unet_surgery.distill.runfile import parse_run
from unet_surgery.errors import RunError

PLAIN = """\
output: runs/x
student: ./student
teacher: tiny-random
data:
  cache: ./latents
steps: 10
optimizer: {lr: 5e-5, warmup: 3}
objectives:
  feature_kd: 2.0
"""

STEPS = PLAIN.replace("  feature_kd: 2.0\n", "  {task: 0, output_kd: 0, feature_kd: 0,\n   step_kd: 2.0}\n")

STAGES = """\
output: runs/x
student: ./student
data: {cache: ./latents}
batch: 128
optimizer: {lr: 1.0e-5, warmup: 10}
stages:
  - name: task
    steps: 500
    objectives: {output_kd: 0, feature_kd: 0}
  - name: kd
    steps: 400
    teacher: one
    optimizer: {warmup: 5}
  - name: features
    teacher: two
    objectives:
      feature_kd: {pairs: similarity}
"""


def test_short_forms_and_defaults() -> None:
    config = parse_run(PLAIN, "run.yaml")
    (stage,) = config.stages
    assert (stage.steps, stage.batch, stage.teacher) == (10, 256, "tiny-random")
    assert (stage.optimizer.lr, stage.optimizer.warmup, stage.optimizer.weight_decay) == (5e-5, 3, 1e-2)
    assert (stage.objectives.feature_kd.weight, stage.objectives.feature_kd.pairs) == (2.0, "bk")


def test_all_examples_can_be_read() -> None:
    files = sorted((ROOT / "examples" / "runs").glob("*.yaml"))
    assert len(files) >= 11
    assert {path.stem for path in files if load_run(path).config.stages[-1].objectives.may_be_guided} == {"toy_steps"}


def test_the_run_files_of_the_manual_can_be_read() -> None:
    found = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    terms = [parse_run(text, "training.md").stages[0].objectives for text in found]
    assert [wanted.step_kd.weight for wanted in terms] == [0, 1]


def test_steps_alone() -> None:
    wanted = parse_run(STEPS, "run.yaml", ["objectives.step_kd.student_steps=4"]).stages[0].objectives
    assert wanted.needs_teacher
    assert (wanted.step_kd.weight, wanted.step_kd.student_steps, wanted.step_kd.teacher_steps) == (2.0, 4, 2)
    assert (wanted.step_kd.guided, wanted.step_kd.guidance, wanted.step_kd.task_share) == (0.1, (2.0, 14.0), 0.2)


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    data = {"output": "~/runs/x", "student": "s", "teacher": "t"}
    assert RunConfig.from_data({**data, "data": {"cache": "~/latents"}}).data.cache == "/home/somebody/latents"
    config = RunConfig.from_data({**data, "data": {"images": "~/{a,b}.tar"}})
    assert (config.output, config.data.images) == ("/home/somebody/runs/x", "/home/somebody/{a,b}.tar")
    assert RunConfig.from_data({**data, "data": {"images": "hub:~me/set"}}).data.images == "hub:~me/set"


def test_stages_take_what_they_do_not_say() -> None:
    config = parse_run(STAGES, "run.yaml")
    assert [stage.steps for stage in config.stages] == [500, 400, 50_000]
    assert [stage.batch for stage in config.stages] == [128] * 3
    assert [(s.optimizer.lr, s.optimizer.warmup) for s in config.stages] == [(1e-5, 10), (1e-5, 5), (1e-5, 10)]
    assert [stage.teacher for stage in config.stages] == [None, "one", "two"]
    assert config.num_steps == 50_900
    assert config.num_samples == 50_900 * 128


@pytest.mark.parametrize("text", [PLAIN, STAGES, STEPS], ids=["one stage", "stages", "steps"])
def test_what_is_printed_is_the_same_run(text: str) -> None:
    config = parse_run(text, "run.yaml")
    assert parse_run(to_yaml(config), "printed") == config
    assert RunConfig.from_data(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ("steps=7", lambda c: c.stages[0].steps == 7),
        ("optimizer.lr=1e-3", lambda c: c.stages[0].optimizer.lr == 1e-3 and c.stages[0].optimizer.warmup == 3),
        ("objectives.feature_kd.pairs=plan", lambda c: c.stages[0].objectives.feature_kd.weight == 2.0),
        ("micro_batch=null", lambda c: c.micro_batch is None),
        ("optimizer.clip=null", lambda c: c.stages[0].optimizer.clip is None),
        ("optimizer.warmup=null", lambda c: c.stages[0].optimizer.warmup == 0 and c.stages[0].optimizer.lr == 5e-5),
        ("optimizer=null", lambda c: c.stages[0].optimizer.warmup == 0),
        ("speed.dtype=null", lambda c: c.speed.dtype == "bf16"),
        ("data={images: ./pictures, cache: null}", lambda c: (c.data.images, c.data.cache) == ("./pictures", None)),
        ("pictures={every: 5, prompts: [a house]}", lambda c: c.pictures.prompts == ("a house",)),
        ("speed.dtype=fp32", lambda c: c.speed.dtype == "fp32"),
        ("objectives.step_kd.weight=0", lambda c: not c.stages[0].objectives.may_be_guided),
    ],
)
def test_set(change: str, read: Any) -> None:
    assert read(parse_run(PLAIN, "run.yaml", [change]))


def test_null_takes_a_key_away() -> None:
    config = parse_run(PLAIN, "run.yaml", ["data.cache=null", "data.images=./pictures"])
    assert (config.data.images, config.data.cache) == ("./pictures", None)
    assert [s.batch for s in parse_run(STAGES, "run.yaml", ["batch=null"]).stages] == [256] * 3
    assert [s.steps for s in parse_run(STAGES, "run.yaml", ["steps=null"]).stages] == [50_000] * 3
    assert [s.steps for s in parse_run(STAGES, "run.yaml", ["stages.1.steps=null"]).stages] == [500, 50_000, 50_000]
    for change, says in (
        ("data.cach=null", "did you mean 'cache'"),
        ("student=null", "has no 'student'"),
        ("data.cache=null", "no data is given"),
        ("teacher=null", "need a teacher"),
    ):
        with pytest.raises(RunError) as caught:
            parse_run(PLAIN, "run.yaml", [change])
        assert says in str(caught.value)


def test_a_change_is_not_blamed_for_another_key() -> None:
    with pytest.raises(RunError) as caught:
        parse_run(PLAIN.replace("teacher: tiny-random\n", ""), "run.yaml", ["seed=3"])
    assert caught.value.where == "run.yaml:1:1"


def test_set_at_the_top_is_meant_for_every_stage() -> None:
    config = parse_run(STAGES, "run.yaml", ["steps=3", "optimizer.warmup=1", "stages.2.batch=64"])
    assert [stage.steps for stage in config.stages] == [3, 3, 3]
    assert [stage.optimizer.warmup for stage in config.stages] == [1, 1, 1]
    assert [stage.batch for stage in config.stages] == [128, 128, 64]


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        (PLAIN.replace("steps:", "stepps:"), "run.yaml:6:1", "did you mean 'steps'"),
        (PLAIN.replace("warmup", "warm_up"), "run.yaml:7:23", "did you mean 'warmup'"),
        (PLAIN.replace("5e-5", "fast"), "run.yaml:7:13", "found:    fast\n  try:      lr: 5e-05, which is the default"),
        (PLAIN.replace("5e-5", "-1"), "run.yaml:7:13", "expected: more than 0"),
        (PLAIN.replace("5e-5", ".nan"), "run.yaml:7:17", "a finite number\n  found:    .nan\n  try:      write one"),
        (PLAIN.replace("5e-5", "-.inf"), "run.yaml:7:17", "try:      write one in digits"),
        (PLAIN.replace("5e-5", "nan"), "run.yaml:7:13", "a number, and a finite one\n  found:    nan\n  try: "),
        (PLAIN.replace("5e-5", "[1]"), "run.yaml:7:13", "expected: a number\n  found:    a list of 1\n  try: "),
        (PLAIN.replace("steps: 10", "steps: 1.5"), "run.yaml:6:1", "expected: a whole number\n  found:    1.5"),
        (PLAIN.replace("steps: 10", "steps: null"), "run.yaml:6:1", "expected: a whole number\n  found:    null"),
        (PLAIN + "speed: {compile: perhaps}\n", "run.yaml:10:9", "expected: true or false\n  found:    perhaps"),
        (PLAIN + "speed: fast\n", "run.yaml:10:1", "expected: a mapping: key: value\n  found:    fast"),
        (PLAIN + "pictures: {prompts: one}\n", "run.yaml:10:12", "expected: a list\n  found:    one"),
        (PLAIN.replace("./student", "5"), "run.yaml:2:1", 'expected: text\n  found:    5\n  try:      quote it: "5"'),
        (PLAIN.replace("./student", '""'), "run.yaml:2:1", "text of at least 1 characters"),
        (PLAIN.replace("warmup: 3", "betas: [0.9]"), "run.yaml:7:23", "'optimizer.betas' is too short"),
        (
            PLAIN.replace("warmup: 3", "betas: [0.9, 1]"),
            "run.yaml:7:36",
            "less than 1\n  found:    1\n  try:      betas: [0.9, 0.999]",
        ),
        (PLAIN + "ema: {decay: 2.0}\n", "run.yaml:10:7", "less than 1"),
        (
            PLAIN.replace("feature_kd: 2.0", "feature_kd: {pairs: plam}"),
            "run.yaml:9:16",
            "expected: bk, plan, attn1 or similarity\n  found:    plam\n  try:      did you mean 'plan'?",
        ),
        (PLAIN.replace("feature_kd: 2.0", "feature_kd: {pairs: all}"), "run.yaml:9:16", 'pairs: "bk", which is the d'),
        (
            PLAIN.replace("warmup: 3", "warmup: 10, schedule: linear"),
            "run.yaml:7:23",
            "fewer than 10 steps: after them the rate falls\n  try:      a shorter warmup, or schedule: constant",
        ),
        (PLAIN.replace("teacher: tiny-random\n", ""), "run.yaml:1:1", "need a teacher"),
        (
            PLAIN.replace("  cache: ./latents", "  cache: ./a\n  images: ./b"),
            "run.yaml:4:1",
            "expected: one of cache, images and toy\n  try:      take one out, such as by --set data.cache=null",
        ),
        (PLAIN.replace("  cache: ./latents", "  workers: 1"), "run.yaml:4:1", "no data is given"),
        (PLAIN.replace("student: ./student\n", ""), "run.yaml", "has no 'student'"),
        (PLAIN.replace("steps: 10", "steps: 0"), "run.yaml:6:1", "expected: 1 or more"),
        (PLAIN.replace("steps: 10", "steps: &a 10"), "run.yaml:6", "anchors are not allowed in a run file"),
        (PLAIN.replace("steps: 10", "steps: 10\nsteps: 11"), "run.yaml:7:1", "stands twice"),
        ("- a list\n", "run.yaml:1:1", "is not a mapping"),
        (STAGES.replace("steps: 400", "steps: many"), "run.yaml:11:5", "many"),
        (STAGES.replace("batch: 128", "batch: big"), "run.yaml:4:1", "big"),
        (STAGES.replace("    teacher: one\n", ""), "run.yaml:10", "need a teacher"),
        (PLAIN + "name: x\n", "run.yaml:10:1", "unknown key 'name'"),
        (PLAIN + "  step_kd: 1.0\n", "run.yaml:8:1", "try:      task: 0, output_kd: 0, feature_kd: 0"),
        (
            STEPS.replace("output_kd: 0", "output_kd: 0.5"),
            "run.yaml:8:1",
            "output_kd has one\n  try:      output_kd: 0",
        ),
        (STEPS.replace("{task: 0", "{min_snr: 5, task: 0"), "run.yaml:9:4", "scales by itself"),
        (STEPS + "noise: {timesteps: half_high}\n", "run.yaml:11:9", "noise.timesteps stays uniform"),
        (STEPS.replace("teacher: tiny-random\n", ""), "run.yaml", "need a teacher"),
        (
            STEPS.replace("step_kd: 2.0", "step_kd: {guidance: [3, 2]}"),
            "run.yaml:10:14",
            "from the lower to the higher",
        ),
        (STEPS.replace("step_kd: 2.0", "step_kd: {guided: 1.5}"), "run.yaml:10:14", "expected: 1 or less"),
        (STEPS.replace("step_kd: 2.0", "step_kd: {steps: 8}"), "run.yaml:10:14", "unknown key"),
        (STEPS.replace("step_kd: 2.0", "step_kd: 0"), "run.yaml:8:1", "weights are all 0"),
    ],
    ids=lambda value: "" if "\n" in value else value,
)
def test_errors_know_their_line(text: str, where: str, says: str) -> None:
    with pytest.raises(RunError) as caught:
        parse_run(text, "run.yaml")
    assert (caught.value.where or "").startswith(where), str(caught.value)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2
    assert "nput should" not in str(caught.value)
    if not re.search("YAML|mapping\\n|stands twice|at least", str(caught.value)):
        assert caught.value.hint, str(caught.value)


@pytest.mark.parametrize(
    "change", ["steps", "=3", "stages.7.steps=1", "data.cache.name=3", "optimizer.lrr=1", "a..b=1"]
)
def test_wrong_changes(change: str) -> None:
    with pytest.raises(RunError) as caught:
        parse_run(STAGES, "run.yaml", [change])
    assert "--set" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(RunError) as caught:
        load_run(tmp_path / "none.yaml")
    assert "examples/runs/" in (caught.value.hint or "")
    (tmp_path / "my_run.yaml").write_text(PLAIN)
    with pytest.raises(RunError) as caught:
        load_run(tmp_path / "myrun.yaml")
    assert caught.value.hint == f"did you mean {tmp_path / 'my_run.yaml'}?"
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="UTF-8"):
        load_run(tmp_path / "bytes.yaml")
    (tmp_path / "large.yaml").write_text("a: " + "x" * (1 << 20))
    with pytest.raises(RunError, match="too large"):
        load_run(tmp_path / "large.yaml")


def test_the_command_prints_the_whole_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(PLAIN)
    done = run_command("distill", str(tmp_path / "run.yaml"), "--set", "seed=5", "--print-config")
    assert done.returncode == 0, done.stderr
    config = parse_run(done.stdout, "printed")
    assert config == load_run(tmp_path / "run.yaml", ["seed=5"]).config
    typo = run_command("distill", str(tmp_path / "run.yaml"), "--set", "sede=5")
    assert typo.returncode == 2
    assert "did you mean 'seed'" in typo.stderr
    assert "Traceback" not in typo.stderr


def test_reading_a_run_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(PLAIN)
    code = (
        "import sys; from unet_surgery.distill import load_run, to_yaml; to_yaml(load_run(sys.argv[1]).config);"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.yaml")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
