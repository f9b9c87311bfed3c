"""The model card and the licence: what the Hub reads, what people paste, and what must travel with the files."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from configs import CONFIGS
from huggingface_hub import ModelCard
from teachers import entries, folder_bytes, write_unet
from warm import run_tool

import unet_surgery
from unet_surgery.checkpoint.licence import find_licence, is_licence_file
from unet_surgery.errors import UsageError
from unet_surgery.lower import quantity

LICENCES = Path(unet_surgery.__file__).parent / "_licences"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write_unet(tmp_path / "teacher", CONFIGS["sd1"])


def with_card(teacher: Path, front: str) -> Path:
    (teacher / "README.md").write_text(f"---\n{front}---\n\n# A model\n")
    return teacher


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def blocks(card: str, language: str) -> list[str]:
    """Return the fenced code blocks of one language, as a Markdown reader finds them."""
    found = re.findall(r"^(`{3,})(\w*)\n(.*?)\n\1$", card, re.MULTILINE | re.DOTALL)
    return [text for _, name, text in found if name == language]


# --- what the Hub reads ---------------------------------------------------------------------------------------------


def test_metadata_by_the_hubs_conventions(teacher: Path, tmp_path: Path) -> None:
    with_card(teacher, "license: creativeml-openrail-m\npipeline_tag: image-to-image\n")
    out = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out", teacher_id="me/my-finetune").folder
    assert card_of(out).data.to_dict() == {
        "base_model": "me/my-finetune",
        "base_model_relation": "finetune",
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "pipeline_tag": "image-to-image",
        "tags": ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "unet-surgery"],
    }


def test_a_local_teacher_is_no_base_model(teacher: Path, tmp_path: Path) -> None:
    out = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out").folder
    data = card_of(out).data.to_dict()
    assert not {"base_model", "license"} & data.keys()
    assert "this card cannot say which model it was" in card_of(out).text


def test_the_numbers_are_the_plans(teacher: Path, tmp_path: Path) -> None:
    result = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out")
    text = card_of(result.folder).text
    for counts in (result.plan.teacher, result.plan.student):
        for number in (counts.params, counts.macs, counts.macs_all):
            assert quantity(number) in text
    for part in result.plan.parts:
        assert f"| `{part.name}` | {quantity(part.teacher.params)} |" in text
    assert text.count("| removed |") == 3
    rows = dict(re.findall(r"^\| `([^`]+)` \| (\d+) \| [^|]+ \|$", text, re.MULTILINE))
    assert {selector: int(n) for selector, n in rows.items()} == {s: len(n) for s, n in result.plan.unused.items()}
    assert "Not trained yet" in text
    assert "(architecture.svg)" in text
    assert (result.folder / "architecture.svg").read_text() == unet_surgery.draw(result.plan)


# --- what people paste ----------------------------------------------------------------------------------------------


def test_the_python_of_a_pipelines_card_runs(tiny: Path, tmp_path: Path) -> None:
    out = unet_surgery.prune("bk_tiny", tiny, tmp_path / "out").folder
    whole, swapped = blocks(card_of(out).text, "python")
    check = "assert pipeline.unet.config.block_out_channels == [16, 32, 64], pipeline.unet.config\n"
    fast = 'pipeline.set_progress_bar_config(disable=True)\nimage = pipeline("x", num_inference_steps=1)'
    code = f"{whole.replace('image = pipeline(', f'{fast} #')}\n{check}\n{swapped}\n{check}"
    here = code.replace("this/model", str(out)).replace("the/teacher", str(tiny))
    done = subprocess.run([sys.executable, "-c", here], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_python_of_a_unets_card_runs(tiny: Path, tmp_path: Path) -> None:
    out = unet_surgery.prune("bk_tiny", tiny, tmp_path / "out", unet_only=True).folder
    (swapped,) = blocks(card_of(out).text, "python")
    code = swapped.replace("this/model", str(out)).replace("the/teacher", str(tiny))
    done = subprocess.run(
        [sys.executable, "-c", code + "\nassert pipeline.unet is unet"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "fp16"}, {"max_shard_size": 100_000}, {"license": "openrail++"}], ids=str
)
def test_the_command_of_a_card_makes_the_same_bytes(teacher: Path, tmp_path: Path, options: dict[str, str]) -> None:
    out = unet_surgery.prune("sdxs_512", teacher, tmp_path / "out", **options).folder
    (console,) = blocks(card_of(out).text, "console")
    words = shlex.split(console.removeprefix("$ ").replace("path/to/the/teacher", str(teacher)))
    done = run_tool([*words[1:], "--out", str(tmp_path / "again")], cwd=out)
    assert done.returncode == 0, done.stderr
    assert folder_bytes(tmp_path / "again") == folder_bytes(out)


# --- text of others -------------------------------------------------------------------------------------------------

NASTY = "```\n---\nlicense: mit\n---\n# x <script>alert(1)</script> | [a](b) ````` \u202e \x85 é"


def test_what_a_recipe_says_stays_inside_its_blocks(teacher: Path, tmp_path: Path) -> None:
    recipe = unet_surgery.Recipe(name="x", remove=("mid",), summary=NASTY, citation=NASTY, teacher="a: b # c\n- d")
    out = unet_surgery.prune(recipe, teacher, tmp_path / "out").folder
    card = card_of(out)
    assert "license" not in card.data.to_dict()
    (shown,) = blocks(card.text, "yaml")
    assert yaml.safe_load(shown) == recipe.to_data()
    outside = re.sub(r"^(`{3,})(\w*)\n(.*?)\n\1$", "", card.text, flags=re.MULTILINE | re.DOTALL)
    assert "<script>" in card.text
    assert "<script>" not in outside
    unet_surgery.check(out, teacher)


def test_a_choice_in_a_selector_does_not_end_a_table_cell(teacher: Path, tmp_path: Path) -> None:
    recipe = unet_surgery.Recipe(name="x", remove=("down.0|1.attentions.0",))
    text = card_of(unet_surgery.prune(recipe, teacher, tmp_path / "out").folder).text
    assert "| `down.0\\|1.attentions.0` |" in text
    assert "stock diffusers must hold its shell" in text


# --- the licence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identifier", "config", "file"),
    [
        ("creativeml-openrail-m", "sd1", "creativeml-openrail-m.txt"),
        ("openrail++", "sd2", "openrail++.txt"),
        ("openrail++", "sdxl", "openrail++-sdxl.txt"),
        ("apache-2.0", "sd1", "apache-2.0.txt"),
    ],
)
def test_a_known_licence_travels_with_its_text(tmp_path: Path, identifier: str, config: str, file: str) -> None:
    teacher = with_card(write_unet(tmp_path / "teacher", CONFIGS[config]), f"license: {identifier}\n")
    recipe = unet_surgery.Recipe(name="x", remove=("down.*.layers.1", "up.*.layers.1"))
    out = unet_surgery.prune(recipe, teacher, tmp_path / "out").folder
    text = (out / "LICENSE").read_text("utf-8")
    assert text == (LICENCES / file).read_text("utf-8")
    card = card_of(out)
    assert card.data.license == identifier
    assert "[LICENSE](LICENSE)" in card.text
    assert "**Notice of modification.**" in card.text
    if identifier == "apache-2.0":
        assert "### Use restrictions" not in card.text
    else:
        _, _, attached = text.rpartition("Attachment A")
        quoted = re.findall(r"^> ?(.*)$", card.text.partition("### Use restrictions")[2], re.MULTILINE)
        assert " ".join(" ".join(quoted).split()) == " ".join(attached.split()).removeprefix("Use Restrictions ")
        assert "exploit or harm minors" in " ".join(quoted)


def test_the_projects_own_licence_is_the_bundled_one() -> None:
    assert (LICENCES / "apache-2.0.txt").read_bytes() == (LICENCES.parents[1] / "LICENSE").read_bytes()


def test_the_teachers_own_texts_are_carried(teacher: Path, tmp_path: Path) -> None:
    with_card(teacher, "license: other\nlicense_name: my-licence\nlicense_link: LICENSE.md\n")
    own = {"LICENSE.md": "Mine, all mine.\n", "NOTICE": "é\r\n", "USE_POLICY.md": "Be kind.\n"}
    for name, text in own.items():
        (teacher / name).write_bytes(text.encode())
    (teacher / "LICENSES").mkdir()
    (teacher / "COPYING").write_bytes(b"\xff\xfe not text")
    out = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out").folder
    assert {name: (out / name).read_bytes().decode() for name in own} == own
    assert not {"LICENSE", "LICENSES", "COPYING"} & set(entries(out))
    card = card_of(out)
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "my-licence", "LICENSE.md")
    unet_surgery.prune("bk_base", teacher, out, force=True)  # its own files do not stand in the way
    unet_surgery.check(out, teacher)


def test_an_unknown_licence_is_said(teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out").folder
    assert "names no licence" in caplog.text
    assert "Unknown: the teacher's card names no licence" in card_of(out).text
    assert "LICENSE" not in entries(out)
    named = unet_surgery.prune("bk_tiny", teacher, tmp_path / "named", license="creativeml-openrail-m").folder
    assert card_of(named).data.license == "creativeml-openrail-m"
    assert "exploit or harm minors" in card_of(named).text


def test_a_students_licence_is_its_teachers(teacher: Path, tmp_path: Path) -> None:
    with_card(teacher, "license: creativeml-openrail-m\n")
    with pytest.raises(UsageError, match="carries its teacher's"):
        unet_surgery.prune("bk_tiny", teacher, tmp_path / "out", license="mit")
    with pytest.raises(UsageError, match="no licence's identifier|not a licence's identifier"):
        unet_surgery.prune("bk_tiny", teacher, tmp_path / "out", license="My Licence\nx: y")
    assert entries(tmp_path) == ["teacher"]
    first = unet_surgery.prune("bk_base", teacher, tmp_path / "first", license="creativeml-openrail-m").folder
    recipe = unet_surgery.Recipe(name="again", remove=("mid",))
    second = unet_surgery.prune(recipe, first, tmp_path / "second").folder  # a student as a teacher
    assert (second / "LICENSE").read_bytes() == (first / "LICENSE").read_bytes()
    assert card_of(second).data.license == "creativeml-openrail-m"


BOMB = "\n".join(["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)])
CARDS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "text": (lambda p: p.write_text("---\nlicense: mit\n---\n"), "mit"),
    "quoted": (lambda p: p.write_text("---\nlicense: 'mit'\n---\n"), "mit"),
    "list": (lambda p: p.write_text("---\nlicense: [mit]\n---\n"), "mit"),
    "lines": (lambda p: p.write_text("---\ntags:\n- license\n- a\nlicense:\n- mit\nx: y\n---\n"), "mit"),
    "windows": (lambda p: p.write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n"), "mit"),
    "dates and anchors": (lambda p: p.write_text("---\nd: 2022-1-1\na: &x 1\nlicense: mit\nb: *x\n---\n"), "mit"),
    "deeper": (lambda p: p.write_text("---\nmodel-index:\n- license: mit\n---\n"), None),
    "two": (lambda p: p.write_text("---\nlicense: [mit, apache-2.0]\n---\n"), None),
    "later": (lambda p: p.write_text("# Title\n\n---\nlicense: mit\n---\n"), None),
    "none": (lambda p: p.write_text("# Title\n"), None),
    "object": (lambda p: p.write_text("---\nlicense: {a: b}\n---\n"), None),
    "no identifier": (lambda p: p.write_text("---\nlicense: 'My own, (c) me'\n---\n"), None),
    "terminal codes": (lambda p: p.write_text('---\nlicense: "\\e[2J"\n---\n'), None),
    "not YAML": (lambda p: p.write_text("---\nlicense: [mit\n---\n"), None),
    "a tag": (lambda p: p.write_text("---\nlicense: !!python/object/apply:os.system [exit]\n---\n"), None),
    "a bomb": (lambda p: p.write_text(f"---\n{BOMB}\nlicense: mit\n---\n"), "mit"),
    "many values": (lambda p: p.write_text("---\n" + "- a\n" * 30_000 + "---\n"), None),
    "two megabytes": (lambda p: p.write_text("---\nlicense: mit\n---\n" + "x" * (2 << 20)), None),
    "not UTF-8": (lambda p: p.write_bytes(b"---\nlicense: mit\nx: \xff\n---\n"), None),
    "FIFO": (os.mkfifo, None),
    "folder": (lambda p: p.mkdir(), None),
    "nowhere": (lambda p: p.symlink_to("nowhere"), None),
}


@pytest.mark.parametrize("case", CARDS)
def test_cards_as_people_write_them(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    write, expected = CARDS[case]
    write(tmp_path / "README.md")
    assert find_licence(tmp_path, family=None).id == expected
    assert "\x1b" not in caplog.text


def test_a_notice_is_no_licence(teacher: Path, tmp_path: Path) -> None:
    with_card(teacher, "license: creativeml-openrail-m\n")
    (teacher / "NOTICE").write_text("Thanks.\n")
    (teacher / "LICENSE").write_text("")
    out = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out").folder
    assert (out / "NOTICE").read_text() == "Thanks.\n"
    assert "exploit or harm minors" in (out / "LICENSE").read_text("utf-8")
    assert "### Use restrictions" in card_of(out).text


def test_a_strangers_restrictions_are_shown_and_not_rendered(teacher: Path, tmp_path: Path) -> None:
    with_card(teacher, "license: other\n")
    nasty = "<img src=x onerror=alert(1)> [free](https://evil.example) \x1b[2J\n```\n# x\n"
    (teacher / "LICENSE").write_text("\n" * 500_000 + f"Attachment A\n\nUse Restrictions\n\n{nasty}")
    start = time.perf_counter()
    text = card_of(unet_surgery.prune("bk_tiny", teacher, tmp_path / "out").folder).text
    assert time.perf_counter() - start < 5  # it took an hour once
    outside = re.sub(r"^(`{3,})(\w*)\n(.*?)\n\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<img" in text
    assert "<img" not in outside
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("x: &a mit\nlicense: *a\ntags:\n- foo\n", None),
        ("license: null\n", None),
        ("license: none\n", None),
        ("license: NO\n", None),
    ],
)
def test_what_is_no_licence(tmp_path: Path, front: str, expected: str | None) -> None:
    with_card(tmp_path, front)
    assert find_licence(tmp_path, family=None).id == expected


def test_names_of_licence_files() -> None:
    yes = [
        "LICENSE",
        "LICENSE.md",
        "LICENSE-MODEL",
        "licence.txt",
        "LICENSE_v1.0.txt",
        "COPYING",
        "NOTICE.txt",
        "USE_POLICY.md",
    ]
    no = ["LICENSED.md", "my LICENSE", "NOTICEBOARD", "README.md", "license/x", "LICENSE\n", "USE.md"]
    assert [name for name in yes if not is_licence_file(name)] == []
    assert [name for name in no if is_licence_file(name)] == []


def test_a_licence_that_is_a_page_is_not_carried(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_card(teacher, "license: creativeml-openrail-m\n")
    (teacher / "LICENSE").write_text("<!DOCTYPE html><html>Sign in</html>")
    out = unet_surgery.prune("bk_tiny", teacher, tmp_path / "out").folder
    assert "LICENSE cannot be carried along: an HTML" in caplog.text
    assert (out / "LICENSE").read_bytes() == (LICENCES / "creativeml-openrail-m.txt").read_bytes()


def test_a_pipelines_student_keeps_the_restrictions(tiny: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny, teacher)
    with_card(teacher, "license: creativeml-openrail-m\n")
    for unet_only in (False, True):
        out = unet_surgery.prune("bk_tiny", teacher, tmp_path / str(unet_only), unet_only=unet_only).folder
        assert "exploit or harm minors" in card_of(out).text
        assert "LICENSE" in entries(out)
