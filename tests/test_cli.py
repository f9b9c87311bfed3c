"""The real command line, as a process: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from configs import CONFIGS
from safetensors.numpy import save_file
from teachers import WEIGHTS, entries, write_unet
from warm import run_tool

from unet_surgery.cli import sink

COMMANDS = [
    "inspect",
    "plan",
    "draw",
    "prune",
    "check",
    "verify",
    "export",
    "push",
    "controlnet",
    "transplant",
    "convert",
    "cache",
    "generate",
    "score",
    "bench",
    "stats",
    "demo",
    "report",
    "doctor",
]
RECIPE_COMMANDS = ["show", "check", "copy", "diff"]
DATA_COMMANDS = ["ls", "get"]


def tool(*words: str, cwd: Path | None = None, code: int = 0, env: dict[str, str] | None = None) -> tuple[str, str]:
    """Run the command line and return (stdout, stderr); its exit code must be ``code``."""
    result = run_tool(words, cwd=cwd, env={**os.environ, "COLUMNS": "200", **(env or {})})
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr or "--debug" in words
    return result.stdout, result.stderr


@pytest.mark.parametrize(
    "command",
    [[c] for c in COMMANDS]
    + [["recipes", c] for c in RECIPE_COMMANDS]
    + [["recipes"]]
    + [["data", c] for c in DATA_COMMANDS],
)
def test_every_help_has_an_example(command: list[str]) -> None:
    out, _ = tool(*command, "--help")
    assert f"Example: unet-surgery {' '.join(command)}" in out


def test_the_model_of_a_cache_is_a_pipeline_and_nothing_else() -> None:
    out, _ = tool("cache", "--help")
    words = " ".join(out.replace("│", " ").split())
    assert "whose VAE and tokenizer encode: a diffusers folder, a Hub id org/name[@revision], or" in words
    assert "single .safetensors" not in words


def test_help_and_version() -> None:
    out, _ = tool("--help")
    assert all(command in out for command in [*COMMANDS, "recipes", "data"])
    assert tool("-h")[0] == out
    import unet_surgery

    assert tool("--version")[0] == f"unet-surgery {unet_surgery.__version__}\n"


def test_the_whole_way(tmp_path: Path) -> None:
    out, err = tool("prune", "--recipe", "bk_tiny", "--teacher", "tiny-random", cwd=tmp_path)
    assert out == "tiny-random-bk_tiny\n"  # stdout is data: the path, for scripts
    assert "next:  unet-surgery check" in err
    out, _ = tool("check", "tiny-random-bk_tiny", "--teacher", "tiny-random", cwd=tmp_path)
    assert "358 tensors, 3.3 MB, equal the teacher's, bit for bit; so do 10 other files" in out
    out, _ = tool("verify", "tiny-random-bk_tiny", cwd=tmp_path)
    assert "0 missing, 0 unexpected" in out
    assert tool("prune", "-r", "bk_tiny", "-t", "tiny-random", cwd=tmp_path, code=4)[0] == ""
    assert tool("prune", "-r", "bk_tiny", "-t", "tiny-random", "--force", "-q", cwd=tmp_path)[1] == ""
    assert entries(tmp_path) == ["tiny-random-bk_tiny"]


def test_recipes_table() -> None:
    out, _ = tool("recipes")
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "323.4 M (38%)" in rows["bk_tiny"]
    assert "326.8 M (38%)" in rows["bk_tiny"]
    assert rows["bk_tiny"].rstrip().endswith("–")
    assert "1.331 G (52%)" in rows["ssd_1b"]
    assert "782.8 M (30%)" in rows["koala_700m"]
    data = json.loads(tool("recipes", "--json")[0])
    assert len(data) == 9
    assert {r["name"]: r["leaves"] for r in data}["sdxs_512"]["sd1"]["params"] == 315_746_244


def test_recipe_commands(tmp_path: Path) -> None:
    out, _ = tool("recipes", "show", "bk_tiny")
    assert "extends" not in out
    assert "- down.*.layers.1" in out
    tool("recipes", "copy", "bk_tiny", "mine.yaml", cwd=tmp_path)
    assert "extends: bk_small" in (tmp_path / "mine.yaml").read_text()
    tool("recipes", "copy", "bk_tiny", "mine.yaml", cwd=tmp_path, code=4)
    out, _ = tool("recipes", "check", "mine.yaml", cwd=tmp_path)
    assert "valid for sd1, sd2" in out
    out, _ = tool("recipes", "diff", "bk_small", "bk_tiny")
    assert "+ down.3\n+ up.0\n3 selectors in both" in out


def test_plan_needs_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["sd1"]))
    out, _ = tool("plan", "--recipe", "bk_tiny", "--teacher", str(tmp_path))
    assert "weights: none read" in out
    assert "358 tensors copied byte for byte" in out
    assert "sd1" in tool("inspect", str(tmp_path))[0]
    assert entries(tmp_path) == ["config.json"]
    _, err = tool("prune", "--recipe", "bk_tiny", "--teacher", str(tmp_path), "--out", str(tmp_path / "x"), code=3)
    assert "no safetensors weights" in err


def test_plan_json_is_the_whole_plan() -> None:
    data = json.loads(tool("plan", "-r", "bk_tiny", "-t", "sd-v1-random", "--json")[0])
    assert data["teacher"]["params"] == 859_520_964
    assert data["student"]["params"] == 323_384_964
    assert data["student"]["macs"] == 204_952_698_880
    assert data["student"]["config"]["block_out_channels"] == [320, 640, 1280]
    assert data["student"]["bytes"] == 323_384_964 * 4
    assert data["weights"]["up_blocks.0.resnets.0.conv1.weight"] == "up_blocks.1.resnets.0.conv1.weight"


def test_plan_shows_what_matters() -> None:
    out, _ = tool("plan", "-r", "bk_tiny", "-t", "sd-v1-random")
    for part in ("859,520,964", "323,384,964", "-62.4%", "338.6 G", "205.0 G", "242.8 G", "layers_per_block", "1.29 GB",
                 "down_blocks.2.downsamplers.0.conv.weight", "up_blocks.1.resnets.0"):  # fmt: skip
        assert part in out
    half, _ = tool("plan", "-r", "bk_tiny", "-t", "sd-v1-random", "--dtype", "fp16")
    assert "converted to F16" in half
    assert "646.8 MB" in half


def test_plan_shows_the_graphs_differences() -> None:
    out, _ = tool("plan", "-r", "bk_tiny", "-t", "sd-v1-random", "--graph")
    lines = out.splitlines()
    assert lines[:2] == ["--- teacher", "+++ student"]
    assert "-  sampler 1280  <- down_blocks.2.downsamplers.0" in lines
    assert "-mid 1280 channels" in lines
    assert "+mid none" in lines


def test_inspect() -> None:
    out, _ = tool("inspect", "sd-v1-random")
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "with up.2.layers.1" in rows["down.1.layers.1"]
    assert "206,080 parameters stay" in rows["down.0.attentions.0"]
    assert "with up.0" in rows["down.3"]
    assert rows["mid"].rstrip().endswith("yes")
    assert "97.04 M" in rows["mid"]
    data = json.loads(tool("inspect", "sd-v1-random", "--json")[0])
    assert data["counts"]["params"] == 859_520_964
    parts = [n["counts"]["params"] for n in data["nodes"] if n["kind"] in ("stem", "stage", "mid")]
    assert sum(parts) == 859_520_964
    layers = {n["selector"]: n for n in data["nodes"]}
    assert layers["up.0.layers.1"]["together"] == ["down.3.layers.1"]
    assert layers["up.0.layers.0"]["removable"] == "no"
    assert "(rule 7)" in layers["up.0.layers.0"]["note"]


ERRORS = [
    (["plan", "-r", "bk_tyny", "-t", "tiny-random"], 2, "did you mean 'bk_tiny'"),
    (["plan", "-r", "koala_700m", "-t", "sd-v1-random"], 2, "not for this teacher"),
    (["plan", "-r", "bk_tiny", "-t", "tiny-randm"], 3, "did you mean 'tiny-random'"),
    (["plan", "-r", "bk_tiny", "-t", "./nowhere"], 3, "there is no model"),
    (["plan", "-r", "bk_tiny"], 5, "Hub cannot be reached"),
    (["plan", "-r", "bk_tiny", "-t", "tiny-random", "--dtype", "fp8"], 2, "fp16"),
    (["prune", "-r", "bk_tiny", "-t", "tiny-random", "--max-shard-size", "big"], 2, "not a size"),
    (["prune", "-r", "bk_tiny", "-t", "tiny-random", "-o", "no/such/folder"], 4, "does not exist"),
    (["check", "nowhere"], 2, "no such folder"),
    (["plan", "-r", "bk_tiny", "-t", ""], 2, "empty"),
    (["prune", "-r", "bk_tiny", "-t", "tiny-random", "-o", ""], 4, "output"),
    (["check", "."], 6, "no readable plan.json"),
    (["verify", "."], 6, "no readable plan.json"),
    (["recipes", "show", "x.yaml"], 2, "x.yaml does not exist"),
    (["plan"], 2, "Missing option"),
    (["plan", "--recip", "x"], 2, "--recipe"),
    (["prnue"], 2, "prune"),
]


@pytest.mark.parametrize(("words", "code", "says"), ERRORS, ids=[" ".join(e[0]) for e in ERRORS])
def test_errors_have_one_message_and_a_code(words: list[str], code: int, says: str, tmp_path: Path) -> None:
    out, err = tool(*words, cwd=tmp_path, code=code)
    assert out == ""
    assert says in err
    assert entries(tmp_path) == []


def test_the_working_directory_is_not_replaced(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for out in (".", "..", str(here), "./"):
        _, err = tool("prune", "-r", "bk_tiny", "-t", "tiny-random", "-o", out, "--force", cwd=here, code=4)
        assert "the working directory, or around it" in err
    assert entries(tmp_path) == ["here"]


def test_what_is_printed_can_be_pasted(tmp_path: Path) -> None:
    _, err = tool("prune", "-r", "bk_tiny", "-t", "tiny-random", "-o", "sp ace", cwd=tmp_path)
    (line,) = re.findall("unet-surgery (check .*?)    ", err)
    import shlex

    assert "equal the teacher's" in tool(*shlex.split(line), cwd=tmp_path)[0]


def test_a_terminal_without_the_characters() -> None:
    out, _ = tool("recipes", env={"PYTHONIOENCODING": "ascii"})
    assert "bk_tiny" in out


def test_a_full_disk_under_the_output() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "unet_surgery", "recipes"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 4
    assert result.stderr == "error: No space left on device\n"


def test_a_reader_that_has_seen_enough() -> None:
    command = f"{sys.executable} -m unet_surgery plan -r bk_tiny -t sd-v1-random --json | head -1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "{\n", "")


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    _, err = tool("--debug", "check", ".", cwd=tmp_path, code=6)
    assert "Traceback" in err


def test_a_truncated_file(tmp_path: Path) -> None:
    folder = write_unet(tmp_path / "teacher", CONFIGS["sd1"])
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    for words in (["plan"], ["prune", "-o", str(tmp_path / "out")]):
        _, err = tool(words[0], "-r", "bk_tiny", "-t", str(folder), *words[1:], code=3)
        assert "cut short" in err
        assert str(folder / WEIGHTS) in err
    assert entries(tmp_path) == ["teacher"]


def test_text_from_inputs_is_escaped(tmp_path: Path) -> None:
    config = {**CONFIGS["sd1"], "down_block_types": ["\x1b]0;owned\x07[red]"] * 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, err = tool("inspect", str(tmp_path), code=3)
    assert "\x1b" not in err
    assert "[red]" in err


def test_numbers_are_not_coloured_when_piped() -> None:
    out, _ = tool("plan", "-r", "bk_tiny", "-t", "tiny-random")
    assert not re.search("\x1b", out)


def test_a_log_is_told_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with sink.progress_bar("drawing", quiet=False, of_bytes=False) as bar:
        bar(1, 2000)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sink, "SECONDS_A_LINE", 0.0)
    for quiet, shown in ((False, "drawing: 1,000 of 2,000\n"), (True, "")):
        with sink.progress_bar("drawing", quiet=quiet, of_bytes=False) as bar:
            bar(1000, 2000)
        assert capsys.readouterr().err == shown
    with sink.progress_bar("getting the model", quiet=False) as bar:
        bar(10**9, 3 * 10**9)
    assert capsys.readouterr().err == "getting the model: 1,000 of 3,000 MB\n"


# --- law 8: what a process loads ------------------------------------------------------------------------------------

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft")
LOADED = "import sys; print(*sorted(m.partition('.')[0] for m in sys.modules if '.' not in m), file=sys.stderr)"


def loaded(code: str, cwd: Path) -> set[str]:
    """Run ``code`` in a fresh interpreter and return the top-level modules that it has loaded at its end."""
    script = f"import atexit, sys\natexit.register(lambda: exec({LOADED!r}))\n{code}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=cwd)
    return set(result.stderr.splitlines()[-1].split())


def main_with(*words: str) -> str:
    return f"import sys; sys.argv = {['unet-surgery', *words]!r}\nfrom unet_surgery.cli.main import main; main()"


CASES = {
    "import": ("import unet_surgery; unet_surgery.verify", ("numpy", "rich")),
    "help": (main_with("--help"), ("numpy", "pydantic", "huggingface_hub", "yaml")),
    "plan": (main_with("plan", "-r", "bk_tiny", "-t", "sd-v1-random"), ("numpy", "huggingface_hub")),
    "prune": (main_with("prune", "-r", "bk_tiny", "-t", "{tiny}", "-o", "out"), ("numpy", "huggingface_hub")),
    "prune --dtype": (main_with("prune", "-r", "bk_tiny", "-t", "{tiny}", "-o", "out", "--dtype", "fp16"), ()),
    "check": (main_with("check", "{student}", "-t", "{tiny}"), ()),
    "push --dry-run": (main_with("push", "{student}", "org/name", "--dry-run"), ("huggingface_hub",)),
    "controlnet": (main_with("controlnet", "{student}", "-t", "{tiny}", "-o", "out"), ()),
    "transplant": (
        main_with("transplant", "{lora}", "--plan", "{student}", "-o", "out.safetensors"),
        ("numpy", "huggingface_hub"),
    ),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_no_heavy_module_is_loaded(case: str, tiny: Path, tmp_path: Path) -> None:
    import unet_surgery

    student = unet_surgery.prune("bk_tiny", tiny, tmp_path / "student").folder
    lora = {f"unet.conv_in.lora_{half}.weight": np.ones(shape) for half, shape in (("A", (1, 4, 3, 3)), ("B", (16, 1)))}
    save_file(lora, tmp_path / "lora.safetensors")
    code, others = CASES[case]
    for word, path in (("{tiny}", tiny), ("{student}", student), ("{lora}", tmp_path / "lora.safetensors")):
        code = code.replace(word, str(path))
    modules = loaded(code, tmp_path)
    assert "unet_surgery" in modules
    assert not modules & {*HEAVY, *others}
