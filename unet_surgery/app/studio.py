"""One picture after the other, by each model from the same start noise, with what it took.

Shapes: C latent channels.
"""

from __future__ import annotations

import contextvars
import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from unet_surgery.app.memory import most_bytes, weight_bytes
from unet_surgery.app.models import Models
from unet_surgery.app.wish import Limits, Wish
from unet_surgery.errors import SurgeryError, UsageError, VerificationError, printable
from unet_surgery.evaluate.drawers import Drawer
from unet_surgery.runtime.parts import encode_prompts, pixels_per_latent
from unet_surgery.sample.draw import Sampling, draw_batch, latent_sides
from unet_surgery.sample.schedulers import make_scheduler
from unet_surgery.sample.start import generators
from unet_surgery.toyworld.checker import judge
from unet_surgery.toyworld.draw import SIDE
from unet_surgery.toyworld.grammar import words

__all__ = ["Drawn", "Stopped", "Studio"]

OWN_SIDES = 2
"""Sides up to this many times those that the model was trained at."""

INDEX = 0
"""The prompt's number: pictures are those of ``generate`` with one prompt and the same seed."""

T = TypeVar("T")

Progress = Callable[[int, int, int], None]
"""Called with the number of who draws, and U-Net calls done and in all."""


class Stopped(Exception):  # noqa: N818  # as StopIteration, it is no fault
    """Somebody does not want the picture any more."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture, uint8 [height, width, 3], by ``name``, with what its drawing took.

    ``seconds`` is from text to pixels; ``peak_bytes`` are the weights of all parts and the most of other tensors.
    ``verdict`` is what the toy world's checker found wrong ("" nothing, None: it cannot judge).
    """

    name: str
    picture: NDArray[np.uint8]
    parameters: int
    seconds: float
    peak_bytes: int
    verdict: str | None


class Studio:
    """Draws wishes one at a time, whoever asks: two at once would measure each other.

    All is drawn in one thread. OpenMP keeps a team of threads for each that ever called it, and where there are more of
    them than cores none of them waits awake for the next operator, which small networks are slower by.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drawing")
        self._asked: list[tuple[str, threading.Event]] = []
        self._changed = threading.Condition()  # of whose turn it is: the first's
        self._counting = threading.Lock()
        self._tokenizer = copy.deepcopy(models.student.parts.tokenizer)  # they refuse two threads at once
        self._peaks: dict[tuple[Any, ...], int] = {}
        self.limits, self.own_size = _limits(models)

    @property
    def is_toy(self) -> bool:
        """True if the models know the toy world's words, and few others."""
        known = self.models.student.parts.tokenizer.get_vocab()
        return len(known) < 5000 and all(f"{word}</w>" in known for word in words())

    def own_scheduler(self) -> str | None:
        """Return the scheduler that the model names, as its class is called; None if not all models' can be had."""
        try:
            own = [type(make_scheduler(d.parts.scheduler_config, None)).__name__ for d in self.models.drawers]
        except SurgeryError:
            return None
        return own[-1].removesuffix("Scheduler")

    def unread_words(self, prompt: str) -> str:
        """Return in words how much of a prompt is longer than the text encoder reads; "" if nothing is."""
        with self._counting:
            found = len(self._tokenizer(prompt, truncation=False, verbose=False).input_ids)
        limit = self._tokenizer.model_max_length
        return f"the text encoder reads {limit} tokens; this prompt has {found}" if found > limit else ""

    def stop(self, who: str | None = None) -> None:
        """Give up what ``who`` asked for, drawn or waiting; None: what anybody did."""
        with self._changed:
            for asked_by, event in self._asked:
                if who is None or who == asked_by:
                    event.set()
            self._changed.notify_all()

    def draw(self, wish: Wish, progress: Progress | None = None, who: str = "") -> Iterator[Drawn]:
        """Draw a wish by each model in turn. The first of a size takes one step more, which warms up and is weighed.

        Raises:
            Stopped: :meth:`stop` was called for ``who``.
            UsageError: a model cannot draw this, or memory is not enough.
            VerificationError: latents or pixels are not finite.
        """
        with self._turn(who) as stop:
            for number, drawer in enumerate(self.models.drawers):
                told = None if progress is None else _numbered(progress, number)
                try:
                    drawn = self._in_its_thread(partial(self._drawn, drawer, number, wish, _Watch(stop, told)))
                except (SurgeryError, Stopped):
                    raise
                except (RuntimeError, ValueError, IndexError, MemoryError) as error:  # of torch and of schedulers
                    raise _refusal(error, drawer, wish) from error
                yield drawn

    def close(self) -> None:
        """Give up what is asked for, and let go of the thread."""
        self.stop()
        self._thread.shutdown()

    def _in_its_thread(self, call: Callable[[], T]) -> T:
        context = contextvars.copy_context()  # gradio knows by it whose progress is told
        try:
            answer = self._thread.submit(lambda: context.run(call))
        except RuntimeError as error:  # it is closed
            raise Stopped from error
        return answer.result()

    @contextmanager
    def _turn(self, who: str) -> Iterator[threading.Event]:
        """Wait until all who asked before have been answered, or until what this gives is set."""
        asked = (who, threading.Event())
        with self._changed:
            self._asked.append(asked)
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._asked[0] is asked or asked[1].is_set())
            _give_up_if(asked[1])
            yield asked[1]
        finally:
            asked[1].set()  # whoever asked may have been interrupted, and not what draws
            with self._changed:
                self._asked.remove(asked)
                self._changed.notify_all()

    def _drawn(self, drawer: Drawer, number: int, wish: Wish, watch: _Watch) -> Drawn:
        device = next(drawer.unet.parameters()).device
        with torch.inference_mode():
            key = (number, wish.width, wish.height, wish.guidance > 1)
            if key not in self._peaks:
                first = replace(wish, steps=1, scheduler="ddim")
                self._peaks[key] = most_bytes(lambda: _picture(drawer, first, watch.silent()), device)
            start = time.perf_counter()
            picture = _picture(drawer, wish, watch)
            seconds = time.perf_counter() - start
        held = weight_bytes([drawer.unet, drawer.parts.text_encoder, drawer.parts.vae])
        return Drawn(
            name=drawer.name,
            picture=picture,
            parameters=drawer.parameters,
            seconds=seconds,
            peak_bytes=held + self._peaks[key],
            verdict=_verdict(picture, wish.prompt),
        )


