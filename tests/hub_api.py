"""The endpoints of a stand-in for the Hub: from a request to the answer it should get, before any fault."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

import yaml
from hub_content import ATTRIBUTES, MAIN, Blob, Commit, Repository

if TYPE_CHECKING:
    from hub_server import HubStandIn


LICENCES = ("apache-2.0", "mit", "creativeml-openrail-m", "openrail++", "other")


@dataclass(frozen=True)
class Request:
    method: str
    host: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def token(self) -> str | None:
        said = self.headers.get("Authorization", "")
        return said.removeprefix("Bearer ") if said.startswith("Bearer ") else None

    def flag(self, name: str) -> bool:
        return parse_qs(self.query).get(name, [""])[0].lower() in ("1", "true")

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    """``is_file``: the body is a file's, so Range and If-Range count."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    is_file: bool = False


class Refusal(Exception):  # noqa: N818  # an answer, not a failure
    def __init__(self, status: int, message: str, code: str | None = None, **data: Any) -> None:
        self.status, self.message, self.code, self.data = status, message, code, data


def refused(refusal: Refusal, authorization: str | None) -> Answer:
    """Return a refusal as the Hub words it; ``authorization`` is repeated in it, as a careless server would."""
    message = refusal.message + (f" (not with {authorization})" if authorization else "")
    headers = {"Content-Type": "application/json", "X-Error-Message": message}
    if refusal.code is not None:
        headers["X-Error-Code"] = refusal.code
    data = {"error": message, "errors": [{"message": message}], **refusal.data}
    return Answer(refusal.status, json.dumps(data).encode(), headers)


def answer(hub: HubStandIn, request: Request) -> Answer:
    """Return what the Hub, or its object store, should answer.

    Raises:
        Refusal: it refuses.
    """
    for host, methods, pattern, endpoint in ENDPOINTS:
        match = re.fullmatch(pattern, request.path)
        if host == request.host and match and request.method in methods.split():
            return endpoint(hub, request, *(unquote(part or "") for part in match.groups()))
    raise Refusal(404, f"the stand-in knows no {request.method} {request.path}")


def _json(data: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(data).encode(), {"Content-Type": "application/json", **headers})


# --- who may ---------------------------------------------------------------------------------------------------------


def _readable(hub: HubStandIn, request: Request, name: str, *, content: bool = False) -> Repository:
    """Return a repository that this request may see, and with ``content`` whose files it may read."""
    repository = hub.repositories.get(name)
    allowed = repository is not None and repository.private_token in (None, request.token)
    if repository is None or not (allowed or repository.gated):
        raise Refusal(404 if request.token else 401, "Repository not found", "RepoNotFound")
    if content and repository.gated and (repository.private_token is None or not allowed):
        raise Refusal(403, f"Access to model {name} is restricted", "GatedRepo")
    return repository


def _writer(hub: HubStandIn, request: Request) -> str:
    """Return the user of a token that may write."""
    if request.token not in hub.tokens:
        raise Refusal(401, "Invalid credentials in Authorization header" if request.token else "Invalid user token.")
    if hub.tokens[request.token] != "write":
        raise Refusal(403, "You don't have the required permissions: the token has the role read")
    return "somebody"


def _writable(hub: HubStandIn, request: Request, name: str) -> Repository:
    repository = _readable(hub, request, name)
    _writer(hub, request)
    return repository


def _commit(repository: Repository, revision: str) -> Commit:
    commit = repository.resolve(revision or "main")
    if commit is None:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


# --- reading ---------------------------------------------------------------------------------------------------------


def _whoami(hub: HubStandIn, request: Request) -> Answer:
    if request.token not in hub.tokens:
        raise Refusal(401, "Invalid credentials in Authorization header")
    role = {"role": hub.tokens[request.token], "displayName": "of a test"}
    return _json({"type": "user", "name": "somebody", "orgs": [], "auth": {"accessToken": role}})


def _info(hub: HubStandIn, request: Request, name: str, revision: str = "") -> Answer:
    repository = _readable(hub, request, name)
    commit = _commit(repository, revision)
    siblings = [blob.sibling(path, blobs=request.flag("blobs")) for path, blob in sorted(commit.files.items())]
    private = repository.private_token is not None and not repository.gated
    gated = "manual" if repository.gated else False
    return _json({"id": name, "sha": commit.oid, "private": private, "gated": gated, "siblings": siblings})


