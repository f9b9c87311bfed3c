"""The one place that prints. stdout is data, stderr is talk, and every error gets one message and its exit code."""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import typer

from unet_surgery.errors import SurgeryError, escaped, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "Terminated",
    "TwoBars",
    "command",
    "error_console",
    "hub_talk",
    "progress_bar",
    "say",
    "set_debug",
    "show",
    "show_json",
    "table",
]

PLAIN_WIDTH = 120
SECONDS_A_LINE = 30.0

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class _State:
    debug: bool = False


_state = _State()


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived: unwind, so that staging folders are cleared, and exit with 128 + its number."""

    def __init__(self, number: int) -> None:
        self.number = number


def set_debug(on: bool) -> None:
    """Show tracebacks with errors."""
    _state.debug = on


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command: errors become messages and exit codes, signals unwind, warnings of the library are shown."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        _prepare()
        try:
            return function(*args, **kwargs)
        except typer.Exit:
            raise
        except (Exception, KeyboardInterrupt, Terminated) as error:  # noqa: BLE001  # no traceback by default
            if _state.debug:
                say(_without_tokens(traceback.format_exc()))
            message, code = _explain(error)
            message = _without_tokens(message) if _state.debug else message
            if message:
                say(message)
            raise typer.Exit(code) from None

    return guarded


def _prepare() -> None:
    logging.basicConfig(level=logging.WARNING, handlers=[_Talk()])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_terminate)
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
    if sys.stdout is None:  # closed by who called; what is written to files still is
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" in its place


def _explain(error: BaseException) -> tuple[str, int]:
    """Return message and exit code: the one table from what went wrong to what the user sees."""
    match error:
        case SurgeryError():
            return f"error: {error}", error.exit_code
        case KeyboardInterrupt():
            return "interrupted; nothing half-written was left", 130
        case Terminated():
            return "terminated; nothing half-written was left", 128 + error.number
        case BrokenPipeError():  # the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return "", 0
        case OSError():
            place = f": {printable(error.filename)}" if error.filename else ""
            return f"error: {error.strerror or error}{place}", 4
        case _:
            hint = "" if _state.debug else "\n  try:      unet-surgery --debug … and report what it shows"
            return f"error: {type(error).__name__}: {printable(str(error))} (this is a fault of unet-surgery){hint}", 1


def say(text: str) -> None:
    """Tell the user something: stderr."""
    typer.echo(_harmless(text), err=True)


def _without_tokens(text: str) -> str:
    """A traceback quotes what a server answered, and a server may repeat what it was sent."""
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "…")
    text = re.sub(r"://[^/@\s]+@", "://…@", text)
    return re.sub(r"\b(hf_|Bearer )[^\s'\"]{4,}", r"\1…", text)


def show(data: str | Table) -> None:
    """Give the user what was asked for: stdout."""
    if isinstance(data, str):
        typer.echo(_harmless(data))
    else:
        _console(sys.stdout).print(data)


def show_json(data: Any) -> None:
    """Give data as JSON: stdout."""
    typer.echo(_harmless(json.dumps(data, indent=2, ensure_ascii=False)))


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), title: str = ""
) -> Table:
    """Return a plain table; ``right`` are the columns of numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        result.add_column(Text(_harmless(column)), justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        # Text, not str: what comes from files is never read as markup.
        result.add_row(*(Text(_harmless(cell)) for cell in row))
    return result


class _Talk(logging.Handler):
    """What the library logs is talk as well; huggingface_hub has a handler of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] != "huggingface_hub":
            say(record.getMessage())


def _harmless(text: str) -> str:
    """Escape what could steer a terminal, wherever it came from; the escapes are JSON's, so JSON stays what it is."""
    return escaped(text, keep="\n\t")


@contextmanager
def progress_bar(label: str, quiet: bool, *, of_bytes: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for bytes (or samples, steps …) done and in all: a bar on a terminal's stderr, else lines."""
    logging.getLogger("unet_surgery").setLevel(logging.WARNING if quiet else logging.INFO)
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield (lambda _done, _total: None) if quiet else _Lines(label, of_bytes=of_bytes).update
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn(label), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=error_console(), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


class _Lines:
    """What a bar says, for a log: one line in SECONDS_A_LINE at most, and none of what takes less."""

    def __init__(self, label: str, *, of_bytes: bool) -> None:
        self._label, self._of_bytes = label, of_bytes
        self._last = time.monotonic()

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < SECONDS_A_LINE:
            return
        self._last = now
        amounts = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB" if self._of_bytes else f"{done:,} of {total:,}"
        say(f"{self._label}: {amounts}")


class TwoBars(ExitStack):
    """A bar of bytes while models are fetched or made, then one of what they do: a terminal shows one at a time."""

    def __init__(self, label: str, quiet: bool) -> None:
        super().__init__()
        self._label, self._quiet = label, quiet
        self.fetches = self.enter_context(progress_bar("getting the model", quiet))
        self._bar: Callable[[int, int], None] | None = None

    def works(self, num_done: int, total: int) -> None:
        if self._bar is None:
            self.close()
            self._bar = self.enter_context(progress_bar(self._label, self._quiet, of_bytes=False))
        self._bar(num_done, total)


def hub_talk(quiet: bool) -> None:
    """Let huggingface_hub draw its own bars on a terminal, and speak of its retries; neither if ``quiet``."""
    logging.getLogger("unet_surgery").setLevel(logging.WARNING if quiet else logging.INFO)
    for name in ("hf_api", "_upload_pipeline"):
        logging.getLogger(f"huggingface_hub.{name}").addFilter(_is_news)
    if quiet:  # both are read when huggingface_hub is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def _is_news(record: logging.LogRecord) -> bool:
    """False for what the command itself says in its own words."""
    return "prevent empty commit" not in str(record.msg)


def error_console() -> Console:
    """Return rich's console on stderr."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    from rich.console import Console

    width = None if stream.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def _on_terminate(number: int, _frame: Any) -> NoReturn:
    raise Terminated(number)
