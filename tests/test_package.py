"""The package itself: its public names, its wheel, its examples, the documents that make promises."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import unet_surgery
from unet_surgery import errors
from unet_surgery.errors import SurgeryError
from unet_surgery.recipe import builtin_names

ROOT = Path(__file__).resolve().parents[1]


def test_public_names_are_complete_and_resolve() -> None:
    named = {
        "load_recipe",
        "Recipe",
        "inspect_model",
        "plan",
        "prune",
        "check",
        "verify",
        "push",
        "PushResult",
        "draw",
        "export",
        "controlnet",
        "transplant",
        "convert",
        "make_cache",
        "generate",
        "report",
        "demo",
        "Demo",
        "get_data",
        "LatentCache",
        "score",
        "bench",
        "BenchReport",
        "ScoreReport",
        "make_statistics",
        "add_scores",
        "SurgeryPlan",
        "SurgeryError",
    }
    assert named <= set(unet_surgery.__all__)
    assert unet_surgery.__all__ == sorted(unet_surgery.__all__, key=lambda n: (n.islower(), n))
    for name in unet_surgery.__all__:
        value = getattr(unet_surgery, name)
        assert isinstance(value, str) or inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        _ = unet_surgery.prnue  # type: ignore[attr-defined]


def test_the_error_tree_is_drawn_whole() -> None:
    drawn = errors.__doc__ or ""
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, SurgeryError)]
    assert len(classes) == 18
    for error in classes:
        line = next(line for line in drawn.splitlines() if f"{error.__name__} " in line)
        assert f" {error.exit_code} " in line
        assert error.__name__ in errors.__all__


def test_the_wheel_carries_recipes_and_teachers(tmp_path: Path) -> None:
    """Build the real wheel, unpack it elsewhere, and use it from there."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert {p.stem for p in (site / "unet_surgery" / "_recipes").glob("*.yaml")} == set(builtin_names())
    assert (site / "unet_surgery" / "py.typed").is_file()
    code = (
        "import unet_surgery; print(unet_surgery.__file__);"
        "print(unet_surgery.prune('bk_tiny', 'tiny-random', 'out').plan.student.params)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "UNET_SURGERY_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [str(site / "unet_surgery" / "__init__.py"), "815140"]
    assert (tmp_path / "out" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()  # of the built-in teacher
    assert (site / "unet_surgery" / "_licences" / "creativeml-openrail-m.txt").is_file()


def test_the_checkout_finds_its_recipes() -> None:
    assert (ROOT / "recipes").is_dir()
    assert not (ROOT / "unet_surgery" / "_recipes").exists()
    assert len(builtin_names()) == len(list((ROOT / "recipes").glob("*.yaml"))) == 9


def test_the_yaml_example(tmp_path: Path) -> None:
    plan = unet_surgery.prune(ROOT / "examples" / "thin_middle.yaml", "tiny-random", tmp_path / "out").plan
    assert plan.student_config["mid_block_type"] == "UNetMidBlock2D"
    assert plan.student_config["down_block_types"][2] == "DownBlock2D"
    unet_surgery.verify(tmp_path / "out", "tiny-random")


def test_the_python_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(ROOT / "examples" / "sweep.py"))
    module["main"]("tiny-random", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "16 plans" in printed
    assert "tensors equal the teacher's" in printed
    unet_surgery.verify(tmp_path / "out", "tiny-random")


def test_only_the_command_line_prints() -> None:
    files = [p for p in (ROOT / "unet_surgery").rglob("*.py") if p.parent.name != "cli"]
    assert len(files) > 40
    assert not [p.name for p in files if re.search(r"\bprint\(", p.read_text())]


def test_only_disk_changes_files() -> None:
    """One shim around disk.py can fail every call that changes a file, because no other module makes one."""
    changing = (
        "os.rename", "os.replace", "os.unlink", "os.remove", "os.link(", "os.write(", "os.ftruncate", "os.mkdir",
        ".write_text(", ".write_bytes(", ".unlink(", ".rename(", "shutil.", ".touch(", "fsync(", ".mkdir(",
        "os.makedirs", "os.truncate", "os.symlink", ".symlink_to(", "O_CREAT", "O_WRONLY", '"w"', '"wb"',
    )  # fmt: skip
    files = [p for p in (ROOT / "unet_surgery").rglob("*.py") if p.name != "disk.py"]
    found = {
        f"{p.name}: {line.strip()}"
        for p in files
        for line in p.read_text().splitlines()
        if any(word in line for word in changing) and "disk." not in line and "devnull" not in line
    }
    assert not found


def test_files_stay_short() -> None:
    lengths = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "unet_surgery").rglob("*.py")}
    assert len(lengths) > 40
    assert max(lengths.values()) <= 500
