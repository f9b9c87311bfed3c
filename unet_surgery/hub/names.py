"""The names of repositories and branches, ``org/name`` among them, corrected where they are nearly right."""

from __future__ import annotations

import re

from unet_surgery.errors import UsageError, printable

__all__ = ["check_branch", "check_repository", "corrected"]

_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_PULL_REQUEST = re.compile(r"refs/pr/[1-9][0-9]{0,6}")
_HASH = re.compile(r"[0-9a-f]{40}")
_SITE = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/", re.IGNORECASE)


def check_repository(text: str) -> str:
    """Return ``text`` if it is a model's name ``org/name``.

    Raises:
        UsageError: it is not; offers the name that was likely meant.
    """
    if _is_repository(text):
        return text
    meant = corrected(text)
    raise UsageError(
        "this is not the name of a model on the Hub",
        expected="org/name: a user or organisation, and letters, digits, '.', '_' and '-'",
        found=printable(text) or "empty text",
        hint=f"did you mean {meant!r}?" if meant else "write ORG/NAME, with your user or organisation as ORG",
    )


def check_branch(text: str) -> str:
    """Return ``text`` if a push can go there: a branch, or the ref of a pull request that is open (``refs/pr/1``).

    Raises:
        UsageError: it cannot.
    """
    if _PULL_REQUEST.fullmatch(text):
        return text
    plain = text.removeprefix("refs/heads/")
    if _is_branch(text):
        return text
    raise UsageError(
        "a push cannot go to this revision",
        expected="the name of a branch, or refs/pr/ and a number",
        found=("a commit: " if _HASH.fullmatch(text) else "") + printable(text),
        hint=f"did you mean {plain!r}?" if _is_branch(plain) else None,
    )


def _is_repository(text: str) -> bool:
    parts = text.split("/")
    clean = "--" not in text and ".." not in text and not text.endswith(".git")
    return clean and len(parts) == 2 and all(_PART.fullmatch(part) for part in parts)


def _is_branch(text: str) -> bool:
    return (
        _BRANCH.fullmatch(text) is not None
        and len(text) <= 200
        and not _HASH.fullmatch(text)
        and not text.startswith("refs/")
        and not any(part in f"{text}/" for part in ("..", "./", ".lock/"))
    )


def corrected(text: str) -> str | None:
    """Return the name in an address, with dashes for spaces; None where there is none to be seen."""
    path = _SITE.sub("", text.strip()[:500]).partition("?")[0].partition("#")[0].partition("@")[0]
    parts = [part.strip() for part in path.replace("\\", "/").split("/") if part.strip()]
    if parts[:1] == ["models"]:
        parts = parts[1:]
    if len(parts) < 2 or parts[0] in ("datasets", "spaces"):
        return None
    if len(parts) > 2 and not (_SITE.match(text.strip()) and parts[2] in ("tree", "blob", "resolve", "commit")):
        return None
    name = "/".join(re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9_.-]+", "-", p)).strip("-.") for p in parts[:2])
    name = name.removesuffix(".git")
    return name if _is_repository(name) else None
