"""A teacher's weights by byte range, over a network that fails: the right student, or one clear error."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from configs import CONFIGS
from hub_faults import ALWAYS, Fault
from hub_server import READER, WRITER, HubStandIn, client_env
from safetensors.numpy import load_file, save_file
from teachers import WEIGHTS, entries, folder_bytes, random_tensors, write_sharded, write_unet
from test_cli import tool

import unet_surgery
from unet_surgery.checkpoint.teacher import open_teacher
from unet_surgery.checkpoint.tensorfile import source_ranges
from unet_surgery.checkpoint.writer import student_tensors
from unet_surgery.hub.partial import merged, total_bytes

NAME = "org/big"
WIDER = {**CONFIGS["sd1"], "block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 64}
PRUNE = ["prune", "-r", "bk_tiny", "-t", NAME, "-o", "out", "-q"]
FIRST_BYTES = 128 << 10
extra = pytest.mark.extra
TRIED = {
    "a listing that breaks off", "many small cuts", "a flipped byte in the header", "429 with Retry-After",
    "503 at the Hub", "cut in mid-range", "stall", "too few bytes", "another range", "an expired address",
    "a Hub that says nothing", "401", "403 at the store", "429 for an hour", "500 for the listing", "reset",
    "a changed ETag",
}  # fmt: skip
"""Of the faults of a network, those that ``make test`` tries; ``make test-extra`` tries all."""
NO_JOURNAL = [b"{", b"[]", b'{"identity": 3}', b"\xff"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A U-Net of 34 MB: five pieces and more."""
    return write_unet(tmp_path_factory.mktemp("wider") / "unet", WIDER)


