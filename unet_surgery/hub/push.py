"""``push``: a student's folder, checked, to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unet_surgery.checkpoint.check import check_student
from unet_surgery.checkpoint.header import MAX_HEADER_BYTES
from unet_surgery.checkpoint.licence import CARD, card_licence
from unet_surgery.checkpoint.sizes import parse_size
from unet_surgery.checkpoint.teacher import LOCAL
from unet_surgery.errors import UsageError, printable
from unet_surgery.hub.names import check_branch, check_repository
from unet_surgery.hub.send import Destination, Sent, check_login, send
from unet_surgery.hub.upload import Upload, plan_upload
from unet_surgery.lower import SurgeryPlan
from unet_surgery.version import __version__

__all__ = ["PushResult", "push"]


@dataclass(frozen=True, slots=True)
class PushResult:
    """What :func:`push` chose and did; ``sent`` is None after a dry run."""

    repository: str
    upload: Upload
    sent: Sent | None


def _ignore(_upload: Upload) -> None:
    """Show nothing."""


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    max_header: str | int = MAX_HEADER_BYTES,
    on_upload: Callable[[Upload], None] = _ignore,
) -> PushResult:
    """Upload a student folder to the model ``repository`` (``org/name``) of the Hugging Face Hub, in one commit.

    It is checked first, and must name a licence. What the Hub has already is not sent, and nothing there is deleted, so
    that a push can be run again. ``revision`` is a branch, made where it is missing; ``create_pr`` opens a pull request
    instead. ``on_upload`` is called with what goes up before anything is sent; a ``dry_run`` ends there, and needs no
    network. The token is that of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        UsageError: a name is wrong, the card names no licence, or a part of the student cannot be sent.
        VerificationError: as :func:`check`.
        HubError: there is no token, or the Hub cannot be reached, breaks off, or refuses.
    """
    destination = _destination(repository, revision, private=private, create_pr=create_pr)
    if not dry_run:
        check_login(repository)
    checked = check_student(Path(folder), None, _no_progress, max_header_bytes=parse_size(max_header)).plan
    if card_licence(Path(folder)) is None:
        raise UsageError(
            "the student's card names no licence",
            where=str(Path(folder) / CARD),
            expected="license: in the metadata at its top, as the teacher's licence asks",
            hint="prune again with --license, or add the line yourself",
        )
    upload = plan_upload(Path(folder))
    on_upload(upload)
    if dry_run:
        return PushResult(repository, upload, None)
    return PushResult(repository, upload, send(Path(folder), upload, destination, message or _message(checked)))


def _message(plan: SurgeryPlan) -> str:
    whose = "" if plan.teacher_id == LOCAL else f" of {plan.teacher_id}"
    return f"{printable(plan.recipe['name'] + whose)}, by unet-surgery {__version__}"


def _no_progress(_done: int, _total: int) -> None:
    """Nothing is compared with a teacher."""


def _destination(repository: str, revision: str | None, *, private: bool, create_pr: bool) -> Destination:
    if create_pr and revision is not None:
        raise UsageError(
            "a pull request is opened against the main branch",
            found=printable(revision),
            hint="leave --revision out, or --create-pr; refs/pr/1 as --revision adds to an open one",
        )
    branch = None if revision is None else check_branch(revision)
    return Destination(check_repository(repository), branch, private=private, create_pr=create_pr)
