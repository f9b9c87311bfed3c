"""Published sets over a network that fails and from archives that lie: the whole set in place, or one clear error."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_faults import ALWAYS, Fault
from hub_server import HubStandIn, client_env, client_in_process
from hypothesis import given
from hypothesis import strategies as st
from teachers import folder_bytes
from test_cli import tool

from unet_surgery.data import get
from unet_surgery.data.get import get_data
from unet_surgery.data.publishedsets import SETS, Archive, Piece, PublishedSet
from unet_surgery.data.sources import open_source
from unet_surgery.data.unpack import DamagedArchiveError, Limits, unpack_tar_gz, unpack_zip
from unet_surgery.errors import DataError, HubError, OutputError, UsageError
from unet_surgery.hub import connections

LIMITS = Limits(10_000_000, 100)
NAME = "laion-11k"
FILES = {f"train/{i:04d}.jpg": os.urandom(30_000) for i in range(8)}
TABLE = "file_name,text\n" + "".join(f"{i:04d}.jpg,picture {i}\n" for i in range(8))


def tar_gz(files: dict[str, bytes], *, top: str = "preprocessed_11k", level: int = 1) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=level) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{top}/{name}" if top else name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


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


def small_set(sha256: str | None = None, size: int | None = None, max_files: int = 20) -> PublishedSet:
    archive = Archive("tar.gz", 300_000, max_files, top="preprocessed_11k")
    piece = Piece("https://example.invalid/preprocessed_11k.tar.gz", 240_000, size, sha256, archive)
    return PublishedSet(NAME, "a few", (piece,), "none", "a test", "use it", num_pictures=8)


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
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["kill", "int", "term"]
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


# --- hostile archives -----------------------------------------------------------------------------------------------


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"x"
) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        info.size = len(data) if kind == tarfile.REGTYPE else 0
        tar.addfile(info, io.BytesIO(data))

    return add


HOSTILE = {
    "absolute": member("/etc/passwd"),
    "dots": member("a/../../b"),
    "dots at the end": member("a/.."),
    "an absolute folder": member("/tmp/x", tarfile.DIRTYPE),
    "dots in a folder": member("../x", tarfile.DIRTYPE),
    "backslashes": member("..\\x"),
    "a control character": member("a\x1b[2Jb.jpg"),
    "no UTF-8": member("a\udcffb.jpg"),
    "a long name": member("n" * 256 + ".jpg"),
    "deep": member("/".join("abcdefghijk")),
    "a symbolic link": member("a.jpg", tarfile.SYMTYPE, "/etc/passwd"),
    "a link inside": member("a.jpg", tarfile.SYMTYPE, "good.jpg"),
    "a hard link": member("a.jpg", tarfile.LNKTYPE, "good.jpg"),
    "a FIFO": member("a.jpg", tarfile.FIFOTYPE),
    "a device": member("a.jpg", tarfile.CHRTYPE),
    "twice": member("good.jpg"),
    "a file for a folder": member("good.jpg/a.jpg"),
    "much": member("big.jpg", data=bytes(11_000_000)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars(name: str, tmp_path: Path) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        member("good.jpg")(tar)
        HOSTILE[name](tar)
    archive, folder = tmp_path / "x.tar.gz", tmp_path / "in" / "folder"
    archive.write_bytes(data.getvalue())
    folder.mkdir(parents=True)
    with pytest.raises(DataError) as raised:
        unpack_tar_gz(archive, folder, LIMITS, lambda _: None)
    assert "the archive" in str(raised.value)
    assert "\x1b" not in str(raised.value)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != archive]
    assert all(path.is_relative_to(folder) and not path.is_symlink() for path in written)
    assert sum(path.stat().st_size for path in written) <= LIMITS.num_bytes


def huge_header(kind: bytes) -> bytes:
    """A tar whose extended header says that it is 1 GB, and is: of zeros, so that it packs to 1 MB."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 1 << 30
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(1 << 20))
    return packed.getvalue()


