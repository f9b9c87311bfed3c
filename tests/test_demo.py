"""The demo: who draws, what may be asked for, what a drawing took; the page, its server, and what they refuse."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_places import PROMPT, ROOT, Running, open_url, running
from PIL import Image

import unet_surgery as us
from unet_surgery.app.guard import HEADERS, OnlyHere, bound, is_ours
from unet_surgery.app.memory import most_bytes, weight_bytes
from unet_surgery.app.models import Models, load_models
from unet_surgery.app.studio import Stopped, Studio
from unet_surgery.app.wish import Limits, Wish, read_wish
from unet_surgery.checkpoint.teacher import LOCAL
from unet_surgery.errors import SurgeryError, TeacherError, UsageError
from unet_surgery.sample.draw import sample

CPU = torch.device("cpu")
WISH = Wish(PROMPT, "", 1, 2, 2.0, 32, 32, None)
NEEDS_GRADIO = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed here: make test-demo"
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return us.prune("bk_tiny", "toy", tmp_path_factory.mktemp("demo") / "small-toy").folder


@pytest.fixture(scope="module")
def models(student: Path, one_thread: None) -> Models:
    return load_models(str(student), None, None, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def studio(models: Models) -> Studio:
    return Studio(models)


# Who draws


def test_the_teacher_is_the_one_that_the_plan_names(models: Models) -> None:
    assert models.teacher is not None
    assert (models.teacher.name, models.student.name) == ("toy", "small-toy")
    assert [d.identity["model"]["parameters"] for d in models.drawers] == [8_605_284, 3_237_444]


def test_without_a_teacher_that_can_be_found_the_student_draws_alone(student: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(student, tmp_path / "orphan")
    plan = folder / "plan.json"
    text = plan.read_text()
    for name, says in (
        ("nobody/anywhere", "nobody/anywhere cannot be used"),
        ("tiny-random", "another model"),
        (LOCAL, "names a folder of some machine"),
    ):
        plan.write_text(text.replace('"id": "toy"', f'"id": "{name}"', 1))
        alone = load_models(str(folder), None, None, device=CPU, dtype=torch.float32)
        assert alone.teacher is None
        assert says in (alone.no_teacher or "")


def test_a_teacher_that_is_asked_for_must_be_there(student: Path) -> None:
    with pytest.raises(TeacherError, match="there is no teacher 'nobody'"):
        load_models(str(student), "nobody", None, device=CPU, dtype=torch.float32)
    alone = load_models(str(student), "none", None, device=CPU, dtype=torch.float32)
    assert (alone.teacher, alone.no_teacher) == (None, None)


def test_a_unet_alone_draws_with_its_teachers_parts(student: Path) -> None:
    both = load_models(str(student / "unet"), "toy", None, device=CPU, dtype=torch.float32)
    assert both.student.identity["base"]["name"] == "toy"
    with pytest.raises(UsageError, match="U-Net alone"):
        load_models(str(student / "unet"), None, None, device=CPU, dtype=torch.float32)


# What may be asked for

GOOD = {
    "prompt": "a", "negative": "", "seed": 0, "steps": 1, "guidance": 1, "width": 32, "height": 32, "scheduler": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("prompt", None, "not a text"),
        ("prompt", "x" * 1001, "too long"),
        ("prompt", "\ud800", "no character"),
        ("negative", 7, "negative prompt is not a text"),
        ("seed", -1, "0 to 4294967295"),
        ("seed", 2**32, "0 to 4294967295"),
        ("seed", 0.5, "whole number"),
        ("seed", float("nan"), "not a number"),
        ("seed", True, "not a number"),
        ("steps", 0, "1 to 200"),
        ("steps", 1e9, "1 to 200"),
        ("steps", "3", "not a number"),
        ("guidance", -1, "0 to 30"),
        ("guidance", float("inf"), "not a number"),
        ("width", 33, "multiple of 4 up to 64"),
        ("width", 0, "multiple of 4 up to 64"),
        ("height", 68, "multiple of 4 up to 64"),
        ("scheduler", "dimm", "did you mean ddim"),
        ("scheduler", "UNet2DConditionModel", "no scheduler"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_what_can(name: str, value: Any, says: str) -> None:
    assert read_wish(GOOD, Limits(4, 64)).width == 32
    with pytest.raises(UsageError, match=says):
        read_wish({**GOOD, name: value}, Limits(4, 64))


# What is drawn


def test_both_draw_from_the_same_noise_what_sample_draws(studio: Studio, models: Models) -> None:
    drawn = list(studio.draw(WISH))
    assert [d.name for d in drawn] == ["toy", "small-toy"]
    for one, drawer in zip(drawn, models.drawers, strict=True):
        expected = sample(drawer.unet, drawer.parts, [PROMPT], seed=1, steps=2, guidance=2.0)
        assert np.array_equal(one.picture, expected[0])
        assert one.seconds > 0
    twins = Studio(Models(models.student, models.student))
    first, second = twins.draw(WISH)
    assert np.array_equal(first.picture, second.picture)


def test_the_seed_decides_the_picture(studio: Studio) -> None:
    from dataclasses import replace

    again, other = (list(studio.draw(replace(WISH, seed=seed)))[1].picture for seed in (1, 2))
    assert np.array_equal(again, list(studio.draw(WISH))[1].picture)
    assert not np.array_equal(again, other)


def test_progress_counts_calls_and_stop_ends_at_the_next(studio: Studio) -> None:
    told: list[tuple[int, int, int]] = []
    list(studio.draw(WISH, lambda *how_far: told.append(how_far)))
    assert told == [(0, 1, 2), (0, 2, 2), (1, 1, 2), (1, 2, 2)]

    def stop(_number: int, done: int, _calls: int) -> None:
        told.append((9, done, 9))
        studio.stop()

    with pytest.raises(Stopped):
        list(studio.draw(WISH, stop))
    assert told[4:] == [(9, 1, 9)]
    assert len(list(studio.draw(WISH))) == 2  # the next one is drawn, and no hook is left
    assert not any(drawer.unet._forward_hooks for drawer in studio.models.drawers)


def test_two_wishes_are_drawn_one_after_the_other(studio: Studio) -> None:
    """Else they would measure each other."""
    from threading import Thread

    order: list[str] = []

    def draw(name: str) -> None:
        list(studio.draw(WISH, lambda *_: order.append(name)))

    threads = [Thread(target=draw, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "".join(order) in ("aaaabbbb", "bbbbaaaa")


def test_a_model_that_draws_nonsense_is_an_error_and_not_a_picture(models: Models) -> None:
    unet = models.student.unet
    bias = unet.conv_out.bias.data.clone()
    unet.conv_out.bias.data.fill_(float("nan"))
    try:
        with pytest.raises(SurgeryError, match="NaN or Inf"):
            list(Studio(Models(models.student, None)).draw(WISH))
    finally:
        unet.conv_out.bias.data.copy_(bias)


def test_an_overlong_prompt_is_told_of(studio: Studio) -> None:
    assert studio.unread_words(PROMPT) == ""
    assert studio.unread_words("red " * 100) == "the text encoder reads 24 tokens; this prompt has 102"


def test_the_toy_world_is_known_by_its_words(studio: Studio, tiny: Path) -> None:
    assert studio.is_toy
    other = load_models(str(tiny), "none", None, device=CPU, dtype=torch.float32)
    assert not Studio(other).is_toy


def test_the_toy_teacher_is_judged_right() -> None:
    teacher = Studio(load_models("toy", None, None, device=CPU, dtype=torch.float32))
    (drawn,) = teacher.draw(Wish(PROMPT, "", 0, 20, 2.0, 32, 32, None))
    assert drawn.verdict == ""
    (other,) = teacher.draw(Wish("anything else", "", 0, 2, 2.0, 32, 32, None))
    assert other.verdict is None


# What it took


def test_memory_counts_what_is_there_at_once() -> None:
    there = torch.zeros(1000)

    def run() -> None:
        one = there + 1  # 4000
        one = one * 2  # 4000 more until the first is gone
        view = one[:10]
        view += 1  # neither a view nor an operator in place takes anything
        del one, view
        torch.ones(500)  # 2000, when all else is gone

    assert most_bytes(run, CPU) == 8000
    assert most_bytes(lambda: there.view(10, 100), CPU) == 0
    assert most_bytes(lambda: [there + i for i in range(5)], CPU) == 20_000
    assert weight_bytes([torch.nn.Linear(10, 10)]) == 440


def test_a_student_takes_less_than_its_teacher(studio: Studio) -> None:
    teacher, student = studio.draw(WISH)
    assert student.peak_bytes < teacher.peak_bytes
    held = weight_bytes([studio.models.student.unet])
    assert held < student.peak_bytes < 3 * held


# Who gets the page


@pytest.mark.parametrize(
    ("host", "origin", "ours"),
    [
        ("127.0.0.1:7860", None, True),
        ("localhost:9999", None, True),  # through a tunnel
        ("127.0.0.1:7860", "http://127.0.0.1:7860", True),
        ("localhost", "http://localhost", True),
        (None, None, False),
        ("evil.example:7860", None, False),  # a name that was made to mean 127.0.0.1
        ("127.0.0.1.evil.example", None, False),
        ("127.0.0.1:7860", "http://evil.example", False),
        ("127.0.0.1:7860", "http://127.0.0.1:8000", False),  # another program's page
        ("127.0.0.1:7860", "null", False),
        ("evil@127.0.0.1:7860", "http://evil.example", False),
        ("[::1", None, False),
    ],
)
def test_only_this_machines_own_page_is_answered(host: str | None, origin: str | None, ours: bool) -> None:
    assert is_ours(host, origin) is ours


def test_the_guard_asks_the_application_only_for_its_own() -> None:
    sent: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    def ask(*headers: tuple[bytes, bytes]) -> Any:
        sent.clear()
        asyncio.run(OnlyHere(application)({"type": "http", "headers": headers}, None, send))  # type: ignore[arg-type]
        return sent[0]

    assert ask((b"host", b"127.0.0.1:1"))["headers"] == HEADERS
    assert ask((b"host", b"evil.example"))["status"] == 403


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded() -> None:
    with bound(0) as other:
        port = other.getsockname()[1]
        assert other.getsockname()[0] == "127.0.0.1"
        with pytest.raises(UsageError, match="--port 0 takes one that is free"):
            us.demo("nothing that could be loaded", port=port)
    with pytest.raises(UsageError, match="no such port"):
        us.demo("nothing that could be loaded", port=70000)


# Without gradio, and with it


def test_without_gradio_the_extra_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['gradio'] = None; from unet_surgery.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "demo", "toy"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'unet-surgery[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demos_environment_is_the_tested_one_but_for_what_gradio_wants() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text().splitlines()
        return dict(line.replace("_", "-").split("==") for line in lines if "==" in line and not line.startswith("#"))

    ours, demos = pins("constraints.txt"), pins("demo-constraints.txt")
    assert len(demos) > 100
    assert "gradio" in demos
    assert set(ours) <= set(demos)
    assert {name for name in ours if ours[name] != demos[name]} == {"pillow", "tomlkit"}


@pytest.fixture(scope="module")
def served(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Proxies and gradio's own settings are such that it would go elsewhere, or let others in, if they were heeded."""
    settings = {
        "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True", "GRADIO_ROOT_PATH": "/elsewhere",
        "GRADIO_ALLOWED_PATHS": "/", "GRADIO_ANALYTICS_ENABLED": "True", "GRADIO_MCP_SERVER": "True",
        "HTTP_PROXY": "http://192.0.2.1:9", "http_proxy": "http://192.0.2.1:9",
    }  # fmt: skip
    with running(tmp_path_factory.mktemp("served"), str(student), **settings) as demo:
        yield demo


