"""Published sets over a network that fails and from archives that lie: the whole set in place, or one clear error."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import typer
from archives import tar_gz, zipped
from hub_faults import ALWAYS, Fault
from hub_server import HubStandIn, client_env, client_in_process
from teachers import folder_bytes
from test_cli import tool

from unet_surgery.cli.main import app
from unet_surgery.data import get
from unet_surgery.data.get import get_data
from unet_surgery.data.publishedsets import SETS, Archive, Piece, PublishedSet
from unet_surgery.data.sources import open_source
from unet_surgery.data.unpack import DamagedArchiveError
from unet_surgery.errors import DataError, HubError, OutputError, UsageError
from unet_surgery.hub import connections, transport
from unet_surgery.hub.partial import PartialFile
from unet_surgery.hub.transport import AddressReader

NAME = "laion-11k"
FILES = {f"train/{i:04d}.jpg": os.urandom(30_000) for i in range(8)}
TABLE = "file_name,text\n" + "".join(f"{i:04d}.jpg,picture {i}\n" for i in range(8))


ARCHIVE = tar_gz({**FILES, "train/metadata.csv": TABLE.encode()}, level=0)  # as large as any other of these sizes
WHOLE = {**FILES, "train/metadata.csv": TABLE.encode()}


@pytest.fixture
def hub(tmp_path: Path) -> HubStandIn:
    """A mirror that has the archive at org/data/resolve/main/laion-11k/preprocessed_11k.tar.gz."""
    return mirror(tmp_path, {f"{NAME}/preprocessed_11k.tar.gz": ARCHIVE})


def mirror(tmp_path: Path, files: dict[str, bytes]) -> HubStandIn:
    folder = tmp_path / "mirror"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    hub = HubStandIn(large_bytes=50_000)
    hub.add("org/data", folder)
    return hub


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The set is as small as the mirror's, so that room and counts fit; pieces are 32 KiB."""
    monkeypatch.setitem(SETS, NAME, small_set())
    monkeypatch.setattr(connections, "PIECE_BYTES", 32 << 10)
    monkeypatch.setattr(transport, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(transport, "longer", lambda pause: min(2 * pause, 0.4))


def small_set(sha256: str | None = None, size: int | None = None, max_files: int = 20) -> PublishedSet:
    archive = Archive("tar.gz", 300_000, max_files, top="preprocessed_11k")
    piece = Piece("https://example.invalid/preprocessed_11k.tar.gz", 240_000, size, sha256, archive)
    return PublishedSet(NAME, "a few", (piece,), "none", "a test", "use {folder}", num_pictures=8)


@pytest.fixture
def fetch(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[HubStandIn], get.DataResult]:
    """Fetch the set from a mirror into out, in this process, with little patience."""
    monkeypatch.setenv("UNET_SURGERY_PATIENCE", "3")

    def run(hub: HubStandIn) -> get.DataResult:
        with hub.serve() as endpoint, client_in_process(endpoint, tmp_path / "hf"):
            return get_data(NAME, tmp_path / "out", base_url=f"{endpoint}/org/data/resolve/main")

    return run


def sent(hub: HubStandIn) -> int:
    return sum(record.body_bytes for record in hub.requests)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("mirror", "hf"))


def found(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in folder_bytes(out).items() if name != "data.json"}


# --- what the sets are ----------------------------------------------------------------------------------------------


def test_plain_http_only_with_a_hash() -> None:
    pieces = [piece for published in SETS.values() for piece in published.pieces]
    assert len(pieces) == 12
    for piece in pieces:
        assert piece.address.startswith(("https://", "hub:")) or piece.sha256
        assert piece.sha256 is None or (len(piece.sha256) == 64 and piece.size)
    for published in SETS.values():
        assert len({piece.name for piece in published.pieces}) == len(published.pieces)


def test_the_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = {s.name: [get._url(s, piece, None) for piece in s.pieces] for s in SETS.values()}
    assert urls["laion-2256k"][0].endswith("/improved_aesthetics_6.25plus/preprocessed_2256k.tar.gz")
    assert urls["laion-212k"][0].endswith("/improved_aesthetics_6.5plus/preprocessed_212k.tar.gz")
    commit = "b9517430f34b1080d4f741118d2440a155a165cd"
    assert urls["hpsv2"][1].endswith(f"/datasets/zhwang/HPDv2/resolve/{commit}/benchmark/concept-art.json")
    assert get._url(SETS["hpsv2"], SETS["hpsv2"].pieces[0], "https://m/x/") == "https://m/x/hpsv2/anime.json"


