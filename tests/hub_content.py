"""What a Hub holds: repositories with commits, branches and pull requests; small files in git, large ones in LFS."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

MAIN = "refs/heads/main"
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def git_hash(data: bytes) -> str:
    """Return the name that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file's content; ``lfs`` says where it lies."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @cached_property
    def oid(self) -> str:
        """What git calls it: of a large file, git holds the pointer."""
        return git_hash(self.pointer if self.lfs else self.data)

    @cached_property
    def etag(self) -> str:
        """What `resolve` and the preupload endpoint call it."""
        return self.sha256 if self.lfs else self.oid

    @cached_property
    def object_etag(self) -> str:
        """What the object store calls a large file: as in the real one, no hash that anything else names."""
        return hashlib.md5(self.data).hexdigest() + "-1"

    def tree_entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "oid": self.oid, "size": len(self.data), "path": path}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry

    def sibling(self, path: str, *, blobs: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": path}
        if blobs:
            entry |= {"size": len(self.data), "blobId": self.oid}
            if self.lfs:
                lfs = {"sha256": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
                entry["lfs"] = lfs
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    files: Mapping[str, Blob]

    def tree(self, folder: str = "", *, recursive: bool) -> list[dict[str, Any]]:
        """Return the entries below ``folder`` as the Hub lists them: folders, then files, by name."""
        prefix = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in self.files.items() if path.startswith(prefix)}
        parents = {
            path[:i]
            for path in inside
            for i, character in enumerate(path)
            if character == "/" and i > len(prefix) and (recursive or "/" not in path[len(prefix) : i])
        }
        folders = [
            {"type": "directory", "oid": git_hash(name.encode()), "size": 0, "path": name} for name in sorted(parents)
        ]
        shown = sorted(path for path in inside if recursive or "/" not in path.removeprefix(prefix))
        return folders + [inside[path].tree_entry(path) for path in shown]


@dataclass
class Repository:
    """A model repository. ``private_token`` alone may see it; where it is ``gated``, all see it and that one reads it.

    ``objects`` are the large files that were uploaded to it: as on the real one, each repository has its own.
    """

    name: str
    private_token: str | None = None
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)

    def resolve(self, revision: str) -> Commit | None:
        """Return the commit of a branch, a tag, a full ref or a hash."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        return self.commits.get(revision)

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits of a revision, the newest first."""
        commits = []
        commit = self.resolve(revision)
        while commit is not None:
            commits.append(commit)
            commit = None if commit.parent is None else self.commits[commit.parent]
        return commits

    def commit(self, ref: str, files: Mapping[str, Blob], message: str) -> Commit:
        """Put a commit that holds exactly ``files`` on top of ``ref``."""
        parent = self.refs.get(ref)
        text = f"{self.name} {parent} {len(self.commits)} {message} {sorted((p, b.oid) for p, b in files.items())}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        made = self.commits[oid] = Commit(oid, parent, message, dict(files))
        self.objects |= {blob.sha256 for blob in files.values() if blob.lfs}
        self.refs[ref] = oid
        return made

    def new_pull_request(self, base: Commit) -> str:
        """Return the ref of a new pull request, which begins at ``base``."""
        ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in self.refs)}"
        self.refs[ref] = base.oid
        return ref