@NEEDS_GRADIO
def test_the_interface_for_programs_gives_two_pictures(served: Running) -> None:
    event, (seed, teacher, student, table, data) = served.draw()
    assert (event, seed) == ("complete", 1)
    pictures = []
    for picture in (teacher, student):
        with Image.open(io.BytesIO(open_url(picture["url"])), formats=["PNG"]) as opened:
            pictures.append(np.array(opened.convert("RGB")))
    assert [p.shape for p in pictures] == [(32, 32, 3)] * 2
    assert not np.array_equal(*pictures)
    assert "3.2 M" in table
    assert [m["name"] for m in data["models"]] == ["toy", "small-toy"]
    assert served.draw(anew=True)[1][0] != 1


@NEEDS_GRADIO
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "x" * 5000}, "the prompt is too long"),
        ({"prompt": "<img src=x onerror=alert(1)>\ud800"}, "no character"),
        ({"seed": -1}, "0 to 4294967295"),
        ({"width": 33}, "multiple of 4 up to 64 pixels"),
        ({"steps": 10**9}, "200"),
        ({"scheduler": "<script>"}, "not in the list"),
    ],
)
def test_errors_are_messages(served: Running, changes: dict[str, Any], says: str) -> None:
    event, data = served.draw(**changes)
    assert event == "error"
    assert says in data["error"]
    if data["title"] != "Error":  # ours, not gradio's own
        assert "<img" not in data["error"]