@pytest.mark.parametrize("url", ["ftp://x", "m", "https://me:secret@host/x"])
def test_bad_mirrors(url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        get_data("hpsv2", tmp_path / "out", base_url=url)
    assert "secret" not in str(raised.value)
    assert left(tmp_path) == []


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="did you mean laion-212k"):
        get_data("laion_212k")


def test_plain_http_mirrors(tmp_path: Path) -> None:
    """Where no hash is known, nobody may stand between; this machine itself is no network."""
    with pytest.raises(UsageError, match="plain http(.*\n)+.*preprocessed_11k"):
        get_data("laion-11k", tmp_path / "out", base_url="http://mirror.example/sets")
    assert left(tmp_path) == []
    laion, hpsv2 = SETS["laion-11k"], SETS["hpsv2"]
    for host in ("localhost", "127.0.0.1:80", "[::1]:80"):
        assert get._url(laion, laion.pieces[0], f"http://{host}/x").startswith("http://")
    assert get._url(hpsv2, hpsv2.pieces[0], "http://mirror.example").startswith("http://")  # its hash is known
    for host in ("localhost.evil.example", "127.0.0.1.evil.example", "[x"):
        with pytest.raises(UsageError, match="plain http"):
            get._url(laion, laion.pieces[0], f"http://{host}/x")


def parsed(line: str) -> dict[str, object]:
    """What the real parser makes of a command's line; nothing is run."""
    program, *words = shlex.split(line)
    assert program == "unet-surgery"
    found: Any = typer.main.get_command(app)
    while hasattr(found, "commands"):
        name, *words = words
        found = found.commands[name]
    return dict(found.make_context(name, words).params)


def files_of(published: PublishedSet) -> list[str]:
    return [(p.archive.only or "").split("/")[-1] if p.archive else p.name for p in published.pieces]


@pytest.mark.parametrize("name", SETS)
def test_what_is_said_to_come_next_is_a_command(name: str) -> None:
    folder = "my pictures/it's"
    values = [str(value) for value in parsed(SETS[name].use_in(folder)).values()]
    named = [value.removeprefix(folder).removeprefix("/") for value in values if value.startswith(folder)]
    assert len(named) == 1
    assert named[0] in ("", *files_of(SETS[name]))


def test_pictures_of_many_sizes_get_one_before_they_are_compared() -> None:
    parameters = parsed(SETS["mscoco-val2014"].use_in("coco"))
    assert (parameters["resize"], parameters["jpeg"]) == (256, 75)