DAMAGED = {
    "cut": ARCHIVE[:-100_000],
    "cut in the checksum": ARCHIVE[:-4],
    "a wrong checksum": ARCHIVE[:-8] + bytes(4) + ARCHIVE[-4:],
    "no gzip": b"something else entirely, and longer than a header" * 20,
    "empty": b"",
    "gzip of no tar": gzip.compress(b"something else entirely, and longer than a header" * 20),
    "no end": gzip.compress(gzip.decompress(tar_gz(FILES))[: 512 * 62 + 100]),
    "no end blocks": gzip.compress(gzip.decompress(tar_gz({"a.jpg": b"x"}))[:1024]),
    "a bad header": gzip.compress(gzip.decompress(tar_gz({"a.jpg": b"x"}))[:1024] + b"?" * 512 + bytes(2048)),
    "a huge pax header": huge_header(tarfile.XHDTYPE),
    "a huge long name": huge_header(tarfile.GNUTYPE_LONGNAME),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_tars(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(DAMAGED[name])
    with pytest.raises(DamagedArchiveError):
        unpack_tar_gz(tmp_path / "x.tar.gz", tmp_path, LIMITS, lambda _: None)


def test_many_files(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(tar_gz({f"{i}": b"" for i in range(101)}, top=""))
    with pytest.raises(DataError, match="implausibly many"):
        unpack_tar_gz(tmp_path / "x.tar.gz", tmp_path / "out", LIMITS, lambda _: None)


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    files = {"a.jpg": b"x", "._a.jpg": b"y", ".DS_Store": b"z", "__MACOSX/a.jpg": b"w", "d/.e/f": b"v"}
    (tmp_path / "x.tar.gz").write_bytes(tar_gz(files, top="./t"))
    done = unpack_tar_gz(tmp_path / "x.tar.gz", tmp_path / "out", Limits(1000, 10, top="t"), lambda _: None)
    assert folder_bytes(tmp_path / "out") == {"a.jpg": b"x"}
    assert (done.num_files, done.skipped) == (1, 4)


names = st.lists(st.sampled_from(["a", "b", "c.jpg", "é", "d e"]), min_size=1, max_size=3).map("/".join)


@given(st.dictionaries(names, st.binary(max_size=2000), max_size=6))
def test_both_kinds_give_what_was_packed(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    """A law: unpacked is what was packed, for any names that can stand beside each other."""
    parents = {"/".join(name.split("/")[:i]) for name in files for i in range(1, name.count("/") + 1)}
    files = {name: data for name, data in files.items() if name not in parents}
    root = tmp_path_factory.mktemp("law")
    (root / "x.tar.gz").write_bytes(tar_gz(files, top=""))
    (root / "x.zip").write_bytes(zipped(files))
    read: list[int] = []
    done = unpack_tar_gz(root / "x.tar.gz", root / "tar", LIMITS, read.append)
    assert done.sha256 == hashlib.sha256((root / "x.tar.gz").read_bytes()).hexdigest()
    assert sum(read) == (root / "x.tar.gz").stat().st_size
    unpack_zip(root / "x.zip", root / "zip", LIMITS, read.append)
    for folder in (root / "tar", root / "zip"):
        assert (folder_bytes(folder) if files else {}) == files


def linked() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        info = zipfile.ZipInfo("a.jpg")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return data.getvalue()


def flipped(data: bytes) -> bytes:
    return data[:60] + bytes([data[60] ^ 1]) + data[61:]


ZIPS = {
    "dots": zipped({"../x": b"x"}),
    "absolute": zipped({"/x": b"x"}),
    "a link": linked(),
    "a bomb": zipped({"x": bytes(11_000_000)}),
    "cut": zipped({"x": os.urandom(1000)})[:-40],
    "flipped": flipped(zipped({"x": os.urandom(1000)})),
    "no zip": b"something else",
    "encrypted": zipped({"x": b"x"}).replace(b"\x14\x03\x14\x00\x00", b"\x14\x03\x14\x00\x01"),
}  # fmt: skip


@pytest.mark.parametrize("name", ZIPS)
def test_hostile_zips(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(ZIPS[name])
    with pytest.raises(DataError, match="the archive"):
        unpack_zip(tmp_path / "x.zip", tmp_path / "out", LIMITS, lambda _: None)
    assert not (tmp_path / "x").exists()


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