@pytest.fixture(scope="module")
def expected(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What prune makes of the teacher's folder."""
    out = tmp_path_factory.mktemp("local") / "out"
    unet_surgery.prune("bk_tiny", teacher, out, teacher_id=NAME)
    return folder_bytes(out)


@pytest.fixture
def hub(teacher: Path) -> HubStandIn:
    hub = HubStandIn()
    hub.add(NAME, teacher)
    return hub


@pytest.fixture
def env(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """The environment of a client whose caches are the test's own, and whose patience is short."""

    def make(endpoint: str, token: str | None = None) -> dict[str, str]:
        own = {"UNET_SURGERY_CACHE": str(tmp_path / "cache"), "UNET_SURGERY_PATIENCE": "3"}
        return {**client_env(endpoint, tmp_path / "hf", token), **own, "HF_HUB_DOWNLOAD_TIMEOUT": "1"}

    return make


def assert_same(out: Path, expected: dict[str, bytes]) -> None:
    """The weights, config, recipe and picture are those of the local teacher; plan and card also name the commit."""
    found = folder_bytes(out)
    assert found.keys() == expected.keys()
    for name in found.keys() - {"plan.json", "README.md"}:
        assert found[name] == expected[name], name
    plan, local = json.loads(found["plan.json"]), json.loads(expected["plan.json"])
    assert len(plan["teacher"].pop("commit")) == 40
    assert local["teacher"].pop("commit") is None
    assert plan == local


def sent(hub: HubStandIn) -> int:
    return sum(record.body_bytes for record in hub.seen("GET", "cdn"))


def kept_bytes(teacher: Path) -> int:
    opened = open_teacher(teacher)
    with opened.open_weights() as weights:
        ranges = source_ranges(student_tensors(unet_surgery.plan("bk_tiny", teacher), weights))
    return total_bytes(merged(ranges[WEIGHTS]))


# --- what comes over the wire ---------------------------------------------------------------------------------------


def test_only_what_the_student_keeps_is_sent(hub, teacher, expected, tmp_path, env) -> None:
    with hub.serve() as endpoint:
        _, err = tool(*PRUNE[:-1], cwd=tmp_path, env=env(endpoint))
        tool("check", "out", "-t", NAME, cwd=tmp_path, env=env(endpoint))
    assert_same(tmp_path / "out", expected)
    kept = kept_bytes(teacher)
    assert kept <= sent(hub) <= 1.01 * kept + FIRST_BYTES
    assert all(record.range for record in hub.seen("GET", "cdn"))
    assert re.search(r"from the Hub: \d+\.\d MB transferred, \d+\.\d MB saved", err)
    assert "cannot be compared with its checksum" in err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "could not be compared with its checksum" in card.replace("\n", " ")
    assert f"--teacher {NAME}@{hub.repositories[NAME].history()[0].oid}" in card


def test_another_recipe_fetches_the_rest_only(hub, teacher, tmp_path, env) -> None:
    with hub.serve() as endpoint:
        tool(*PRUNE, cwd=tmp_path, env=env(endpoint))
        tool("prune", "-r", "bk_base", "-t", NAME, "-o", "base", "-q", cwd=tmp_path, env=env(endpoint))
        once = sent(hub)
        tool("prune", "-r", "bk_small", "-t", NAME, "-o", "small", "-q", cwd=tmp_path, env=env(endpoint))
    assert sent(hub) == once
    assert once < 1.01 * (teacher / WEIGHTS).stat().st_size
    tool("check", "base", "-t", str(teacher), cwd=tmp_path)
    tool("check", "small", "-t", str(teacher), cwd=tmp_path)


def test_full_fetches_and_compares_the_whole(hub, teacher, expected, tmp_path, env) -> None:
    with hub.serve() as endpoint:
        _, err = tool(*PRUNE[:-1], "--full", cwd=tmp_path, env=env(endpoint))
        once = sent(hub)
        assert once == (teacher / WEIGHTS).stat().st_size + FIRST_BYTES
        # and then the cache has it: nothing more is sent
        tool("prune", "-r", "bk_base", "-t", NAME, "-o", "base", "-q", cwd=tmp_path, env=env(endpoint))
    assert sent(hub) == once
    assert_same(tmp_path / "out", expected)
    assert "saved by" not in err
    assert "could not be compared" not in (tmp_path / "out" / "README.md").read_text()


def test_shards_and_variants(tmp_path, env) -> None:
    folder = write_sharded(tmp_path / "sharded", WIDER, 3, variant="fp16")
    hub = HubStandIn()
    hub.add(NAME, folder)
    with hub.serve() as endpoint:
        tool(*PRUNE, "--variant", "fp16", cwd=tmp_path, env=env(endpoint))
        _, err = tool("plan", "-r", "bk_tiny", "-t", NAME, "--variant", "bf16", cwd=tmp_path, env=env(endpoint))
    tool("check", "out", "-t", str(folder), cwd=tmp_path)
    assert sent(hub) < sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert not err


def test_a_folder_in_a_repository_at_a_branch(teacher, expected, tmp_path, env) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(teacher, repository / "deep" / "unet-2")
    hub = HubStandIn()
    hub.add(NAME, repository, revision="refined/v2")
    address = f"{NAME}/deep/unet-2@refined/v2"
    with hub.serve() as endpoint:
        tool("prune", "-r", "bk_tiny", "-t", address, "-o", "out", "-q", cwd=tmp_path, env=env(endpoint))
        tool("check", "out", "-t", address, cwd=tmp_path, env=env(endpoint))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == expected[WEIGHTS]
    assert (
        f"{NAME}/deep/unet-2@{hub.repositories[NAME].history('refined/v2')[0].oid}"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_every_request_is_of_one_commit(hub, teacher, expected, tmp_path, env) -> None:
    """The branch moves while the student is made."""
    first = hub.repositories[NAME].history()[0].oid
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    save_file(random_tensors(WIDER, seed=1), moved / WEIGHTS)
    hub.faults.append(Fault("slow", "*/resolve/*", parameter=0.3))
    with hub.serve() as endpoint:
        command = [sys.executable, "-m", "unet_surgery", *PRUNE]
        running = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **env(endpoint)})
        wait_until(lambda: bool(hub.seen("GET", "hub", "/resolve/")))
        hub.add(NAME, moved)
        assert running.wait(60) == 0
    assert {record.path.split("/")[4] for record in hub.seen(None, "hub", "/resolve/")} == {first}
    assert_same(tmp_path / "out", expected)


# --- faults ---------------------------------------------------------------------------------------------------------

PASSING = {
    "a listing that says nothing": [Fault("stall", "/api/models/*", host="hub")],
    "a listing that breaks off": [Fault("cut", "/api/models/*", host="hub", parameter=50, times=2)],
    "resets at the listing": [Fault("reset", "/api/models/*", host="hub", times=2)],
    "many small cuts": [Fault("cut", host="cdn", parameter=100_000, times=12)],
    "a flipped byte in the header": [Fault("flip", host="cdn", parameter=100)],
    "429 with Retry-After": [Fault("status", host="cdn", parameter=429, headers={"Retry-After": "1"}, after=1)],
    "503 at the Hub": [Fault("status", "*/resolve/*", host="hub", parameter=503, times=2)],
    "503 for the listing": [Fault("status", "/api/models/*", host="hub", parameter=503, times=2)],
    "500 three times": [Fault("status", host="cdn", parameter=500, times=3, after=2)],
    "cut in the header": [Fault("cut", host="cdn", parameter=1000)],
    "cut in mid-range": [Fault("cut", host="cdn", parameter=500_000, after=1, times=3)],
    "reset": [Fault("reset", host="cdn", after=1, times=2)],
    "stall": [Fault("stall", host="cdn", after=1, parameter=70_000)],
    "stall before the status": [Fault("stall", host="cdn", after=2)],
    "too few bytes": [Fault("short", host="cdn", after=1, parameter=7)],
    "another range": [Fault("range", host="cdn", after=1, times=2)],
    "an expired address": [Fault("status", host="cdn", parameter=403, after=2)],
    "slow": [Fault("slow", host="cdn", parameter=0.002, times=ALWAYS)],
}


@pytest.mark.parametrize("name", [name if name in TRIED else pytest.param(name, marks=extra) for name in PASSING])
def test_what_passes_is_waited_for(name, hub, expected, tmp_path, env) -> None:
    hub.faults += [Fault(**vars(fault)) for fault in PASSING[name]]
    with hub.serve() as endpoint:
        tool(*PRUNE, cwd=tmp_path, env=env(endpoint))
    assert_same(tmp_path / "out", expected)
    if name != "slow":
        assert not any(fault.times for fault in hub.faults)  # it did happen
    else:
        assert sent(hub) < 1.2 * len(expected[WEIGHTS])


LASTING = {
    "a Hub that says nothing": ([Fault("stall", "/api/*", host="hub", times=ALWAYS)], ["cannot be reached"]),
    "401": ([Fault("status", "*/resolve/*", host="hub", parameter=401, times=ALWAYS)], ["401", "hf auth login"]),
    "403": ([Fault("status", "*/resolve/*", host="hub", parameter=403, times=ALWAYS)], ["403"]),
    "404": ([Fault("status", f"*/resolve/*{WEIGHTS}", host="hub", parameter=404, times=ALWAYS)], ["404"]),
    "403 at the store": ([Fault("status", host="cdn", parameter=403, times=ALWAYS)], ["broke off", "403"]),
    "429": ([Fault("status", host="cdn", parameter=429, times=ALWAYS)], ["broke off", "429: too many requests"]),
    "429 for an hour": (
        [Fault("status", host="cdn", parameter=429, times=ALWAYS, headers={"Retry-After": "3600"})],
        ["too many requests"],
    ),
    "500": ([Fault("status", host="cdn", parameter=500, times=ALWAYS)], ["broke off", "HTTP 500"]),
    "500 for the listing": ([Fault("status", "/api/models/*", parameter=500, times=ALWAYS)], ["HTTP 500"]),
    "reset": ([Fault("reset", host="cdn", times=ALWAYS)], ["broke off", "it resumes"]),
    "stall": ([Fault("stall", host="cdn", times=ALWAYS)], ["broke off", "Timeout"]),
    "another range": ([Fault("range", host="cdn", times=ALWAYS)], ["broke off", "another range"]),
    "a changed ETag": ([Fault("etag", host="cdn", after=1, times=ALWAYS)], ["changed on the Hub", "--full"]),
}


@pytest.mark.parametrize("name", [name if name in TRIED else pytest.param(name, marks=extra) for name in LASTING])
def test_what_lasts_is_one_clear_error(name, hub, tmp_path, env) -> None:
    faults, words = LASTING[name]
    hub.faults += [Fault(**vars(fault)) for fault in faults]
    before = entries(tmp_path)
    start = time.monotonic()
    with hub.serve() as endpoint:
        _, err = tool(*PRUNE, cwd=tmp_path, code=5, env=env(endpoint))
    assert time.monotonic() - start < 20
    for word in words:
        assert word in err, err
    assert NAME in err
    assert err.count("error:") == 1
    assert "out" not in entries(tmp_path)
    assert set(entries(tmp_path)) - set(before) <= {"cache", "hf"}


def test_no_range_support(hub, teacher, expected, tmp_path, env) -> None:
    hub.faults.append(Fault("no-range", host="cdn", times=ALWAYS))
    with hub.serve() as endpoint:
        out, _ = tool("plan", "-r", "bk_tiny", "-t", NAME, "--json", cwd=tmp_path, env=env(endpoint))
        assert json.loads(out)["teacher"]["weights"] is None
        assert sent(hub) < 10_000_000  # the plan did not read on: the rest are buffers
        _, err = tool(*PRUNE[:-1], cwd=tmp_path, env=env(endpoint))
    assert "whole files only" in err
    assert_same(tmp_path / "out", expected)
    assert "could not be compared" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("times", [1, ALWAYS], ids=["once", "always"])
def test_a_flipped_byte_in_a_whole_file(times, hub, expected, tmp_path, env) -> None:
    hub.faults.append(Fault("flip", host="cdn", parameter=3_000_000, times=times, after=1))
    with hub.serve() as endpoint:
        # who waits a second only may ask for the rest again, and never see the flip
        patient = {**env(endpoint), "HF_HUB_DOWNLOAD_TIMEOUT": "30"}
        _, err = tool(*PRUNE[:-1], "--full", cwd=tmp_path, env=patient, code=0 if times == 1 else 5)
    assert "damaged" in err
    if times == 1:
        assert_same(tmp_path / "out", expected)
    else:
        assert "arrives damaged" in err
        assert "out" not in entries(tmp_path)


def test_a_file_that_was_damaged_in_the_cache(hub, expected, tmp_path, env) -> None:
    """huggingface_hub itself takes what lies in its cache for what it fetched."""
    with hub.serve() as endpoint:
        tool("prune", "-r", "bk_base", "-t", NAME, "-o", "base", "-q", "--full", cwd=tmp_path, env=env(endpoint))
        blob = max((tmp_path / "hf").rglob("blobs/*"), key=lambda path: path.stat().st_size)
        with blob.open("r+b") as file:
            file.seek(2_000_000)
            file.write(b"XXXX")
        _, err = tool(*PRUNE[:-1], cwd=tmp_path, env=env(endpoint))
    assert "is damaged in the cache: fetching it again" in err
    assert_same(tmp_path / "out", expected)


def test_the_token_goes_to_the_hub_alone(teacher, expected, tmp_path, env) -> None:
    hub = HubStandIn()
    hub.add(NAME, teacher, private_token=READER)
    with hub.serve() as endpoint:
        _, err = tool(*PRUNE, cwd=tmp_path, env=env(endpoint), code=5)
        assert "private" in err
        tool(*PRUNE, cwd=tmp_path, env=env(endpoint, READER))
        tool(*PRUNE[:-3], "--full", "-o", "full", cwd=tmp_path, env=env(endpoint, READER))
    assert_same(tmp_path / "out", expected)
    assert_same(tmp_path / "full", expected)
    assert len(hub.seen("GET", "cdn")) > 4
    assert {record.authorization for record in hub.seen(None, "cdn")} == {None}
    assert f"Bearer {READER}" in {record.authorization for record in hub.seen(None, "hub")}


# --- broken off and taken up ----------------------------------------------------------------------------------------


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=extra)], ids=lambda n: n.name
)
def test_a_run_that_ends_in_mid_transfer_is_resumed(number, hub, teacher, expected, tmp_path, env) -> None:
    hub.faults.append(Fault("slow", host="cdn", parameter=0.004, times=ALWAYS))
    with hub.serve() as endpoint:
        command = [sys.executable, "-m", "unet_surgery", *PRUNE]
        running = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **env(endpoint)}, stderr=subprocess.DEVNULL
        )
        journal = lambda: list((tmp_path / "cache").rglob("*.parts"))  # noqa: E731
        wait_until(lambda: bool(journal()) and len(journal()[0].read_bytes().splitlines()) >= 4)
        running.send_signal(number)
        code = running.wait(20)
        assert code == (-9 if number == signal.SIGKILL else 128 + number)
        assert "out" not in entries(tmp_path)
        wait_until(lambda: not hub_is_busy(hub))
        before, hub.faults = sent(hub), []
        tool(*PRUNE, cwd=tmp_path, env=env(endpoint))
    assert_same(tmp_path / "out", expected)
    kept = kept_bytes(teacher)
    lines = 3  # at least these were not sent again
    assert sent(hub) - before < kept - lines * 20_000


