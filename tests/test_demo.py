"""The demo: who draws, what may be asked for, what a drawing took; the page, its server, and what they refuse."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from demo_places import PROMPT, ROOT, Running, draw_at, open_url, running
from PIL import Image

import unet_surgery as us
from unet_surgery.app.guard import HEADERS, OnlyHere, bound, is_ours, is_plain
from unet_surgery.app.models import Models, load_models
from unet_surgery.app.studio import Studio
from unet_surgery.app.wish import Wish
from unet_surgery.errors import UsageError

CPU = torch.device("cpu")
WISH = Wish(PROMPT, "", 1, 2, 2.0, 32, 32, None)
# gradio leaves event loops unclosed where a page is made in this process
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def _loops_end_here() -> Iterator[None]:
    """Where that is known, and not at the end of all tests."""
    yield
    gc.collect()


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
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
        asyncio.run(OnlyHere(application, "/pictures")(scope, None, send))  # type: ignore[arg-type]
        return sent[0]

    assert ask((b"host", b"127.0.0.1:1"))["headers"] == HEADERS
    assert ask((b"host", b"evil.example"))["status"] == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
def test_what_another_sites_page_shows_is_none_of_ours(site: str) -> None:
    assert is_ours("127.0.0.1:7860", None, "same-origin")
    assert is_ours("127.0.0.1:7860", None, "none")
    assert not is_ours("127.0.0.1:7860", None, site)


@pytest.mark.parametrize(
    ("body", "plain"),
    [
        (b'{"data": ["a", 1, 2.5, true, null], "fn_index": 1}', True),
        (b'{"session_hash": "a"}', True),
        (b'{"data": [{"path": "https://example.org/", "meta": {"_type": "gradio.FileData"}}]}', False),
        (b'{"data": [["a"]]}', False),
        (b'{"data": {"path": "https://example.org/"}}', False),
        (b'{"data": [], "event_data": {"a": 1}}', False),
        (b"[1]", False),
        (b"", False),
        (b"[" * 60_000, False),
        (b'{"data": ["' + b"x" * 70_000 + b'"]}', False),
        (b"\xff", False),
    ],
)
def test_only_plain_values_pass(body: bytes, plain: bool) -> None:
    assert is_plain("application/json; charset=utf-8", body) is plain
    assert not is_plain("text/plain", body)
    assert not is_plain(None, body)


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


@NEEDS_GRADIO
def test_a_scheduler_that_diffusers_lacks_is_no_choice(models: Models) -> None:
    parts = replace(models.student.parts, scheduler_config={"_class_name": "NoSuchScheduler"})
    strange = Studio(Models(replace(models.student, parts=parts), None))
    assert strange.own_scheduler() is None
    from unet_surgery.app.page import make_page

    (choice,) = [c["props"] for c in make_page(strange).config["components"] if c["type"] == "dropdown"]
    assert choice["value"] == "ddim"
    assert "the model's own" not in [value for _, value in choice["choices"]]


@NEEDS_GRADIO
def test_names_are_shown_as_text(studio: Studio) -> None:
    """A folder may be called anything."""
    from unet_surgery.app.page import _table, make_page

    evil = "<img src=x onerror=alert(1)>"
    named = Studio(Models(replace(studio.models.student, name=evil), None, evil))
    texts = [c["props"].get("value") or "" for c in make_page(named).config["components"] if c["type"] == "markdown"]
    texts.append(_table(list(named.draw(WISH)), evil))
    assert [text.count("&lt;img") for text in texts] == [1, 2, 0, 2]
    assert not any("<img" in text for text in texts)


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
        ({"prompt": "<img src=x onerror=alert(1)>\ud800"}, "no character<br>"),
        ({"prompt": "<img src=x onerror=alert(1)>\ud800"}, "&lt;img src=x"),
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
    assert "<img" not in data["error"]


@NEEDS_GRADIO
def test_hostile_prompts_are_drawn_and_not_shown(served: Running) -> None:
    for prompt in ("<img src=x onerror=alert(1)>", "\x00\x1b[2J", "[x](javascript:alert(1))"):
        event, (_, *pictures, _table, facts) = served.draw(prompt=prompt)
        assert event == "complete"
        assert all(picture["url"] for picture in pictures)
        assert sorted(facts) == ["models", "seed"]
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
        assert served.status(path) == 403


@NEEDS_GRADIO
def test_no_other_sites_page_can_make_it_do_anything(served: Running) -> None:
    """Browsers send no Origin with a picture's address, nor with a link's."""
    for path in ("", "config", "theme.css", "gradio_api/info"):
        assert served.status(path, **{"Sec-Fetch-Site": "same-origin"}) == 200
        for site in ("cross-site", "same-site"):
            assert served.status(path, **{"Sec-Fetch-Site": site}) == 403


OBJECT = {"path": "https://fetched.invalid/a.png", "meta": {"_type": "gradio.FileData"}}
REST = ["", 0, False, 1, 1, 32, 32, "the model's own"]


@NEEDS_GRADIO
def test_nothing_is_fetched_for_whoever_asks(student: Path, tmp_path: Path) -> None:
    """gradio would: an address as a file, and a value that says it is a file at an address."""
    with running(tmp_path, str(student), "--teacher", "none", watched=True, GRADIO_ANALYTICS_ENABLED="True") as demo:
        asked = [
            demo.status("gradio_api/file=https://fetched.invalid/a.png"),
            demo.status("gradio_api/file/https://fetched.invalid/a.png"),
            demo.status("gradio_api/file=https:%2f%2ffetched.invalid/a.png"),
            demo.status("gradio_api/proxy=https://fetched.invalid/a.png"),
            demo.status(f"gradio_api/file={demo.temporary}/../../a.png"),
            *(
                demo.post(f"gradio_api/{path}", {"data": []})
                for path in ("component_server", "call/v2/draw", "api/draw")
            ),
        ]
        assert asked == [403] * 8
        bodies = [
            {"data": [OBJECT, *REST]},
            {"data": [[OBJECT], *REST]},
            {"data": [OBJECT, *REST], "fn_index": 1, "session_hash": "a"},
            {"data": [], "event_data": OBJECT},
        ]
        for path in ("call/draw", "queue/join", "run/predict"):
            assert [demo.post(f"gradio_api/{path}", body) for body in bodies] == [400] * 4
        assert demo.post("gradio_api/call/draw", {"data": [PROMPT, *REST]}, "text/plain") == 400
        assert demo.draw()[0] == "complete"
    told = demo.errors.read_text()
    assert "fetched" not in told
    assert "WENT TO" not in told
    assert "ASKED FOR" not in told


@NEEDS_GRADIO
def test_nothing_is_uploaded(served: Running) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nabc\r\n--x--\r\n'
    request = urllib.request.Request(
        f"{served.address}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        open_url(request)
    refused.value.close()
    assert refused.value.code == 403
    assert not list(served.temporary.rglob("a.txt"))


@NEEDS_GRADIO
def test_stop_is_for_the_session_that_says_it(served: Running) -> None:
    def stopped(session: str, steps: int) -> Any:
        """Return what a drawing of the session "mine" gave, while ``session`` says stop all the time."""
        answers: list[Any] = []
        drawing = Thread(target=lambda: answers.append(served.draw("mine", steps=steps)))
        drawing.start()
        while drawing.is_alive():
            assert served.post("gradio_api/call/stop", {"data": [], "session_hash": session}) == 200
            drawing.join(0.2)
        return answers[0][1]

    assert not isinstance(stopped("mine", 200)[4].get("models"), list)
    assert [m["name"] for m in stopped("others", 2)[4]["models"]] == ["toy", "small-toy"]


@NEEDS_GRADIO
def test_nobody_passes_those_who_wait(served: Running) -> None:
    """gradio's direct calls are for Stop alone: a drawing by one would take a thread from the page."""
    config = json.loads(open_url(f"{served.address}config"))
    names = {one["api_name"]: one["id"] for one in config["dependencies"] if one["api_name"]}
    body = {"data": [PROMPT, *REST], "fn_index": names["draw"], "session_hash": "mine"}
    assert served.post("gradio_api/run/predict", body) == 404
    assert served.post("gradio_api/run/predict", {"data": [], "fn_index": names["stop"], "session_hash": "a"}) == 200
    assert served.draw()[0] == "complete"