def _refs(hub: HubStandIn, request: Request, name: str) -> Answer:
    refs = _readable(hub, request, name).refs
    kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
    data = {
        kind: [{"name": r.removeprefix(p), "ref": r, "targetCommit": oid} for r, oid in refs.items() if r.startswith(p)]
        for kind, p in kinds.items()
    }
    return _json({**data, "converts": []})


def _tree(hub: HubStandIn, request: Request, name: str, revision: str, folder: str = "") -> Answer:
    entries = _commit(_readable(hub, request, name), revision).tree(folder, recursive=request.flag("recursive"))
    if folder and not entries:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    start = int(parse_qs(request.query).get("cursor", ["0"])[0])
    headers = {}
    if len(entries) > start + hub.page_size:
        rest = "&".join(part for part in request.query.split("&") if part and not part.startswith("cursor="))
        url = f"{hub.endpoint}{request.path}?{rest}&cursor={start + hub.page_size}"
        headers["Link"] = f'<{url}>; rel="next"'
    return _json(entries[start : start + hub.page_size], **headers)


def _paths_info(hub: HubStandIn, request: Request, name: str, revision: str) -> Answer:
    commit = _commit(_readable(hub, request, name), revision)
    asked = parse_qs(request.body.decode()).get("paths", [])
    return _json([entry for entry in commit.tree(recursive=True) if entry["path"] in asked])


def _resolve(hub: HubStandIn, request: Request, name: str, revision: str, path: str) -> Answer:
    commit = _commit(_readable(hub, request, name, content=True), revision)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    blob = commit.files.get(path)
    if blob is None:
        answer = refused(Refusal(404, "Entry not found", "EntryNotFound"), None)
        return Answer(404, answer.body, {**answer.headers, **headers})
    headers["ETag"] = f'"{blob.etag}"'
    if not blob.lfs:
        return Answer(200, blob.data, {**headers, "Content-Type": "text/plain"}, is_file=True)
    headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
    # the object's address is good for whoever holds it: what authorises is in it
    location = f"{hub.cdn}/objects/{blob.sha256}?signature={hub.signature}&name={quote(path)}"
    return Answer(302, b"Found", {**headers, "Location": location, "Content-Type": "text/plain"})


def _object(hub: HubStandIn, request: Request, sha256: str) -> Answer:
    blob = hub.objects.get(sha256)
    if blob is None or f"signature={hub.signature}" not in request.query.split("&"):
        raise Refusal(403, "AccessDenied")
    headers = {"ETag": f'"{blob.object_etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    return Answer(200, blob.data, headers, is_file=True)


# --- writing ---------------------------------------------------------------------------------------------------------


def _create(hub: HubStandIn, request: Request) -> Answer:
    _writer(hub, request)
    asked = request.json()
    name = f"{asked['organization'] or 'somebody'}/{asked['name']}"
    url = f"{hub.endpoint}/{name}"
    if name in hub.repositories:
        raise Refusal(409, "You already created this model repo", url=url)
    private = asked.get("private") or asked.get("visibility") == "private"
    repository = hub.repositories[name] = Repository(name, request.token if private else None)
    repository.commit(MAIN, {".gitattributes": Blob(ATTRIBUTES, lfs=False)}, "initial commit")
    return _json({"url": url, "name": name, "id": name, "private": bool(private)})


def _validate_yaml(hub: HubStandIn, request: Request) -> Answer:
    text = request.json()["content"]
    if not text.startswith("---\n"):
        return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    try:
        data = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        data = None
    if not isinstance(data, dict):
        raise Refusal(400, "the metadata is no YAML mapping", warnings=[])
    if data.get("license", "other") not in LICENCES:
        raise Refusal(400, f'"license" must be one of [{", ".join(LICENCES)}]', warnings=[])
    return _json({"errors": [], "warnings": []})


def _branch(hub: HubStandIn, request: Request, name: str, branch: str) -> Answer:
    repository = _writable(hub, request, name)
    if f"refs/heads/{branch}" in repository.refs:
        raise Refusal(409, "Reference already exists")
    start = _commit(repository, request.json().get("startingPoint", "main"))
    repository.refs[f"refs/heads/{branch}"] = start.oid
    return _json({})


def _preupload(hub: HubStandIn, request: Request, name: str, revision: str) -> Answer:
    commit = _commit(_writable(hub, request, name), revision)
    ignored = commit.files[".gitignore"].data.decode().split() if ".gitignore" in commit.files else []
    files = []
    for file in request.json()["files"]:
        path = file["path"]
        mode = "lfs" if hub.is_large(path, file["size"]) else "regular"
        there = commit.files[path].etag if path in commit.files else None
        ignore = any(fnmatchcase(path, pattern) for pattern in ignored)
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignore, "oid": there})
    return _json({"files": files})