@NEEDS_GRADIO
def test_hostile_prompts_are_shown_as_text_or_not_at_all(served: Running) -> None:
    for prompt in ("<img src=x onerror=alert(1)>", "\x00\x1b[2J", "red " * 200, "[x](javascript:alert(1))"):
        event, data = served.draw(prompt=prompt)
        assert event == "complete"
        assert "<img" not in data[3]
        assert "javascript" not in data[3]
    assert "the text encoder reads 24 tokens; this prompt has 202" in served.draw(prompt="red " * 200)[1][3]


@NEEDS_GRADIO
def test_only_this_machine_is_served_and_no_file_of_it(served: Running, student: Path) -> None:
    port = int(served.address.rstrip("/").rpartition(":")[2])
    for place in ("127.0.0.2", socket.gethostbyname(socket.gethostname())):
        if place != "127.0.0.1":
            with pytest.raises(OSError, match="refused|unreachable|timed out"):
                socket.create_connection((place, port), timeout=2)
    assert served.status() == 200
    assert served.status(Host="evil.example") == 403
    assert served.status(Origin="http://evil.example") == 403
    for path in ("/etc/passwd", str(student / "plan.json"), str(ROOT / "pyproject.toml"), "../../../etc/passwd"):
        assert served.status(f"gradio_api/file={path}") in (403, 404)
    for path in ("docs", "redoc", "openapi.json", "gradio_api/mcp/", "monitoring"):
        assert served.status(path) in (403, 404, 405)


