"""Sending what was chosen to the Hub: the repository, the branch, and one commit of what has changed."""

from __future__ import annotations

import glob
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from unet_surgery.errors import HubError, SurgeryError, UsageError, first_few, printable
from unet_surgery.hub.patience import bounded_waits
from unet_surgery.hub.refusals import refusal, refused, unreachable
from unet_surgery.hub.upload import Upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Destination", "Sent", "check_login", "send"]

log = logging.getLogger(__name__)

MAIN = "main"
ATTRIBUTES = ".gitattributes"  # the Hub's own, in every repository
SILENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a student goes. ``revision`` is a branch, made where it is missing; None is the main one."""

    repository: str
    revision: str | None = None
    private: bool = False
    create_pr: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """What came of it. ``changed`` is False where the Hub had everything already, and no commit was made.

    ``only_there`` are files of the repository that the folder does not hold; they stay.
    """

    url: str
    commit: str
    changed: bool
    only_there: tuple[str, ...]


def check_login(repository: str) -> None:
    """Raise HubError if there is no token to write with."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception as error:  # a login that renews itself asks for that over the network
        raise unreachable(repository, error, writing=True) from error
    if not token:
        raise HubError(
            "there is no token for the Hugging Face Hub",
            where=repository,
            hint="hf auth login, with a token that may write; or set HF_TOKEN",
        )


def send(folder: Path, upload: Upload, destination: Destination, message: str) -> Sent:
    """Make one commit of what differs, and the repository and the branch where they are missing.

    Nothing is deleted there. Where it breaks off, the same call goes on: what has arrived is not sent again.

    Raises:
        HubError: the Hub cannot be reached, breaks off, or refuses; says which, and what to do.
        UsageError: the repository is public and a private one was asked for, or the revision is a tag.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _in_words(destination, "prepare"):
        commit, there = _prepare(api, destination)
    with _in_words(destination, "send"):
        made = api.upload_folder(
            repo_id=destination.repository,
            folder_path=folder.resolve(),  # where it begins with ~, the client would look at home
            allow_patterns=[glob.escape(file.path) for file in upload.files],
            revision=destination.revision,
            create_pr=destination.create_pr,
            commit_message=message,
        )
    with _in_words(destination, "check"):
        _check_arrived(api, destination, made.oid, upload)
    tree = f"{api.endpoint}/{destination.repository}/tree/{made.oid}"
    only_there = there - {file.path for file in upload.files} - {ATTRIBUTES}
    return Sent(made.pr_url or tree, made.oid, made.oid != commit, tuple(sorted(only_there)))


def _prepare(api: HfApi, destination: Destination) -> tuple[str | None, set[str]]:
    """Make what is missing; return the commit on which the new one will stand, and its files."""
    name, branch = destination.repository, destination.revision
    api.create_repo(name, private=destination.private or None, exist_ok=True)
    info = api.model_info(name)
    if destination.private and not info.private:
        raise UsageError(
            "the model is there already, and it is public",
            where=name,
            hint="leave --private out, choose another name, or make it private in its settings on the Hub",
        )
    if branch not in (None, MAIN):
        assert branch is not None
        if not branch.startswith("refs/"):
            _prepare_branch(api, name, branch)
        info = api.model_info(name, revision=branch)
    return info.sha, {sibling.rfilename for sibling in info.siblings or ()}


def _prepare_branch(api: HfApi, name: str, branch: str) -> None:
    refs = api.list_repo_refs(name)
    if any(tag.name == branch for tag in refs.tags):
        raise UsageError(
            "the revision is a tag, which stays where it is",
            where=f"{name}@{branch}",
            expected="the name of a branch",
        )
    if all(ref.name != branch for ref in refs.branches):
        api.create_branch(name, branch=branch, exist_ok=True)


def _check_arrived(api: HfApi, destination: Destination, commit: str, upload: Upload) -> None:
    """What a repository's .gitignore names, the Hub leaves out without a word."""
    info = api.model_info(destination.repository, revision=commit, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    missing = [file.path for file in upload.files if sizes.get(file.path) != file.num_bytes]
    if missing:
        raise HubError(
            "files did not arrive",
            where=f"{destination.repository}@{commit}",
            found=first_few(missing),
            hint="see whether the repository has a .gitignore that names them; then run again",
        )


@contextmanager
def _in_words(destination: Destination, step: Literal["prepare", "send", "check"]) -> Iterator[None]:
    """Turn what the client raises into one error of ours, and what it warns of into a line of the log."""
    name, revision = destination.repository, destination.revision
    try:
        with warnings.catch_warnings(record=True) as caught, bounded_waits(SILENCE_SECONDS):
            warnings.simplefilter("always")
            yield
        for warning in caught:
            if warning.category is UserWarning:
                log.warning("%s", printable(_without_token(str(warning.message))))
    except SurgeryError:
        raise
    except Exception as error:  # the HTTP client's own exceptions are not part of huggingface_hub's interface
        if step == "send" and _is_metadata(error):
            raise _bad_card(name, error) from error
        if (answer := refusal(error)) is not None:
            raise refused(name, revision, answer, writing=True) from error
        if step == "prepare":
            raise unreachable(name, error, writing=True) from error
        raise HubError(
            "the upload to the Hugging Face Hub broke off",
            where=name,
            found=type(error.__cause__ or error).__name__,
            hint="run again: what has arrived is not sent again",
        ) from error


def _is_metadata(error: Exception) -> bool:
    return type(error) is ValueError and type(error.__cause__).__name__ == "BadRequestError"


def _bad_card(name: str, error: Exception) -> HubError:
    """Only the Hub knows what it wants of a card, so here its words are quoted."""
    said = _without_token(str(error)).partition("\n")[2]
    return HubError(
        "the Hub does not accept the metadata of README.md",
        where=name,
        found=printable(" ".join(said.split())) or None,
        hint="mend what stands between the lines --- at its top, then run again",
    )


def _without_token(text: str) -> str:
    """A server may repeat what it was sent."""
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "…") if token else text
