"""The stand-in for the Hub is one: the real client creates, uploads, lists, downloads and resumes with it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_content import git_hash
from hub_faults import ALWAYS, Fault
from hub_server import CHUNK_BYTES, READER, WRITER, HubStandIn, client_in_process
from huggingface_hub import HfApi, constants, get_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from teachers import folder_bytes

LARGE, SMALL = bytes(range(256)) * 400, b'{"a": 1}\n'  # 102,400 bytes: some chunks
NAME = "org/name"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client's own upload


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "model.safetensors").write_bytes(LARGE)
    (folder / "unet" / "config.json").write_bytes(SMALL)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Name\n")
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[HubStandIn]:
    hub = HubStandIn()
    hub.add(NAME, folder)
    with hub.serve() as endpoint, client_in_process(endpoint, tmp_path / "home"):
        yield hub


def api(hub: HubStandIn, token: str | bool = WRITER) -> HfApi:
    return HfApi(hub.endpoint, token=token)


def get(hub: HubStandIn, path: str, **headers: str) -> Any:
    return get_session().get(f"{hub.endpoint}/{NAME}/resolve/main/{path}", headers=headers, follow_redirects=True)


LARGE_PATH, SMALL_PATH = "unet/model.safetensors", "unet/config.json"


# --- what is there --------------------------------------------------------------------------------------------------


def test_create_upload_and_download(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    client = api(hub)
    assert client.whoami()["auth"]["accessToken"]["role"] == "write"
    for _ in range(2):
        assert client.create_repo("org/new", exist_ok=True).repo_id == "org/new"
    made = client.upload_folder(repo_id="org/new", folder_path=folder, commit_message="first")
    commits = hub.repositories["org/new"].history()
    assert [(c.oid == made.oid, c.message) for c in commits] == [(True, "first"), (False, "initial commit")]
    assert len(hub.seen("PUT", "cdn")) == 1
    back = snapshot_download("org/new", endpoint=hub.endpoint, local_dir=tmp_path / "back", token=False)
    got = {name: data for name, data in folder_bytes(Path(back)).items() if not name.startswith(".")}
    assert got == folder_bytes(folder)
    # the same again makes no commit, and sends no object
    client.upload_folder(repo_id="org/new", folder_path=folder, commit_message="second")
    assert len(hub.repositories["org/new"].history()) == 2
    assert len(hub.seen("PUT", "cdn")) == 1
    with pytest.raises(HfHubHTTPError) as conflict:
        client.create_repo("org/new")
    assert conflict.value.response.status_code == 409


def test_what_files_are(hub: HubStandIn) -> None:
    info = api(hub, False).model_info(NAME, files_metadata=True)
    assert info.sha == hub.repositories[NAME].refs["refs/heads/main"]
    siblings = {s.rfilename: s for s in info.siblings or ()}
    assert (siblings[SMALL_PATH].blob_id, siblings[SMALL_PATH].lfs) == (git_hash(SMALL), None)
    lfs = siblings[LARGE_PATH].lfs
    assert lfs is not None
    assert (lfs.sha256, lfs.size) == (hashlib.sha256(LARGE).hexdigest(), len(LARGE))
    paths = api(hub).get_paths_info(NAME, [LARGE_PATH, "unet", "nothing"])
    assert [entry.path for entry in paths] == ["unet", LARGE_PATH]


def test_listings_come_in_pages(hub: HubStandIn) -> None:
    hub.page_size = 2
    tree = [entry.path for entry in api(hub).list_repo_tree(NAME, recursive=True)]
    assert tree == ["unet", "README.md", SMALL_PATH, LARGE_PATH]
    assert len(hub.seen("GET", "hub", "/tree/")) == 2
    assert [entry.path for entry in api(hub).list_repo_tree(NAME)] == ["unet", "README.md"]


def test_revisions_and_pull_requests(hub: HubStandIn, folder: Path) -> None:
    client = api(hub)
    first = hub.repositories[NAME].refs["refs/heads/main"]
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# New\n")
    made = client.upload_folder(repo_id=NAME, folder_path=folder, create_pr=True, commit_message="a change")
    assert made.pr_url == f"{hub.endpoint}/{NAME}/discussions/1"
    assert made.pr_revision == "refs/pr/1"
    client.create_branch(NAME, branch="own")
    client.upload_folder(repo_id=NAME, folder_path=folder, revision="own", commit_message="mine")
    refs = {ref.name: ref.target_commit for ref in client.list_repo_refs(NAME).branches}
    assert refs["main"] == first
    assert hub.repositories[NAME].resolve("own").files["README.md"].data.endswith(b"# New\n")  # type: ignore[union-attr]
    with pytest.raises(RevisionNotFoundError):
        client.upload_folder(repo_id=NAME, folder_path=folder, revision="nowhere")


def test_who_may(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    hub.add("org/private", folder, private_token=READER)
    hub.add("org/gated", folder, private_token=READER, gated=True)
    for name in ("org/private", "org/gated"):
        path = hf_hub_download(name, LARGE_PATH, endpoint=hub.endpoint, token=READER)
        assert Path(path).read_bytes() == LARGE
    assert {r.authorization for r in hub.seen(host="cdn")} == {None}  # the client keeps the token to the Hub
    with pytest.raises(RepositoryNotFoundError) as hidden:
        api(hub, False).model_info("org/private")
    assert hidden.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError):
        api(hub).model_info("org/nothing")
    with pytest.raises(GatedRepoError):
        hf_hub_download("org/gated", SMALL_PATH, endpoint=hub.endpoint, token=WRITER, cache_dir=str(tmp_path / "other"))
    with pytest.raises(RevisionNotFoundError):
        api(hub).model_info(NAME, revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(NAME, "nothing", endpoint=hub.endpoint, token=False)
    for token, status in ((READER, 403), ("hf_unknown", 401)):
        with pytest.raises(HfHubHTTPError) as refused:
            api(hub, token).create_repo("org/new")
        assert refused.value.response.status_code == status


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [SMALL_PATH, LARGE_PATH], ids=["small", "large"])
def test_ranges(hub: HubStandIn, path: str) -> None:
    data = {SMALL_PATH: SMALL, LARGE_PATH: LARGE}[path]
    etag = get(hub, path).headers["ETag"]
    part = get(hub, path, Range="bytes=2-4")
    assert (part.status_code, part.content) == (206, data[2:5])
    assert part.headers["Content-Range"] == f"bytes 2-4/{len(data)}"
    assert get(hub, path, Range="bytes=5-").content == data[5:]
    assert get(hub, path, Range="bytes=-3").content == data[-3:]
    beyond = get(hub, path, Range=f"bytes={len(data)}-")
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(data)}")
    assert get(hub, path, **{"Range": "bytes=2-", "If-Range": etag}).status_code == 206
    assert get(hub, path, **{"Range": "bytes=2-", "If-Range": '"old"'}).content == data
    assert [r.range for r in hub.requests][-1] == "bytes=2-"


def test_a_redirect_says_what_is_behind_it(hub: HubStandIn) -> None:
    answer = get_session().head(f"{hub.endpoint}/{NAME}/resolve/main/{LARGE_PATH}", follow_redirects=False)
    assert answer.status_code == 302
    assert answer.headers["X-Linked-Etag"] == f'"{hashlib.sha256(LARGE).hexdigest()}"'
    assert int(answer.headers["X-Linked-Size"]) == len(LARGE)
    assert answer.headers["X-Repo-Commit"] == hub.repositories[NAME].refs["refs/heads/main"]
    assert answer.headers["Location"].startswith(hub.cdn)


# --- faults ---------------------------------------------------------------------------------------------------------


def test_the_client_resumes_what_was_cut(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # it keeps whole ones of its 10 MB
    hub.faults.append(Fault("cut", host="cdn", parameter=CHUNK_BYTES + 5))
    path = hf_hub_download(NAME, LARGE_PATH, endpoint=hub.endpoint, token=False)
    assert Path(path).read_bytes() == LARGE
    first, second = hub.seen("GET", "cdn")
    assert (first.status, first.body_bytes) == (200, CHUNK_BYTES + 5)
    assert second.status == 206
    assert second.body_bytes + int((second.range or "")[len("bytes=") : -1]) == len(LARGE)


def test_statuses_pass(hub: HubStandIn) -> None:
    hub.faults.append(Fault("status", "*/tree/*", parameter=429, times=1, headers={"Retry-After": "0"}))
    hub.faults.append(Fault("status", "*/resolve/*", parameter=503, method="GET", after=1))
    assert get(hub, SMALL_PATH).status_code == 200
    assert get(hub, SMALL_PATH).status_code == 503
    assert get(hub, SMALL_PATH).status_code == 200
    url = f"{hub.endpoint}/api/models/{NAME}/tree/main"
    refused = get_session().get(url)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "0")
    assert get_session().get(url).status_code == 200


BYTES = "bytes=10-"
BAD: list[tuple[Fault, int | None, bytes | None]] = [
    (Fault("reset"), None, None),
    (Fault("cut", parameter=7), None, None),
    (Fault("short", parameter=2), 206, LARGE[10:-2]),
    (Fault("range", parameter=3), 206, LARGE[13:]),
    (Fault("flip", parameter=1), 206, LARGE[10:11] + bytes([LARGE[11] ^ 1]) + LARGE[12:]),
    (Fault("no-range"), 200, LARGE),
    (Fault("slow", parameter=0.02), 206, LARGE[10:]),
    (Fault("stall"), None, None),
    (Fault("stall", parameter=7), None, None),
]


@pytest.mark.parametrize(("fault", "status", "content"), BAD, ids=[f"{f.kind}-{f.parameter}" for f, _, _ in BAD])
@pytest.mark.parametrize("host", ["hub", "cdn"])
def test_faults_of_a_body(
    hub: HubStandIn, folder: Path, host: Any, fault: Fault, status: int | None, content: bytes | None
) -> None:
    if host == "hub":  # the same file, in git
        path = "unet/large.bin"
        (folder / path).write_bytes(LARGE)
        hub.add(NAME, folder)
    else:
        path = LARGE_PATH
    hub.faults.append(Fault(fault.kind, host=host, parameter=fault.parameter))
    url, headers = f"{hub.endpoint}/{NAME}/resolve/main/{path}", {"Range": BYTES}
    start = time.monotonic()
    if status is None:
        with pytest.raises(Exception, match="reset|closed|incomplete|disconnected|timed out"):
            get_session().get(url, headers=headers, follow_redirects=True, timeout=0.3)
        assert hub.seen(host=host)[-1].body_bytes == (fault.parameter or 0)
    else:
        answer = get_session().get(url, headers=headers, follow_redirects=True)
        assert (answer.status_code, answer.content) == (status, content)
    assert (fault.kind == "slow") <= (time.monotonic() - start > 0.02 * len(LARGE) / CHUNK_BYTES)
    assert get_session().get(url, headers=headers, follow_redirects=True).content == LARGE[10:]  # used up


def test_an_etag_changes(hub: HubStandIn) -> None:
    hub.faults.append(Fault("etag", f"*/{LARGE_PATH}", host="hub", after=1, times=ALWAYS))
    url = f"{hub.endpoint}/{NAME}/resolve/main/{LARGE_PATH}"
    etags = [get_session().head(url, follow_redirects=False).headers["X-Linked-Etag"] for _ in range(3)]
    assert etags[0] != etags[1] == etags[2]


def test_a_wrong_object_is_not_stored(hub: HubStandIn) -> None:
    url = f"{hub.cdn}/objects/{'0' * 64}?signature={hub.signature}"
    assert get_session().put(url, content=b"something else").status_code == 400
    assert "0" * 64 not in hub.objects
