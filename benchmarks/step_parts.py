"""Where the time of a step goes, what the device could do, and when the host waits for it."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

REST = "rest"
# What makes the host wait for a device: a value, a size or a truth is asked for.
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2")
DATASHEET_TFLOPS = {"H200": 989.4, "H100": 989.4, "A100": 312.0}
"""Dense bf16 and fp16, of the SXM parts."""


class Loop(Protocol):
    """A training loop that can be measured. ``batch`` images go into one step."""

    batch: int

    def step(self) -> None: ...
    def close(self) -> None: ...
    def watched(self, clock: Clock) -> contextlib.AbstractContextManager[None]: ...


class Clock:
    """Time by label: what runs inside something else is the inner one's alone.

    On CUDA the stamps are events in the stream, so nothing waits, and a part is what the device spends between them.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._open = [REST]
        self._stamps: list[tuple[str, Any]] = []

    def _stamp(self) -> None:
        if self._is_cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._stamps.append((self._open[-1], now))

    @contextlib.contextmanager
    def part(self, label: str) -> Iterator[None]:
        """Count what happens inside as ``label``."""
        self._open.append(label)
        self._stamp()
        try:
            yield
        finally:
            self._open.pop()
            self._stamp()

    @contextlib.contextmanager
    def patched(self, places: Iterable[tuple[Any, str, str]]) -> Iterator[None]:
        """Count calls of ``getattr(owner, name)`` as ``label``, for each (owner, name, label)."""
        with contextlib.ExitStack() as stack:
            for owner, name, label in places:
                had = name in vars(owner)
                before = getattr(owner, name)
                setattr(owner, name, self._counted(before, label))
                stack.callback(*((setattr, owner, name, before) if had else (delattr, owner, name)))
            yield

    def _counted(self, call: Callable[..., Any], label: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(label):
                return call(*args, **kwargs)

        return counted

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each label since the first stamp; waits for the device."""
        if self._is_cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for (label, begin), (_, end) in pairwise(self._stamps):
            totals[label] += begin.elapsed_time(end) / 1e3 if self._is_cuda else end - begin
        return dict(totals)


class Watched:
    """A callable or an iterator whose calls a clock counts; anything else of it is as it was."""

    def __init__(self, inner: Any, clock: Clock, label: str) -> None:
        self._inner, self._clock, self._label = inner, clock, label

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.part(self._label):
            return self._inner(*args, **kwargs)

    def __next__(self) -> Any:
        with self._clock.part(self._label):
            return next(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def breakdown(loop: Loop, device: torch.device, steps: int) -> dict[str, float]:
    """Return the milliseconds of each part of a step, longest first, means of ``steps``."""
    clock = Clock(device)
    with loop.watched(clock):
        for _ in range(steps):
            with clock.part(REST):
                loop.step()
    totals = clock.seconds()
    return {label: totals[label] / steps * 1e3 for label in sorted(totals, key=lambda label: -totals[label])}


def step_seconds(loop: Loop, device: torch.device, *, seconds: float, least: int) -> list[float]:
    """Return the time of each step over about ``seconds``, of ``least`` steps or more.

    On CUDA it is the time between events at the end of steps, which the device passes at its own pace.
    """
    if device.type != "cuda":
        times: list[float] = []
        while sum(times) < seconds or len(times) < least:
            begin = time.perf_counter()
            loop.step()
            times.append(time.perf_counter() - begin)
        return times
    torch.cuda.synchronize()
    begin = time.perf_counter()
    events = [_event()]
    while time.perf_counter() - begin < seconds or len(events) <= least:
        loop.step()
        events.append(_event())
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def bf16_tflops(device: torch.device, side: int = 8192, repeats: int = 30) -> float:
    """Return the rate of a product of two random bf16 matrices of ``side``, as the device reaches it."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    begin = _event()
    for _ in range(repeats):
        a @ b
    end = _event()
    torch.cuda.synchronize()
    return float(2 * side**3 * repeats / (begin.elapsed_time(end) / 1e3) / 1e12)


def datasheet_tflops() -> float | None:
    """Return the vendor's figure for this device, where it is known."""
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in DATASHEET_TFLOPS.items() if part in name), None)


class Reads(TorchDispatchMode):  # type: ignore[misc]
    """While it is entered, operations that would make the host wait for a device are counted, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.num_operations += 1
        if name in READS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def cuda_waits(loop: Loop, steps: int) -> Counter[str]:
    """Return where the host waited for CUDA in ``steps`` steps, and how often."""
    found: Counter[str] = Counter()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                loop.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            found[f"{'/'.join(warning.filename.split('/')[-2:])}:{warning.lineno}"] += 1
    return found


def refuses_to_wait(loop: Loop, steps: int) -> str | None:
    """Take steps that may not wait for CUDA; return what did, or None."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            loop.step()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def top_kernels(loop: Loop, steps: int, rows: int = 40) -> str:
    """Return torch's table of the kernels and operations that took most of the device's time."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            loop.step()
        torch.cuda.synchronize()
    return str(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=rows, max_name_column_width=90))
