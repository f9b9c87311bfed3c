"""push: the real client sends a student to a stand-in for the Hub; what comes back is the student."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hub_faults import ALWAYS, Fault
from hub_server import READER, WRITER, HubStandIn, client_env, client_in_process
from teachers import WEIGHTS, folder_bytes
from test_cli import tool

import unet_surgery
from unet_surgery.errors import HubError, UsageError, VerificationError
from unet_surgery.hub.names import check_branch, check_repository
from unet_surgery.hub.upload import Entry, decide, plan_upload

if TYPE_CHECKING:
    from hub_content import Commit

NAME = "org/small"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unet_surgery.prune("bk_tiny", "tiny-random", tmp_path_factory.mktemp("pruned") / "student").folder


@pytest.fixture
def student(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "student"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    """A Hub to which this process speaks, logged in with a token that may write."""
    hub = HubStandIn()
    with hub.serve() as endpoint, client_in_process(endpoint, tmp_path / "home", WRITER):
        yield hub


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits a second and more before it tries again."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def commits(hub: HubStandIn, revision: str = "main") -> list[Commit]:
    """Return the commits of pushes, the newest first; the first of all is the Hub's own."""
    return hub.repositories[NAME].history(revision)[:-1] if NAME in hub.repositories else []


def changes(commit: Commit, hub: HubStandIn) -> set[str]:
    assert commit.parent is not None
    before = hub.repositories[NAME].commits[commit.parent].files
    return {path for path in commit.files.keys() | before.keys() if commit.files.get(path) != before.get(path)}


# --- the way there and back -----------------------------------------------------------------------------------------


