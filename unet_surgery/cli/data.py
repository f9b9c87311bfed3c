"""``unet-surgery data`` and its subcommands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.options import Json, Quiet
from unet_surgery.cli.sink import Terminated, command, progress_bar, say, show, show_json, table

if TYPE_CHECKING:
    from unet_surgery.data.get import DataResult

__all__ = ["data"]

data = typer.Typer(no_args_is_help=True, help="Fetch published sets: pictures, captions, prompts, statistics.")


@data.command("ls")
@command
def list_sets(as_json: Json = False) -> None:
    """List the published sets that can be fetched; "–" where nobody publishes a size.

    Example: unet-surgery data ls
    """
    from unet_surgery.data.publishedsets import SETS

    if as_json:
        show_json([{
            "name": published.name, "what": published.what, "pictures": published.num_pictures,
            "bytes": published.num_bytes, "unpacked_bytes": published.unpacked_bytes or None,
            "licence": published.licence, "source": published.source, "use": published.use_in(published.name),
            "files": [
                {"name": p.name, "address": p.address, "bytes": p.size, "sha256": p.sha256} for p in published.pieces
            ],
        } for published in SETS.values()])  # fmt: skip
        return
    rows = [(s.name, s.what, _size(s.num_bytes), "sha256" if s.is_checked else "sizes") for s in SETS.values()]
    show(table(("name", "what", "to fetch", "checked by"), rows, right=(2,)))


@data.command("get")
@command
def get(
    name: Annotated[str, typer.Argument(help="A set's name (see: unet-surgery data ls).")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The new folder. Default: ./NAME.")] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url", envvar="UNET_SURGERY_DATA_URL", help="A mirror that has the files as BASE_URL/NAME/FILE."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a published set. A command that was stopped goes on where it was; the folder appears whole or not at all.

    Pictures come as a folder with metadata.csv, which cache and distill read; prompts as files for generate --prompts.
    Where nobody published a checksum, only sizes and the archive's own checksums are compared, and that is said.

    Example: unet-surgery data get laion-11k --out ./pictures
    """
    from unet_surgery.data.get import get_data, parts_folder

    target = (out or Path(name)).absolute()
    try:
        with progress_bar("fetching and unpacking", quiet) as progress:
            result = get_data(name, out, base_url=base_url, progress=progress)
    except (KeyboardInterrupt, Terminated):
        if (parts := parts_folder(target)).is_dir():
            say(f"what has come so far stays in {parts}; the same command goes on with it")
        raise
    if as_json:
        show_json(_as_data(result))
    else:
        show(str(out or name))
    if not quiet:
        _tell(result)


def _as_data(result: DataResult) -> dict[str, object]:
    return {
        "name": result.name, "folder": str(result.folder), "files": result.num_files, "bytes": result.num_bytes,
        "pictures": result.num_pictures, "received_bytes": result.num_received, "checked": result.is_checked,
    }  # fmt: skip


def _tell(result: DataResult) -> None:
    pictures = f", {result.num_pictures} of them pictures" if result.num_pictures else ""
    say(f"{result.num_files} files{pictures}, {_size(result.num_bytes)}; {_size(result.num_received)} came now")
    if not result.is_checked:
        say("nobody published a checksum of all of it, so it could not be compared with one; data.json says what came")
    say(f"licence: {result.licence}")
    say(f"next:  {result.use}")


def _size(num_bytes: int | None) -> str:
    from unet_surgery.cli.format import gigabytes

    return "–" if num_bytes is None else gigabytes(num_bytes)