def hub_is_busy(hub: HubStandIn) -> bool:
    before = sent(hub)
    time.sleep(0.2)
    return sent(hub) != before


def test_two_at_once_share_what_they_fetch(hub, teacher, expected, tmp_path, env) -> None:
    with hub.serve() as endpoint:
        command = [sys.executable, "-m", "unet_surgery", *PRUNE[:-3], "-q", "-o"]
        environment = {**os.environ, **env(endpoint)}
        names = ("one", "two", "three")
        running = [subprocess.Popen([*command, name], cwd=tmp_path, env=environment) for name in names]
        assert [process.wait(60) for process in running] == [0, 0, 0]
    for name in names:
        assert_same(tmp_path / name, expected)
    assert sent(hub) <= 1.02 * kept_bytes(teacher) + 2 * FIRST_BYTES


def test_what_is_cached_serves_without_a_network(hub, expected, tmp_path, env) -> None:
    with hub.serve() as endpoint:
        tool(*PRUNE, cwd=tmp_path, env=env(endpoint))
    offline = env("http://127.0.0.1:9")
    _, err = tool(*PRUNE[:-3], "-o", "again", cwd=tmp_path, env=offline)
    assert "using the cached copy" in err
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "out")
    _, err = tool("prune", "-r", "bk_base", "-t", NAME, "-o", "base", cwd=tmp_path, env=offline, code=5)
    assert "not all here" in err
    _, err = tool("plan", "-r", "bk_base", "-t", "org/other", cwd=tmp_path, env=offline, code=5)
    assert "built-in teacher such as sd-v1-random" in err


