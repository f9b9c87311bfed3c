"""``unet-surgery push``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.check import Student
from unet_surgery.cli.options import DEFAULT_MAX_HEADER, Json, MaxHeader, Quiet
from unet_surgery.cli.sink import command, error_console, hub_talk, say, show, show_json, table

if TYPE_CHECKING:
    from rich.table import Table

    from unet_surgery.api import PushResult
    from unet_surgery.hub.upload import Upload

__all__ = ["push"]


@command
def push(
    folder: Student,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The model's name on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the model private; one that is there and public is refused.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of changing the main branch.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="The branch to push to, made where it is missing. Default: main.")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="The commit's message. Default: recipe and teacher.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the student and show what would go up; nothing is sent.")
    ] = False,
    max_header: MaxHeader = DEFAULT_MAX_HEADER,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a student to the Hugging Face Hub, in one commit. It is checked first, and must name a licence.

    What is there already is not sent again, and nothing there is deleted. It prints the address of the commit's files,
    or of the pull request. Log in with: hf auth login

    Example: unet-surgery push ./my-small my-name/my-small --private
    """
    from unet_surgery.api import push as run

    def announce(upload: Upload) -> None:
        if not as_json and (dry_run or not quiet):
            listed = _table(upload)
            show(listed) if dry_run else error_console().print(listed)
        if not quiet:
            _say_left_out(upload)

    hub_talk(quiet)
    result = run(
        folder,
        repository,
        private=private,
        create_pr=create_pr,
        revision=revision,
        message=message,
        dry_run=dry_run,
        max_header=max_header,
        on_upload=announce,
    )
    if as_json:
        show_json(_data(result))
    elif result.sent is not None:
        show(result.sent.url)
    if not quiet:
        _say_outcome(result)


def _table(upload: Upload) -> Table:
    rows = [(file.path, f"{file.num_bytes:,}") for file in upload.files]
    return table(("file", "bytes"), [*rows, (f"{len(rows)} files", f"{upload.num_bytes:,}")], right=(1,))


def _say_left_out(upload: Upload) -> None:
    for path, why in upload.left_out:
        say(f"left out: {path} ({why})")


def _say_outcome(result: PushResult) -> None:
    from unet_surgery.cli.format import gigabytes
    from unet_surgery.errors import first_few

    size = gigabytes(result.upload.num_bytes)
    if result.sent is None:
        say(f"{size} would go to {result.repository}; nothing was sent")
        return
    if not result.sent.changed:
        say(f"{result.repository} has all of it already: no commit was made")
    if result.sent.only_there:
        say(f"only on the Hub, and left there: {first_few(result.sent.only_there)}")


def _data(result: PushResult) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "repository": result.repository,
        "dry_run": result.sent is None,
        "files": [asdict(file) for file in result.upload.files],
        "num_bytes": result.upload.num_bytes,
        "left_out": dict(result.upload.left_out),
        "sent": None if result.sent is None else asdict(result.sent),
    }