def test_the_quick_start_of_the_readme() -> None:
    """Its files are those that data get makes, and score knows of them what it has to."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    lines = [line[2:].partition(" #")[0] for line in text.splitlines() if line.startswith("$ unet-surgery ")]
    path = Path(str(parsed(next(line for line in lines if " --reference " in line))["reference"]))
    assert path.parent == parsed(next(line for line in lines if " data get mscoco30k" in line))["out"]
    piece = next(piece for piece in SETS["mscoco30k"].pieces if piece.name == path.name)
    assert piece.note is not None
    assert piece.note.resolution == (256, 256)


# --- fetching -------------------------------------------------------------------------------------------------------


def test_a_set_in_place(hub: HubStandIn, fetch, tmp_path: Path) -> None:
    result = fetch(hub)
    assert found(tmp_path / "out") == WHOLE
    assert left(tmp_path) == ["out"]
    assert (result.num_pictures, result.num_files, result.num_received) == (8, 9, len(ARCHIVE))
    assert len(ARCHIVE) <= sent(hub) <= len(ARCHIVE) + 10  # a first byte, a redirect
    data = json.loads((tmp_path / "out" / "data.json").read_text())
    assert data["files"][0]["sha256"] == hashlib.sha256(ARCHIVE).hexdigest()
    assert data["files"][0]["checked"] is False
    assert result.use == f"use {tmp_path / 'out'}"
    assert result.num_bytes == sum(map(len, WHOLE.values()))
    source = open_source(tmp_path / "out")
    assert [source.read(i).caption for i in range(len(source))] == [f"picture {i}" for i in range(8)]
    with pytest.raises(OutputError, match="exists"):
        fetch(hub)


FAULTS: dict[str, list[Fault]] = {
    "cut": [Fault("cut", host="cdn", times=3, after=2, parameter=9000)],
    "reset": [Fault("reset", host="cdn", times=2, after=1)],
    "busy": [Fault("status", times=2, parameter=503), Fault("status", host="cdn", times=2, after=2, parameter=500)],
    "short": [Fault("short", host="cdn", after=2, parameter=100)],
    "another range": [Fault("range", host="cdn", after=2, parameter=3)],
    "no ranges": [Fault("no-range", host="cdn", times=ALWAYS)],
    "no ranges, cut": [
        Fault("cut", host="cdn", after=1, parameter=90_000),
        Fault("no-range", host="cdn", times=ALWAYS),
    ],
    "slow": [Fault("slow", host="cdn", times=3, parameter=0.05)],
    "a new ETag once": [Fault("etag", host="cdn", after=3)],
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_that_pass(name: str, hub: HubStandIn, fetch, tmp_path: Path) -> None:
    hub.faults += FAULTS[name]
    fetch(hub)
    assert found(tmp_path / "out") == WHOLE
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("status", times=ALWAYS, parameter=403), "refuses the file\n.*\n.*HTTP 403\n.*--base-url"),
        (Fault("status", times=ALWAYS, parameter=404), "refuses the file\n.*\n.*HTTP 404"),
        (Fault("status", times=ALWAYS, parameter=503), "broke off\n.*\n.*HTTP 503"),
    ],
)
def test_faults_that_last_leave_nothing(fault: Fault, words: str, hub: HubStandIn, fetch, tmp_path: Path) -> None:
    hub.faults.append(fault)
    with pytest.raises(HubError, match=words):
        fetch(hub)
    assert left(tmp_path) == []


def test_a_lasting_refusal_is_asked_once(hub: HubStandIn, fetch) -> None:
    hub.faults.append(Fault("status", times=ALWAYS, parameter=403))
    with pytest.raises(HubError):
        fetch(hub)
    assert len(hub.requests) == 1


def test_the_next_run_goes_on(hub: HubStandIn, fetch, tmp_path: Path) -> None:
    hub.faults.append(Fault("status", host="cdn", times=ALWAYS, after=4, parameter=503))
    with pytest.raises(HubError, match="broke off"):
        fetch(hub)
    assert left(tmp_path) == [".out.parts.unet-surgery"]
    hub.faults.clear()
    before = sent(hub)
    assert before >= 2 * (32 << 10)
    result = fetch(hub)
    assert found(tmp_path / "out") == WHOLE
    assert result.num_received < len(ARCHIVE)
    assert sent(hub) - before <= len(ARCHIVE) - (32 << 10)
    assert left(tmp_path) == ["out"]


def test_a_file_that_was_replaced_between_two_runs(hub: HubStandIn, fetch, tmp_path: Path) -> None:
    """Not one byte of the old file may end up in the new one."""
    hub.faults.append(Fault("status", host="cdn", times=ALWAYS, after=4, parameter=503))
    with pytest.raises(HubError):
        fetch(hub)
    hub.faults.clear()
    new = {name: os.urandom(len(data)) for name, data in WHOLE.items()}
    (tmp_path / "mirror" / NAME / "preprocessed_11k.tar.gz").write_bytes(tar_gz(new, level=0))
    hub.add("org/data", tmp_path / "mirror")
    fetch(hub)
    assert found(tmp_path / "out") == new


def test_a_known_hash_is_compared(hub: HubStandIn, fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hashlib.sha256(ARCHIVE).hexdigest()
    monkeypatch.setitem(SETS, NAME, small_set(right, len(ARCHIVE)))
    hub.faults.append(Fault("flip", host="cdn", after=2, parameter=100))  # once: the second fetch is whole
    fetch(hub)
    assert found(tmp_path / "out") == WHOLE
    assert json.loads((tmp_path / "out" / "data.json").read_text())["files"][0]["checked"] is True


@pytest.mark.parametrize("kind", ["etag", "no-range"])
def test_many_hosts_of_one_name(
    kind: Literal["etag", "no-range"], hub: HubStandIn, fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a known hash neither another ETag nor a whole file makes what came another's: the hash decides."""
    monkeypatch.setitem(SETS, NAME, small_set(hashlib.sha256(ARCHIVE).hexdigest(), len(ARCHIVE)))
    hub.faults += [Fault(kind, host="cdn", after=n) for n in (2, 1, 1)]
    forgotten: list[object] = []
    monkeypatch.setattr(PartialFile, "forget", forgotten.append)
    fetch(hub)
    assert found(tmp_path / "out") == WHOLE
    assert not forgotten