# --- refused before anything is sent --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_no_room_for_the_transfer(hub, small_disk, tmp_path, env) -> None:
    with hub.serve() as endpoint:
        environment = {**env(endpoint), "UNET_SURGERY_CACHE": str(small_disk)}
        _, err = tool(*PRUNE, cwd=tmp_path, env=environment, code=4)
    assert "not enough room on the disk for the transfer" in err
    assert sent(hub) <= FIRST_BYTES


def test_no_room_for_the_student(hub, small_disk, tmp_path, env) -> None:
    with hub.serve() as endpoint:
        np.zeros(12 << 20, dtype="u1").tofile(small_disk / "full")
        command = [*PRUNE[:-3], "-q", "-o", str(small_disk / "out")]
        _, err = tool(*command, cwd=tmp_path, env=env(endpoint), code=4)
    assert "not enough room" in err
    assert sent(hub) <= FIRST_BYTES


def test_an_output_that_exists(hub, tmp_path, env) -> None:
    (tmp_path / "out").mkdir()
    with hub.serve() as endpoint:
        _, err = tool(*PRUNE, cwd=tmp_path, env=env(endpoint), code=4)
    assert "exists" in err
    assert sent(hub) <= FIRST_BYTES


def test_weights_that_do_not_fit_the_config(tmp_path, env) -> None:
    folder = write_unet(tmp_path / "bad", WIDER, random_tensors(CONFIGS["sd1"]))
    hub = HubStandIn()
    hub.add(NAME, folder)
    with hub.serve() as endpoint:
        _, err = tool(*PRUNE, cwd=tmp_path, env=env(endpoint), code=3)
    assert "do not fit config.json" in err
    assert sent(hub) <= 2 * FIRST_BYTES


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("https://huggingface.co/org/big", "org/big"),
        ("huggingface.co/org/big/tree/main", "org/big"),
        ("org/big/ ", "'org/big'"),
        ("org/my big", "'org/my-big'"),
        ("org\\big", "'org/big'"),
        ("tiny-randon", "'tiny-random'"),
        ("sd-v1", "sd-v1-random"),
    ],
)
def test_a_name_with_a_typo(written: str, hint: str, tmp_path: Path) -> None:
    _, err = tool("plan", "-r", "bk_tiny", "-t", written, cwd=tmp_path, code=3)
    assert hint in err.partition("try:")[2]


