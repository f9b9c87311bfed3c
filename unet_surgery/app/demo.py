"""``demo``: a page on which a model draws beside its teacher."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet_surgery.app.guard import bound
from unet_surgery.errors import MissingExtraError, printable

if TYPE_CHECKING:
    from unet_surgery.app.server import Server
    from unet_surgery.app.studio import Studio

__all__ = ["Demo", "demo"]

log = logging.getLogger(__name__)

BUILDING = threading.Lock()
"""Held while gradio's environment variables are this package's: they are the whole process's."""


class Demo:
    """A demo that runs until :meth:`close`; ``address`` is what a browser opens. A context manager, too."""

    def __init__(self, studio: Studio, server: Server, cleanup: contextlib.ExitStack) -> None:
        self._studio, self._server, self._cleanup = studio, server, cleanup
        self.address = server.address
        self.model = studio.models.student.name
        self.teacher = None if studio.models.teacher is None else studio.models.teacher.name
        self.no_teacher = studio.models.no_teacher

    def wait(self) -> None:
        """Return when the server has ended, or with whatever exception a signal raises meanwhile."""
        self._server.wait()

    def close(self) -> None:
        """Give up what is being drawn, stop serving, and remove the pictures that were shown."""
        self._studio.stop()
        self._server.close()
        self._studio.close()
        self._cleanup.close()

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def demo(
    model: str | Path,
    *,
    teacher: str | Path | None = None,
    base: str | Path | None = None,
    port: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> Demo:
    """Serve a page on 127.0.0.1 on which ``model`` draws beside ``teacher``, and return while it is served.

    Both are what ``generate`` takes: a pipeline's folder, a U-Net's with ``base`` to bring the other parts, a built-in
    name or a Hub id. Without ``teacher`` it is the one that the model's plan.json names, where it can be had; "none"
    is nobody. ``port`` is the first that is free from 7860 on if None, any if 0. ``dtype`` is fp32, bf16 or fp16
    (None: fp16 on an NVIDIA GPU, else fp32). Once the models are there, nobody on the network is asked for anything.

    Raises:
        UsageError: an argument has no sense, the port is taken, or the models do not draw from text alone.
        TeacherError, HubError, VerificationError: a model cannot be had, or is not whole.
        MissingExtraError: gradio or torch is not installed.
    """
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(bound(port))  # in this order: libraries take seconds, models longer
        make_page, serve = _gradio()
        log.info("loading the models …")
        folder = os.path.realpath(stack.enter_context(_own_folder()))
        with _settings(folder), _one_thread():  # in this order: one demo at a time counts the threads
            studio = _studio(str(model), teacher, base, device, dtype)
            server = serve(make_page(studio), listening, folder)
        return Demo(studio, server, stack.pop_all())


def _studio(model: str, teacher: str | Path | None, base: str | Path | None, device: str, dtype: str | None) -> Studio:
    from unet_surgery.app.models import load_models
    from unet_surgery.app.studio import Studio
    from unet_surgery.data.shards import choose_device
    from unet_surgery.evaluate.drawers import choose_dtype

    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    names = [None if name is None else str(name) for name in (teacher, base)]
    return Studio(load_models(model, *names, device=place, dtype=kind))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute without a team of threads: what keeps none here does not hinder the thread that draws."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for the pictures that gradio shows: nobody else reads it, and it goes with the demo."""
    return tempfile.TemporaryDirectory(prefix="unet-surgery-demo-", ignore_cleanup_errors=True)


@contextlib.contextmanager
def _settings(folder: str | None = None) -> Iterator[None]:
    """Let gradio, which reads the environment where it is imported and a page made, ask nobody, and use ``folder``.

    The page says so too; this is for what gradio does besides.
    """
    ours = {"GRADIO_ANALYTICS_ENABLED": "False"} | ({} if folder is None else {"GRADIO_TEMP_DIR": folder})
    with BUILDING:
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _gradio() -> tuple[Any, Any]:
    try:
        with _settings():
            from unet_surgery.app.page import make_page
            from unet_surgery.app.server import Server
    except ImportError as error:
        raise MissingExtraError(
            "gradio is needed for this, and does not import",
            found=printable(str(error)),
            hint="pip install 'unet-surgery[demo]'; unet-surgery doctor says what is missing",
        ) from error
    return make_page, Server