def test_patience_counts_from_the_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole file takes longer than patience, and is cut: it begins again; but not for ever where it is cut always."""
    now = 0.0
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(transport, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(transport, "longer", lambda pause: pause)
    reader = AddressReader("https://example.invalid/x", threading.Event())
    attempts = 0

    def attempt(cuts: int, came: Callable[[int], None]) -> None:
        nonlocal now, attempts
        attempts += 1
        for position in (10, 20):
            now += 100
            came(position)
        if attempts <= cuts:
            raise transport._Again("cut")

    reader._patiently(functools.partial(attempt, 2))
    assert attempts == 3
    attempts = 0
    with pytest.raises(HubError, match="broke off"):
        reader._patiently(functools.partial(attempt, 1000))
    assert 3 < attempts < 20


@pytest.mark.parametrize(("sha256", "size"), [("0" * 64, len(ARCHIVE)), (None, len(ARCHIVE) + 1)])
def test_another_file_than_expected(
    hub: HubStandIn, fetch, tmp_path: Path, sha256: str | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETS, NAME, small_set(sha256, size))
    with pytest.raises(HubError, match="not the one that is expected"):
        fetch(hub)
    assert left(tmp_path) == []


def test_a_flipped_bit_without_a_known_hash(hub: HubStandIn, fetch, tmp_path: Path) -> None:
    """The archive's own checksum tells; what is damaged is not unpacked a second time, but fetched again."""
    hub.faults.append(Fault("flip", host="cdn", after=3, parameter=100))
    with pytest.raises(DamagedArchiveError, match="damaged"):
        fetch(hub)
    assert not (tmp_path / "out").exists()
    fetch(hub)
    assert found(tmp_path / "out") == WHOLE


def test_a_page_in_place_of_the_file(fetch, tmp_path: Path) -> None:
    hub = mirror(tmp_path, {f"{NAME}/preprocessed_11k.tar.gz": b"<!DOCTYPE html><p>Sign in to the hotel's network"})
    with pytest.raises(DataError, match="an HTML or XML page"):
        fetch(hub)
    assert left(tmp_path) == []


def test_no_room(hub: HubStandIn, fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unet_surgery.checkpoint.disk.free_bytes", lambda folder: 5_000_000)
    archive = Archive("tar.gz", 2_000_000, 20, top="preprocessed_11k")
    piece = Piece("https://example.invalid/preprocessed_11k.tar.gz", 240_000, archive=archive)
    monkeypatch.setitem(SETS, NAME, PublishedSet(NAME, "", (piece,), "", "", ""))
    with pytest.raises(OutputError, match="not enough room"):
        fetch(hub)
    assert hub.requests == []
    assert left(tmp_path) == []


def test_no_token_is_sent(hub: HubStandIn, small: None, tmp_path: Path) -> None:
    with hub.serve() as endpoint, client_in_process(endpoint, tmp_path / "hf", "hf_" + "secret0123456789"):
        get_data(NAME, tmp_path / "out", base_url=f"{endpoint}/org/data/resolve/main")
    assert len(hub.requests) > 3
    assert {record.authorization for record in hub.requests} == {None}


def test_a_server_that_is_not_there(small: None, tmp_path: Path) -> None:
    with client_in_process("http://127.0.0.1:9", tmp_path / "hf"):
        start = time.monotonic()
        with pytest.raises(HubError, match="cannot be reached"):
            get_data(NAME, tmp_path / "out", base_url="http://127.0.0.1:9/x")
        assert time.monotonic() - start < 5
    assert left(tmp_path) == []


def test_pictures_with_coco_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
        "annotations": [
            {"image_id": 3, "caption": "a, first\n"},
            {"image_id": 3, "caption": "second"},
            {"image_id": 7, "caption": 'a "b"'},
        ],
    }
    files = {
        "val2014.zip": zipped({"val2014/": b"", "val2014/a.jpg": b"a", "val2014/b.jpg": b"b"}),
        "annotations_trainval2014.zip": zipped(
            {"annotations/captions_val2014.json": json.dumps(captions).encode(), "annotations/other.json": b"{}"}
        ),
    }
    known = SETS["mscoco-val2014"]
    pieces = tuple(
        Piece(p.address, 1, len(files[p.name]), hashlib.sha256(files[p.name]).hexdigest(), p.archive)
        for p in known.pieces
    )
    monkeypatch.setitem(SETS, known.name, PublishedSet(known.name, "", pieces, "", "", "", 2, known.captions))
    monkeypatch.setattr("unet_surgery.checkpoint.disk.free_bytes", lambda folder: 1 << 40)
    hub = mirror(tmp_path, {f"{known.name}/{name}": data for name, data in files.items()})
    with hub.serve() as endpoint, client_in_process(endpoint, tmp_path / "hf"):
        get_data(known.name, tmp_path / "out", base_url=f"{endpoint}/org/data/resolve/main")
    assert sorted(found(tmp_path / "out")) == ["a.jpg", "b.jpg", "captions_val2014.json", "metadata.csv"]
    with open(tmp_path / "out" / "metadata.csv", newline="") as table:
        assert list(csv.reader(table)) == [["file_name", "caption"], ["b.jpg", 'a "b"'], ["a.jpg", "a, first"]]
    assert len(open_source(tmp_path / "out")) == 2