def test_a_cold_check_fetches_what_it_compares(hub, expected, tmp_path, env) -> None:
    with hub.serve() as endpoint:
        tool(*PRUNE, cwd=tmp_path, env=env(endpoint))
        cold = {**env(endpoint), "UNET_SURGERY_CACHE": str(tmp_path / "cold"), "HF_HOME": str(tmp_path / "cold-hf")}
        tool("check", "out", "-t", NAME, cwd=tmp_path, env=cold)
        hub.faults.append(Fault("no-range", host="cdn", times=ALWAYS))
        cold = {**env(endpoint), "UNET_SURGERY_CACHE": str(tmp_path / "colder"), "HF_HOME": str(tmp_path / "colder-hf")}
        tool("check", "out", "-t", NAME, cwd=tmp_path, env=cold)


def test_a_commit_that_was_pinned_is_the_one(hub, teacher, tmp_path, env) -> None:
    first = hub.repositories[NAME].history()[0]
    hub.repositories[NAME].commits["a" * 40] = first  # the Hub says another hash than it was asked for
    with hub.serve() as endpoint:
        address = f"{NAME}@{'a' * 40}"
        _, err = tool("plan", "-r", "bk_tiny", "-t", address, cwd=tmp_path, env=env(endpoint), code=5)
        assert "another commit than was asked for" in err
        tool("plan", "-r", "bk_tiny", "-t", f"{NAME}@{first.oid}", cwd=tmp_path, env=env(endpoint))
    offline = env("http://127.0.0.1:9")
    tool("plan", "-r", "bk_tiny", "-t", f"{NAME}@{first.oid}", cwd=tmp_path, env=offline)
    _, err = tool("plan", "-r", "bk_tiny", "-t", f"{NAME}@{'b' * 40}", cwd=tmp_path, env=offline, code=5)
    assert "not in its cache" in err