def test_there_and_back(student: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    hub = HubStandIn()
    with hub.serve() as endpoint:
        env = client_env(endpoint, tmp_path / "hf", WRITER)
        out, err = tool("push", str(student), NAME, cwd=tmp_path, env=env)
        with client_in_process(endpoint, tmp_path / "other"):
            back = Path(snapshot_download(NAME))
    (commit,) = commits(hub)
    assert out == f"{endpoint}/{NAME}/tree/{commit.oid}\n"
    assert commit.message == f"bk_tiny of tiny-random, by unet-surgery {unet_surgery.__version__}"
    rows = [line.split() for line in err.splitlines()]
    size = (student / "unet" / WEIGHTS).stat().st_size
    assert [f"unet/{WEIGHTS}", f"{size:,}"] in rows
    total = sum(len(data) for data in folder_bytes(student).values())
    assert ["17", "files", f"{total:,}"] in rows
    assert {name: data for name, data in folder_bytes(back).items() if name != ".gitattributes"} == folder_bytes(
        student
    )
    assert {record.authorization for record in hub.seen(host="cdn")} == {None}
    pipeline = DiffusionPipeline.from_pretrained(back)
    assert sum(p.numel() for p in pipeline.unet.parameters()) == 815_140


def test_a_second_push_sends_what_changed(hub: HubStandIn, student: Path) -> None:
    first = unet_surgery.push(student, NAME)
    assert first.sent is not None
    assert first.sent.changed
    again = unet_surgery.push(student, NAME)
    assert again.sent is not None
    assert (again.sent.changed, again.sent.commit, again.sent.url) == (False, first.sent.commit, first.sent.url)
    assert len(commits(hub)) == 1
    objects = len(hub.seen("PUT", "cdn"))
    assert objects == 3
    with (student / "README.md").open("a") as card:
        card.write("\nA line more.\n")
    third = unet_surgery.push(student, NAME, message="a line more")
    assert third.sent is not None
    assert changes(commits(hub)[0], hub) == {"README.md"}
    assert commits(hub)[0].message == "a line more"
    assert len(hub.seen("PUT", "cdn")) == objects
    assert hub.seen("POST", "hub", "/commit/")[-1].given_bytes < 10_000


def test_what_is_only_there_stays(hub: HubStandIn, student: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    (there / "samples").mkdir(parents=True)
    (there / "samples" / "house.png").write_bytes(b"a picture")
    hub.add(NAME, there)
    result = unet_surgery.push(student, NAME)
    assert result.sent is not None
    assert result.sent.only_there == ("samples/house.png",)
    assert "samples/house.png" in hub.repositories[NAME].history()[0].files


def test_a_pull_request(hub: HubStandIn, student: Path, tmp_path: Path) -> None:
    hub.add(NAME, tmp_path / "student" / "vae")
    before = dict(hub.repositories[NAME].refs)
    result = unet_surgery.push(student, NAME, create_pr=True)
    assert result.sent is not None
    assert result.sent.url == f"{hub.endpoint}/{NAME}/discussions/1"
    after = hub.repositories[NAME].refs
    assert {name: oid for name, oid in after.items() if name in before} == before
    assert after["refs/pr/1"] == result.sent.commit
    # the advice of an upload that broke off: into the one that is open
    (student / "README.md").write_text("---\nlicense: mit\n---\n")
    more = unet_surgery.push(student, NAME, revision="refs/pr/1")
    assert more.sent is not None
    assert hub.repositories[NAME].refs == {**after, "refs/pr/1": more.sent.commit}


def test_a_private_model(hub: HubStandIn, student: Path) -> None:
    unet_surgery.push(student, NAME, private=True)
    assert hub.repositories[NAME].private_token == WRITER
    unet_surgery.push(student, NAME, private=True)
    hub.repositories[NAME].private_token = None
    (student / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(UsageError, match="it is public"):
        unet_surgery.push(student, NAME, private=True)
    assert len(commits(hub)) == 1


def test_a_branch(hub: HubStandIn, student: Path) -> None:
    for _ in range(2):
        result = unet_surgery.push(student, NAME, revision="fp16/try")
        assert result.sent is not None
        assert commits(hub, "fp16/try")[0].oid == result.sent.commit
    assert len(commits(hub, "fp16/try")) == 1
    assert commits(hub) == []
    hub.repositories[NAME].refs["refs/tags/v1"] = result.sent.commit
    with pytest.raises(UsageError, match="the revision is a tag"):
        unet_surgery.push(student, NAME, revision="v1")


# --- what goes up ---------------------------------------------------------------------------------------------------


def test_a_dry_run_touches_no_network(student: Path, tmp_path: Path) -> None:
    (student / ".git").mkdir()
    (student / ".git" / "config").write_text("[remote]")
    (student / "vae" / ".DS_Store").write_text("")
    (tmp_path / "secret").write_text("mine")
    (student / "notes").symlink_to(tmp_path / "secret")
    hub = HubStandIn()
    with hub.serve() as endpoint:  # and no token
        env = client_env(endpoint, tmp_path / "hf")
        out, err = tool("push", str(student), NAME, "--dry-run", env=env)
        data = json.loads(tool("push", str(student), NAME, "--dry-run", "--json", "-q", env=env)[0])
    assert hub.requests == []
    assert "17 files" in out
    assert "left out: .git/ (hidden)" in err
    assert "left out: notes (a link that leads out of the folder)" in err
    assert data["left_out"].keys() == {".git/", "vae/.DS_Store", "notes"}
    assert data["sent"] is None
    assert len(data["files"]) == 17
    assert data["num_bytes"] == sum(file["num_bytes"] for file in data["files"])


def test_a_json_of_a_push(student: Path, tmp_path: Path) -> None:
    hub = HubStandIn()
    with hub.serve() as endpoint:
        env = client_env(endpoint, tmp_path / "hf", WRITER)
        out, err = tool("push", str(student), NAME, "--json", "-q", env=env)
        assert err == ""
        again, said = tool("push", str(student), NAME, env=env)
    sent = json.loads(out)["sent"]
    assert sent == {"url": again.strip(), "commit": commits(hub)[0].oid, "changed": True, "only_there": []}
    assert said.count("commit") == 1
    assert said.endswith(f"{NAME} has all of it already: no commit was made\n")


def test_links(student: Path, tmp_path: Path) -> None:
    (student / "again.txt").symlink_to("recipe.yaml")
    (student / "nowhere").symlink_to("nothing")
    (student / "around").symlink_to(".")
    os.mkfifo(student / "pipe")
    upload = plan_upload(student)
    assert len(upload.files) == 18
    assert dict(upload.left_out) == {
        "nowhere": "a link that leads nowhere", "around/": "a link to a folder", "pipe": "a FIFO",
    }  # fmt: skip
    weights = student / "unet" / WEIGHTS
    shutil.move(weights, tmp_path / WEIGHTS)
    weights.symlink_to(tmp_path / WEIGHTS)
    with pytest.raises(UsageError, match="a part of the student cannot be sent"):
        unet_surgery.push(student, NAME, dry_run=True)


def test_a_snapshot_of_the_hub_cache_goes_up(hub: HubStandIn, student: Path) -> None:
    """Its files are links into the cache's blobs."""
    from huggingface_hub import snapshot_download

    unet_surgery.push(student, NAME)
    snapshot = Path(snapshot_download(NAME))
    assert (snapshot / "plan.json").is_symlink()
    assert unet_surgery.push(snapshot, "org/copy").upload.files == plan_upload(student).files
    assert hub.repositories["org/copy"].history()[0].files.keys() == hub.repositories[NAME].history()[0].files.keys()


@pytest.mark.parametrize("name", ["unet", "vae", "plan.json", "README.md", "LICENSE", "model_index.json", WEIGHTS])
def test_a_part_is_never_left_out(name: str) -> None:
    with pytest.raises(UsageError, match="a part of the student"):
        decide([Entry(name, 0, "a FIFO")], ["vae"])


# --- refused before anything is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/tree/main?x=1", "org/name"),
        ("hf.co/org/name/", "org/name"),
        ("org/my name", "org/my-name"),
        (" org/name ", "org/name"),
        ("org/name.git", "org/name"),
        ("org/name@main", "org/name"),
        ("models/org/name", "org/name"),
        ("org\\name", "org/name"),
        ("org/na--me", "org/na-me"),
        ("name", None),
        ("", None),
        ("a/b/c", None),
        ("../name", None),
        ("https://huggingface.co/datasets/org/name", None),
        ("org/\x1b[31m", "org/31m"),
        ("org/" + "n" * 97, None),
    ],
)
def test_names_are_corrected(text: str, meant: str | None) -> None:
    with pytest.raises(UsageError, match="not the name of a model") as refused:
        unet_surgery.push("nowhere", text)
    assert refused.value.hint is not None
    assert (f"did you mean {meant!r}?" == refused.value.hint) if meant else "ORG/NAME" in refused.value.hint
    assert "\x1b" not in str(refused.value)


def test_names_that_are_right() -> None:
    from huggingface_hub.utils import validate_repo_id

    for name in ("org/name", "o/n", "Org-1/na.me_2", "o/" + "n" * 96):
        assert check_repository(name) == name
        validate_repo_id(name)
    for branch in ("main", "fp16", "try/one.2", "refs/pr/12"):
        assert check_branch(branch) == branch


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("refs/heads/fp16", "did you mean 'fp16'?"),
        ("refs/tags/v1", "refs/pr/"),
        ("0123456789abcdef0123456789abcdef01234567", "a commit"),
        ("a..b", "a..b"),
        ("a b", "a b"),
        ("", "the name of a branch"),
        ("-x", "-x"),
        ("x.lock", "x.lock"),
    ],
)
def test_revisions_that_are_no_branch(text: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        unet_surgery.push("nowhere", NAME, revision=text)
    assert says in str(refused.value)


def test_a_pull_request_has_no_branch() -> None:
    with pytest.raises(UsageError, match="main branch"):
        unet_surgery.push("nowhere", NAME, revision="fp16", create_pr=True)


def damage_weights(student: Path) -> None:
    path = student / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def drop_licence(student: Path) -> None:
    card = student / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0\n", ""))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "damaged": (damage_weights, VerificationError, "cut short"),
    "no-licence": (drop_licence, UsageError, "prune again with --license"),
    "no-card": (lambda student: (student / "README.md").unlink(), UsageError, "names no licence"),
    "no-plan": (lambda student: (student / "plan.json").unlink(), VerificationError, "no readable plan.json"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_student_that_is_not_fit(hub: HubStandIn, student: Path, case: str) -> None:
    spoil, kind, says = REFUSED[case]
    spoil(student)
    with pytest.raises(kind) as refused:
        unet_surgery.push(student, NAME)
    assert says in str(refused.value)
    assert hub.requests == []


def test_without_a_token(student: Path, tmp_path: Path) -> None:
    env = {**client_env("http://127.0.0.1:9", tmp_path / "hf"), "HF_TOKEN": ""}
    out, err = tool("push", str(student), NAME, code=5, env=env)
    assert out == ""
    assert "hf auth login" in err


@pytest.mark.parametrize(("offline", "says"), [("1", "unset HF_HUB_OFFLINE"), ("0", "with a network")])
def test_without_a_network(student: Path, tmp_path: Path, offline: str, says: str) -> None:
    env = {**client_env("http://127.0.0.1:9", tmp_path / "hf", WRITER), "HF_HUB_OFFLINE": offline}
    _, err = tool("push", str(student), NAME, code=5, env=env)
    assert "cannot be reached" in err
    assert says in err


# --- faults ---------------------------------------------------------------------------------------------------------

CREATE, COMMIT, PREUPLOAD, BATCH = "/api/repos/create", "*/commit/*", "*/preupload/*", "*/objects/batch"
FAULTS: dict[str, tuple[Fault, str]] = {
    "401": (Fault("status", CREATE, parameter=401), "does not accept the token"),
    "403": (Fault("status", CREATE, parameter=403), "may not write there"),
    "403-at-the-commit": (Fault("status", COMMIT, parameter=403), "may not write there"),
    "404": (Fault("status", PREUPLOAD, parameter=404), "knows nothing of this name"),
    "409": (Fault("status", COMMIT, parameter=409), "somebody else is changing"),
    "412": (Fault("status", COMMIT, parameter=412), "somebody else is changing"),
    "429": (Fault("status", COMMIT, parameter=429, headers={"Retry-After": "7"}), "wait 7 s"),
    "429-date": (Fault("status", COMMIT, parameter=429, headers={"Retry-After": "Wed, 21 Oct 2026"}), "wait a while"),
    "500": (Fault("status", COMMIT, parameter=500), "a fault of its own"),
    "503-for-long": (Fault("status", BATCH, parameter=503, times=6), "a fault of its own"),
    "418": (Fault("status", COMMIT, parameter=418), "HTTP 418"),
    "card": (Fault("status", "/api/validate-yaml", parameter=400), "does not accept the metadata"),
    "no-answer": (Fault("reset", CREATE), "cannot be reached"),
    "broken-off": (Fault("reset", COMMIT), "broke off"),
    "objects-broken-off": (Fault("reset", host="cdn", times=6 * 3), "broke off"),
    "objects-refused": (Fault("status", host="cdn", parameter=403), "HTTP 403"),
}


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_error_and_the_next_push_goes_on(hub: HubStandIn, student: Path, case: str) -> None:
    fault, says = FAULTS[case]
    hub.faults.append(fault)
    with pytest.raises(HubError) as refused:
        unet_surgery.push(student, NAME)
    assert says in str(refused.value)
    assert (refused.value.exit_code, refused.value.where) == (5, NAME)
    assert WRITER not in str(refused.value)
    assert commits(hub) == []
    fault.times = 0
    unet_surgery.push(student, NAME)
    (commit,) = commits(hub)
    assert {path: blob.data for path, blob in commit.files.items() if path != ".gitattributes"} == folder_bytes(student)


@pytest.mark.usefixtures("hurried")
def test_passing_faults_pass(hub: HubStandIn, student: Path) -> None:
    hub.faults.append(Fault("status", PREUPLOAD, parameter=429, headers={"Retry-After": "1"}))
    hub.faults.append(Fault("status", host="cdn", parameter=503, times=2))
    hub.faults.append(Fault("reset", host="cdn", times=2))
    unet_surgery.push(student, NAME)
    assert all(fault.times == 0 for fault in hub.faults)
    assert len(commits(hub)) == 1


@pytest.mark.parametrize(
    ("step", "says"), [(CREATE, "cannot be reached"), (COMMIT, "broke off"), (PREUPLOAD, "broke off")]
)
@pytest.mark.usefixtures("hurried")
def test_a_hub_that_falls_silent(
    hub: HubStandIn, student: Path, monkeypatch: pytest.MonkeyPatch, step: str, says: str
) -> None:
    monkeypatch.setattr("unet_surgery.hub.send.SILENCE_SECONDS", 0.2)
    hub.faults.append(Fault("stall", step, times=ALWAYS))
    with pytest.raises(HubError, match=says) as refused:
        unet_surgery.push(student, NAME)
    assert refused.value.found == "ReadTimeout"
    from huggingface_hub import get_session

    assert get_session().timeout.read is None  # the user's own calls wait as before


def test_retries_are_said_once(student: Path, tmp_path: Path) -> None:
    hub = HubStandIn()
    hub.faults.append(Fault("status", PREUPLOAD, parameter=429, headers={"Retry-After": "0"}))
    with hub.serve() as endpoint:
        _, err = tool("push", str(student), NAME, env=client_env(endpoint, tmp_path / "hf", WRITER))
    assert err.count("Rate limited") == 1


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: HubStandIn, student: Path) -> None:
    hub.faults.append(Fault("cut", COMMIT))
    with pytest.raises(HubError, match="broke off"):
        unet_surgery.push(student, NAME)
    assert len(commits(hub)) == 1  # it was made
    again = unet_surgery.push(student, NAME).sent
    assert again is not None
    assert (again.changed, len(commits(hub))) == (False, 1)


def test_a_reader_may_not_write(hub: HubStandIn, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for token, says in ((READER, "may not write there"), ("hf_unknown", "does not accept the token")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match=says):
            unet_surgery.push(student, NAME)
    assert hub.repositories == {}


def test_somebody_elses_model_takes_a_pull_request(hub: HubStandIn, student: Path) -> None:
    """Its repository cannot be made, since it is there; the client sees that by itself."""
    hub.add(NAME, student / "vae")
    hub.faults.append(Fault("status", CREATE, parameter=403))
    result = unet_surgery.push(student, NAME, create_pr=True)
    assert result.sent is not None
    assert result.sent.url.endswith("/discussions/1")


def test_the_hub_says_what_it_wants_of_a_card(hub: HubStandIn, student: Path) -> None:
    card = student / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: my-own"))
    with pytest.raises(HubError, match="does not accept the metadata") as refused:
        unet_surgery.push(student, NAME)
    assert '"license" must be one of' in (refused.value.found or "")
    assert commits(hub) == []


def test_files_that_the_hub_leaves_out(hub: HubStandIn, student: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / ".gitignore").write_text("*.safetensors\n")
    hub.add(NAME, there)
    with pytest.raises(HubError, match="files did not arrive") as refused:
        unet_surgery.push(student, NAME)
    assert WEIGHTS in (refused.value.found or "")


def test_one_message_and_no_traceback(student: Path, tmp_path: Path) -> None:
    hub = HubStandIn()
    hub.faults.append(Fault("status", COMMIT, parameter=500, times=ALWAYS))
    with hub.serve() as endpoint:
        env = client_env(endpoint, tmp_path / "hf", WRITER)
        out, err = tool("push", str(student), NAME, "-q", code=5, env=env)
    assert out == ""
    assert err.startswith("error: the Hub has a fault of its own\n")
    assert err.count("\n") == 4