@NEEDS_GRADIO
def test_nothing_is_uploaded(served: Running) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nabc\r\n--x--\r\n'
    request = urllib.request.Request(
        f"{served.address}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        open_url(request)
    refused.value.close()
    assert refused.value.code in (400, 403, 413, 500)
    assert not list(served.temporary.rglob("a.txt"))


@NEEDS_GRADIO
def test_it_ends_in_time_leaves_nothing_and_asked_nobody(student: Path, tmp_path: Path) -> None:
    with running(tmp_path, str(student), "--teacher", "none", watched=True) as demo:
        event, data = demo.draw()
        assert event == "complete"
        assert len(data) == 4  # the seed, one picture, a table, the same as data
        assert list(demo.temporary.rglob("*.png"))
    assert demo.process.returncode == 0
    assert not list(demo.temporary.glob("unet-surgery*"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["errors.txt", "tmp"]
    text = demo.errors.read_text()
    assert "WENT TO" not in text
    assert "ASKED FOR" not in text
    assert text.splitlines()[-1] == "ended"


@NEEDS_GRADIO
@pytest.mark.extra
def test_a_browser_sees_two_pictures_and_goes_nowhere_else(served: Running) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-demo")
    wrong: list[str] = []
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": 390, "height": 844})
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("dialog", lambda d: (wrong.append(d.message), d.dismiss()))
        page.on(
            "request", lambda r: None if r.url.startswith((served.address, "data:", "blob:")) else wrong.append(r.url)
        )
        page.goto(served.address)
        page.locator("#prompt textarea").fill(PROMPT)
        first = _draw(page, page.locator("#draw").click)
        assert len(set(first)) == 2
        page.locator("#seed input").fill("7")
        second = _draw(page, page.locator("#draw").click)
        assert not set(first) & set(second)
        page.locator("#prompt textarea").fill("<img src=x onerror=alert(1)>")
        third = _draw(page, lambda: page.locator("#prompt textarea").press("Enter"))
        assert not set(second) & set(third)
        page.locator("#seed input").fill("-1")
        page.locator("#draw").click()
        page.get_by_text("0 to 4294967295").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        opened.close()
    assert wrong == []


def _draw(page: Any, ask: Any) -> list[str]:
    """Ask for pictures and return both their addresses, when they are others than before."""
    script = "() => ['teacher', 'student'].map(i => document.querySelector(`#${i} img`)?.src ?? '')"
    before = page.evaluate(script)
    ask()
    for _ in range(600):
        now: list[str] = page.evaluate(script)
        if all(now) and not set(now) & set(before):
            return now
        page.wait_for_timeout(100)
    raise AssertionError("no pictures after a minute")