def test_parts_of_another_file_are_not_gone_on_with(tmp_path, hub, teacher) -> None:
    """The server's file changes between a run that broke off and the next."""
    import threading

    from unet_surgery.hub.partial import PartialFile
    from unet_surgery.hub.transport import ChangedError, RangeReader

    partial = PartialFile(tmp_path / "x", "identity", (teacher / WEIGHTS).stat().st_size)
    with partial:
        partial.served_as('"one"')
        partial.write(0, b"abc")
        partial.record(0, 3, 891568578)
    commit = hub.repositories[NAME].history()[0].oid
    with hub.serve() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with PartialFile(tmp_path / "x", "identity", partial.size) as again:
            assert again.missing([(0, 3)]) == []
            assert again.etag == '"one"'
            reader = RangeReader(NAME, WEIGHTS, commit, partial.size, threading.Event(), again.etag)
            with pytest.raises(ChangedError):
                reader.read(3, 100, lambda _offset, _data: None)
            again.forget()
            assert again.missing([(0, 3)]) == [(0, 3)]


def test_shards_for_two_at_once(tmp_path, env) -> None:
    folder = write_sharded(tmp_path / "sharded", WIDER, 3)
    hub = HubStandIn()
    hub.add(NAME, folder)
    with hub.serve() as endpoint:
        command = [sys.executable, "-m", "unet_surgery", "plan", "-r", "bk_tiny", "-t", NAME]
        environment = {**os.environ, **env(endpoint)}
        running = [
            subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) for _ in range(4)
        ]
        assert [process.wait(60) for process in running] == [0] * 4