@dataclass(frozen=True, slots=True)
class _Watch:
    """Looks after each call of a U-Net: tells how far it is, and gives up where that is wanted."""

    stop: threading.Event
    progress: Callable[[int, int], None] | None

    def silent(self) -> _Watch:
        return replace(self, progress=None)

    @contextmanager
    def over(self, unet: torch.nn.Module, calls: int) -> Iterator[None]:
        _give_up_if(self.stop)
        done = 0

        def after(*_: object) -> None:
            nonlocal done
            done += 1
            _give_up_if(self.stop)
            if self.progress is not None:
                self.progress(done, calls)

        handle = unet.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()


def _give_up_if(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped


def _picture(drawer: Drawer, wish: Wish, watch: _Watch) -> NDArray[np.uint8]:
    parts = drawer.parts
    height, width = latent_sides(drawer.unet.config, parts.vae, (wish.height, wish.width))
    uncond_1TD = encode_prompts(parts, [wish.negative]) if wish.guidance > 1 else None
    scheduler = make_scheduler(parts.scheduler_config, wish.scheduler)
    scheduler.set_timesteps(wish.steps)
    shape_CHW = (parts.vae.config.latent_channels, height, width)
    how = Sampling(wish.steps, wish.guidance, scheduler, shape_CHW, uncond_1TD)
    with watch.over(drawer.unet, len(scheduler.timesteps)):
        noise = generators(wish.seed, [INDEX])
        drawn: NDArray[np.uint8] = draw_batch(drawer.unet, parts, how, [wish.prompt], [INDEX], noise)[0]
    return drawn


def _limits(models: Models) -> tuple[Limits, tuple[int, int]]:
    """Return the sides that all models can draw, and (height, width) of the pictures the first was trained at."""
    steps = {pixels_per_latent(drawer.parts.vae) for drawer in models.drawers}
    if len(steps) > 1:
        raise UsageError("teacher and student have different VAEs: no size of a picture fits both")
    step = steps.pop()
    config = models.student.unet.config
    height, width = latent_sides(
        config, models.student.parts.vae, None if config.sample_size is not None else 64 * step
    )
    return Limits(step, OWN_SIDES * step * max(height, width)), (height * step, width * step)


def _numbered(progress: Progress, number: int) -> Callable[[int, int], None]:
    return lambda done, calls: progress(number, done, calls)


def _verdict(picture: NDArray[np.uint8], prompt: str) -> str | None:
    """Return what is wrong with a picture of the toy world; None where the prompt or the size is another."""
    if picture.shape[:2] != (SIDE, SIDE):
        return None
    try:
        found = judge(picture, prompt)
    except ValueError:
        return None
    return ", ".join(name for name, is_right in found.attributes.items() if not is_right)


def _refusal(error: Exception, drawer: Drawer, wish: Wish) -> SurgeryError:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return UsageError(
            "memory is not enough for this picture", where=drawer.name, found=f"{wish.width}×{wish.height} pixels"
        )
    return VerificationError(
        "the model cannot draw this", where=drawer.name, found=printable(str(error).partition("\n")[0])
    )