def _lfs_batch(hub: HubStandIn, request: Request, name: str) -> Answer:
    repository = _writable(hub, request, name)
    objects = []
    for wanted in request.json()["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in repository.objects:
            upload = {"href": f"{hub.cdn}/objects/{oid}?signature={hub.signature}"}
            verify = {"href": f"{hub.endpoint}/{name}.git/info/lfs/objects/verify"}
            entry["actions"] = {"upload": upload, "verify": verify}
        objects.append(entry)
    return _json({"transfer": "basic", "objects": objects})


def _store(hub: HubStandIn, request: Request, sha256: str) -> Answer:
    if f"signature={hub.signature}" not in request.query.split("&"):
        raise Refusal(403, "AccessDenied")
    if hashlib.sha256(request.body).hexdigest() != sha256:
        raise Refusal(400, "BadDigest")
    hub.objects[sha256] = Blob(request.body, lfs=True)
    return Answer(200)


def _lfs_verify(hub: HubStandIn, request: Request, name: str) -> Answer:
    repository = _writable(hub, request, name)
    said = request.json()
    stored = hub.objects.get(said["oid"])
    if stored is None or len(stored.data) != said["size"]:
        raise Refusal(404, "The object is not there")
    repository.objects.add(said["oid"])
    return _json({})


def _send_commit(hub: HubStandIn, request: Request, name: str, revision: str) -> Answer:
    repository = _writable(hub, request, name)
    base = _commit(repository, revision)
    header, *lines = [json.loads(line) for line in request.body.splitlines()]
    if header["value"].get("parentCommit", base.oid) != base.oid:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = _apply(hub, repository, base, lines)
    pull_request = request.flag("create_pr")
    ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
    if not pull_request and ref not in repository.refs:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    ref = repository.new_pull_request(base) if pull_request else ref
    made = repository.commit(ref, files, header["value"]["summary"])
    data = {"success": True, "commitOid": made.oid, "commitUrl": f"{hub.endpoint}/{name}/commit/{made.oid}"}
    if pull_request:
        data["pullRequestUrl"] = f"{hub.endpoint}/{name}/discussions/{ref.rpartition('/')[2]}"
    return _json(data)


def _apply(hub: HubStandIn, repository: Repository, base: Commit, lines: list[dict[str, Any]]) -> dict[str, Blob]:
    files = dict(base.files)
    for line in lines:
        kind, value = line["key"], line["value"]
        path = value["path"]
        if kind == "file":
            files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif kind == "lfsFile":
            if value["oid"] not in repository.objects:
                raise Refusal(400, f"LFS pointer of {path} points to a file that does not exist")
            files[path] = hub.objects[value["oid"]]
        elif kind == "deletedFile":
            del files[path]
        else:
            assert kind == "deletedFolder", kind
            files = {p: blob for p, blob in files.items() if not p.startswith(path.rstrip("/") + "/")}
    return files


_REPO = r"([^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"
ENDPOINTS: tuple[tuple[str, str, str, Callable[..., Answer]], ...] = (
    ("hub", "GET", "/api/whoami-v2", _whoami),
    ("hub", "POST", "/api/repos/create", _create),
    ("hub", "POST", "/api/validate-yaml", _validate_yaml),
    ("hub", "GET", _MODEL, _info),
    ("hub", "GET", rf"{_MODEL}/revision/([^/]+)", _info),
    ("hub", "GET", rf"{_MODEL}/refs", _refs),
    ("hub", "GET", rf"{_MODEL}/tree/([^/]+)(?:/(.+))?", _tree),
    ("hub", "POST", rf"{_MODEL}/paths-info/([^/]+)", _paths_info),
    ("hub", "POST", rf"{_MODEL}/branch/([^/]+)", _branch),
    ("hub", "POST", rf"{_MODEL}/preupload/([^/]+)", _preupload),
    ("hub", "POST", rf"{_MODEL}/commit/([^/]+)", _send_commit),
    ("hub", "POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    ("hub", "POST", rf"/{_REPO}\.git/info/lfs/objects/verify", _lfs_verify),
    ("hub", "GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _resolve),
    ("cdn", "GET HEAD", "/objects/([0-9a-f]{64})", _object),
    ("cdn", "PUT", "/objects/([0-9a-f]{64})", _store),
)