def test_statistics_come_with_what_is_known_of_them(tmp_path: Path) -> None:
    """pytorch-fid's file says no resolution, and score refuses it without; the note beside it says so."""
    pytest.importorskip("torch")
    from unet_surgery.evaluate.pictures import Change
    from unet_surgery.evaluate.reference import open_reference

    plain = io.BytesIO()
    np.savez_compressed(plain, mu=np.zeros(2048), sigma=np.eye(2048))
    files = {"metadata.csv": b"file_name,text\na.jpg,a cat\n", "real_im256.npz": plain.getvalue()}
    hub = mirror(tmp_path, {f"mscoco30k/{name}": data for name, data in files.items()})
    with hub.serve() as endpoint, client_in_process(endpoint, tmp_path / "hf"):
        result = get_data("mscoco30k", tmp_path / "out", base_url=f"{endpoint}/org/data/resolve/main")
    assert sorted(found(tmp_path / "out")) == ["metadata.csv", "real_im256.json", "real_im256.npz"]
    assert result.num_files == 3
    assert result.num_bytes == sum(map(len, found(tmp_path / "out").values()))
    data = json.loads((tmp_path / "out" / "data.json").read_text())
    assert [f["sha256"] for f in data["files"]] == [hashlib.sha256(content).hexdigest() for content in files.values()]
    path = tmp_path / "out" / "real_im256.npz"
    reference = open_reference(path, None, decoders=1)
    assert (reference.resolution, reference.count) == ((256, 256), 40_504)
    assert reference.change == Change(256, 75).words
    with pytest.raises(DataError, match="another resolution"):
        open_reference(path, 512, decoders=1)
    note = tmp_path / "out" / "real_im256.json"
    other = note.read_text().replace(data["files"][1]["sha256"], "0" * 64)
    damaged = '{"format": "unet-surgery-statistics-note"}'
    for text, words in ((other, "tells of another file"), (damaged, "damaged"), ("[", "JSON"), ("{}", "do not say")):
        note.write_text(text)
        with pytest.raises(DataError, match=words):
            open_reference(path, None, decoders=1)


# --- killed processes -----------------------------------------------------------------------------------------------

CHILD = """
import sys, unet_surgery.hub.connections as connections
sys.path.insert(0, sys.argv[1])
import test_data_get as tests
from unet_surgery.data.publishedsets import SETS
SETS[tests.NAME] = tests.small_set()
connections.PIECE_BYTES = 32 << 10
from unet_surgery.cli.main import app
app(["data", "get", tests.NAME, "-o", sys.argv[2], "--base-url", sys.argv[3], *sys.argv[4:]])
"""