@pytest.mark.parametrize("line", [b"", *(pytest.param(line, marks=extra) for line in NO_JOURNAL)], ids=repr)
def test_a_journal_that_is_none_is_no_copy(line, hub, expected, tmp_path, env) -> None:
    with hub.serve() as endpoint:
        tool("plan", "-r", "bk_tiny", "-t", NAME, cwd=tmp_path, env=env(endpoint))
        journal = next((tmp_path / "cache").rglob("*.parts"))
        journal.write_bytes(line)
        _, err = tool(*PRUNE, cwd=tmp_path, env=env("http://127.0.0.1:9"), code=5)
        assert "error: the Hugging Face Hub cannot be reached" in err
        tool(*PRUNE, cwd=tmp_path, env=env(endpoint))
    assert_same(tmp_path / "out", expected)


def test_the_cache_does_not_choose_the_vae(tiny, tmp_path, env) -> None:
    """A U-Net of one variant, a VAE of two: what an earlier run fetched must not decide which is taken."""
    folder = tmp_path / "repository"
    shutil.copytree(tiny, folder)
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    half = {name: tensor.astype("float16") for name, tensor in load_file(folder / "vae" / WEIGHTS).items()}
    save_file(half, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    hub = HubStandIn()
    hub.add(NAME, folder)
    with hub.serve() as endpoint:
        tool(*PRUNE, cwd=tmp_path, env=env(endpoint))
        warm = {**env(endpoint), "UNET_SURGERY_CACHE": str(tmp_path / "warm"), "HF_HOME": str(tmp_path / "warm-hf")}
        tool(*PRUNE[:-3], "-q", "--variant", "fp16", "-o", "half", cwd=tmp_path, env=warm)
        tool(*PRUNE[:-3], "-q", "-o", "again", cwd=tmp_path, env=warm)
    vaes = [(tmp_path / name / "vae" / WEIGHTS).stat().st_size for name in ("out", "again", "half")]
    assert vaes[0] == vaes[1] > vaes[2]


# --- there and back -------------------------------------------------------------------------------------------------


def test_a_pushed_student_is_a_teacher(tmp_path, env) -> None:
    """Pushed, pruned from there by range, loaded by diffusers."""
    from diffusers import StableDiffusionPipeline

    (tmp_path / "no_mid.yaml").write_text("name: no_mid\nremove: [mid]\n")
    hub = HubStandIn()
    with hub.serve() as endpoint:
        environment = env(endpoint, WRITER)
        tool("prune", "-r", "bk_base", "-t", "tiny-random", "-o", "base", "-q", cwd=tmp_path)
        tool("push", "base", "me/base", "-q", cwd=tmp_path, env=environment)
        tool("prune", "-r", "no_mid.yaml", "-t", "me/base", "-o", "small", "-q", cwd=tmp_path, env=environment)
        tool("check", "small", "-t", "me/base", cwd=tmp_path, env=environment)
    card = (tmp_path / "small" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "base_model: me/base" in card
    pipeline = StableDiffusionPipeline.from_pretrained(
        tmp_path / "small", local_files_only=True, low_cpu_mem_usage=False
    )
    assert pipeline.unet.mid_block is None
    both = unet_surgery.prune("bk_small", "tiny-random", tmp_path / "both").folder
    weights = f"unet/{WEIGHTS}"
    assert (tmp_path / "small" / weights).read_bytes() == (both / weights).read_bytes()


# --- a Hub that means harm ------------------------------------------------------------------------------------------


def test_names_that_lead_out_of_the_cache_are_not_there(teacher, tmp_path, env) -> None:
    hub = HubStandIn()
    hub.add(NAME, teacher)
    repository = hub.repositories[NAME]
    files = dict(repository.history()[0].files)
    evil = {f"../../../{name}": blob for name, blob in files.items()} | {"/etc/x.safetensors": files[WEIGHTS]}
    repository.commit("refs/heads/main", files | evil, "harm")
    with hub.serve() as endpoint:
        tool(*PRUNE, cwd=tmp_path, env=env(endpoint))
        _, err = tool("plan", "-r", "bk_tiny", "-t", f"{NAME}/../../..", cwd=tmp_path, env=env(endpoint), code=3)
        assert "there is no model" in err
    assert entries(tmp_path) == ["cache", "hf", "out"]
    assert not hub.seen(None, None, r"\.\.")


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"])
def test_a_redirect_to_anything_but_http(location, tmp_path, monkeypatch) -> None:
    import threading

    from unet_surgery.errors import HubError
    from unet_surgery.hub.transport import RangeReader, _Address

    reader = RangeReader("org/name", "x.safetensors", "0" * 40, 10, threading.Event())
    with pytest.raises(HubError, match="cannot be trusted"):
        reader._redirected(_Address("https://huggingface.co/x", own=True), location, ("https", "huggingface.co"))
    with pytest.raises(HubError, match="cannot be trusted"):
        reader._redirected(_Address("https://huggingface.co/x", own=True), "http://cdn/x", ("https", "huggingface.co"))
    other = reader._redirected(_Address("https://hub/x", own=True), "https://cdn/x?sig=1", ("https", "hub"))
    assert (other.url, other.own) == ("https://cdn/x?sig=1", False)
    assert reader._redirected(_Address("https://hub/x", own=True), "/y", ("https", "hub")).own


def test_a_mirror_that_sends_us_to_the_hub(hub, teacher, monkeypatch) -> None:
    """And the Hub to its store: the token goes to neither, being the mirror's."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from unet_surgery.hub.transport import RangeReader

    seen = []

    class Mirror(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(302)
            self.send_header("Location", hub.endpoint + self.path)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    mirror = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    thread = threading.Thread(target=mirror.serve_forever, args=(0.02,))
    thread.start()
    template = f"http://127.0.0.1:{mirror.server_address[1]}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", READER)
    found = bytearray()
    try:
        with hub.serve():
            size = (teacher / WEIGHTS).stat().st_size
            commit = hub.repositories[NAME].history()[0].oid
            reader = RangeReader(NAME, WEIGHTS, commit, size, threading.Event())
            reader.read(1000, 300_000, lambda _offset, data: found.extend(data))
    finally:
        mirror.shutdown()
        thread.join()
        mirror.server_close()
    assert bytes(found) == (teacher / WEIGHTS).read_bytes()[1000:300_000]
    assert seen == [f"Bearer {READER}"]
    assert {record.authorization for record in hub.requests} == {None}


@pytest.mark.parametrize("etag", ['"é"', '"\u4e2d"', '"a\x01b"'], ids=ascii)
def test_an_etag_that_cannot_be_sent_back_is_none(etag: str) -> None:
    from unet_surgery.hub.transport import _plain

    assert _plain(etag) is None
    assert _plain('"plain"') == '"plain"'