@NEEDS_GRADIO
def test_demos_that_begin_at_once_leave_torch_its_threads() -> None:
    torch.set_num_threads(2)
    demos: list[Any] = []
    try:
        beginning = [Thread(target=lambda: demos.append(us.demo("toy", port=0))) for _ in range(2)]
        for thread in beginning:
            thread.start()
        for thread in beginning:
            thread.join()
        left: list[int] = []
        asking = Thread(target=lambda: left.append(torch.get_num_threads()))  # a new one: each has a count of its own
        asking.start()
        asking.join()
        assert left == [2]
    finally:
        for one in demos:
            one.close()
        torch.set_num_threads(1)
    assert logging.getLogger("uvicorn.error").level != logging.CRITICAL


@NEEDS_GRADIO
def test_two_demos_at_once_leave_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "mine")
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    one, other = (us.demo("toy", port=0) for _ in range(2))
    one.close()
    event, (_, picture, *_rest) = draw_at(other.address)
    assert event == "complete"
    assert open_url(picture["url"]).startswith(b"\x89PNG")
    assert Path(picture["path"]).is_file()
    other.close()
    assert not Path(picture["path"]).exists()
    assert os.environ["GRADIO_TEMP_DIR"] == "mine"
    assert "GRADIO_ANALYTICS_ENABLED" not in os.environ


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