def start(tmp_path: Path, endpoint: str) -> subprocess.Popen[str]:
    words = [str(Path(__file__).parent), str(tmp_path / "out"), f"{endpoint}/org/data/resolve/main"]
    env = {**os.environ, **client_env(endpoint, tmp_path / "hf"), "UNET_SURGERY_PATIENCE": "20"}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGKILL, -9, id="kill", marks=pytest.mark.extra),
        pytest.param(signal.SIGINT, 130, id="int"),
        pytest.param(signal.SIGTERM, 143, id="term", marks=pytest.mark.extra),
    ],
)
def test_ended_while_it_fetches(number: int, code: int, hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.append(Fault("slow", host="cdn", times=ALWAYS, after=3, parameter=0.3))
    with hub.serve() as endpoint:
        child = start(tmp_path, endpoint)
        journal = tmp_path / ".out.parts.unet-surgery" / "preprocessed_11k.tar.gz.parts"
        wait_for(lambda: journal.is_file() and len(journal.read_bytes().splitlines()) >= 3, child)
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
        assert child.returncode == code
        if number != signal.SIGKILL:
            assert "what has come so far stays in" in err
            assert "Traceback" not in err
            assert left(tmp_path) == [".out.parts.unet-surgery"]
        assert not (tmp_path / "out").exists()
        hub.faults.clear()
        before = len(hub.requests)
        again = start(tmp_path, endpoint)
        out, err = again.communicate(timeout=60)
        assert again.returncode == 0, err
        assert out == f"{tmp_path / 'out'}\n"
        assert sum(record.body_bytes for record in hub.requests[before:]) <= len(ARCHIVE) - (64 << 10) + 2000
    assert found(tmp_path / "out") == WHOLE
    assert left(tmp_path) == ["out"]


@pytest.mark.extra
def test_killed_while_it_unpacks(tmp_path: Path) -> None:
    """Nothing is at the output; the next run fetches no byte again, and clears what was half unpacked."""
    files = {f"train/{i:04d}.jpg": b"" for i in range(3000)}
    archive = tar_gz(files)
    hub = mirror(tmp_path, {f"{NAME}/preprocessed_11k.tar.gz": archive})
    code = CHILD.replace("tests.small_set()", "tests.small_set(max_files=5000)")
    staged = tmp_path / ".out.unet-surgery"
    with hub.serve() as endpoint:
        words = [str(Path(__file__).parent), str(tmp_path / "out"), f"{endpoint}/org/data/resolve/main", "-q"]
        env = {**os.environ, **client_env(endpoint, tmp_path / "hf")}
        child = subprocess.Popen([sys.executable, "-c", code, *words], env=env)
        wait_for(lambda: os.path.isdir(staged / "train"), child)
        child.send_signal(signal.SIGSTOP)
        busy = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True)
        child.kill()
        child.wait()
        assert not (tmp_path / "out").exists()
        assert busy.returncode == 4
        assert "another process is writing this output" in busy.stderr
        before = len(hub.requests)
        again = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert sum(record.body_bytes for record in hub.requests[before:]) <= 10  # is it the same still?
    assert len(os.listdir(tmp_path / "out" / "train")) == 3000
    assert left(tmp_path) == ["out"]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_list() -> None:
    out, _ = tool("data", "ls")
    assert "182.00 GB" in out
    data = json.loads(tool("data", "ls", "--json")[0])
    assert [entry["name"] for entry in data] == list(SETS)
    assert {entry["name"]: entry["pictures"] for entry in data}["laion-2256k"] == 2_256_472
    assert next(entry for entry in data if entry["name"] == "mscoco30k")["bytes"] is None


def test_the_command_fetches_prompts(tmp_path: Path) -> None:
    """A real set by the real command: hashes are known, so a mirror of other files is refused."""
    files = {f"hpsv2/{piece.name}": b'["a cat"]' + bytes(piece.size - 9) for piece in SETS["hpsv2"].pieces}
    hub = mirror(tmp_path, files)
    with hub.serve() as endpoint:
        env = {**client_env(endpoint, tmp_path / "hf"), "UNET_SURGERY_DATA_URL": f"{endpoint}/org/data/resolve/main"}
        _, err = tool("data", "get", "hpsv2", "-o", "prompts", cwd=tmp_path, env=env, code=5)
    assert "sha256 6b38a479" in err
    assert left(tmp_path) == []
