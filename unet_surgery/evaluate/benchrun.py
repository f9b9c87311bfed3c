"""Running a bench: dtype after dtype, batch after batch, all models side by side.

All models of a dtype are loaded before the first is timed, for that is what side by side means. One that does not fit
beside the others fails alone. On a CPU, where the system would end the whole process, it is asked before what is free.
"""

from __future__ import annotations

import contextlib
import gc
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import torch

from unet_surgery.data.shards import choose_device
from unet_surgery.evaluate.benchmodels import BenchModel
from unet_surgery.evaluate.benchnets import fetched, forward, load_network
from unet_surgery.evaluate.benchparts import PartConfigs, fetched_parts, find_parts, load_all_parts
from unet_surgery.evaluate.benchresult import BenchReport, BenchRow, BenchSettings, PictureTime
from unet_surgery.evaluate.drawers import DTYPES, default_dtype
from unet_surgery.evaluate.matmul import matmul_flops
from unet_surgery.evaluate.peak import CPU_PEAK, CUDA_PEAK, Peak, cpu_peaks, cuda_peak, network_bytes
from unet_surgery.evaluate.timing import Spread, Timed, interleaved, ratio, spread
from unet_surgery.evaluate.why import OUT_OF_MEMORY, why_not
from unet_surgery.runtime.machine import available_bytes, cpu_name
from unet_surgery.runtime.parts import Parts, encode_prompts
from unet_surgery.sample.draw import Sampling, draw_batch, generators
from unet_surgery.sample.schedulers import check_steps, make_scheduler

__all__ = ["COMPILED_TOLERANCE", "measure"]

COMPILED_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2}
"""How far a compiled forward may be from the eager one, by the norm of the difference: rounding, and nothing else."""
MEMORY_SHARE = 0.9
PICTURE_WARM_UP = 1
MANY = 4096

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class _Entry:
    """A model while it is on the device. ``failed`` is set where it could not be brought there.

    ``differences`` are the compiled forwards' from the eager ones, ``peaks`` the memory: both by the number of samples.
    """

    model: BenchModel
    configs: PartConfigs | None
    unet: Any = None
    parts: Parts | None = None
    failed: str | None = None
    differences: dict[int, float] = field(default_factory=dict)
    peaks: dict[int, Peak] = field(default_factory=dict)


@dataclass(slots=True)
class _Counter:
    """How many calls are done, of all."""

    total: int
    progress: Progress
    done: int = 0

    def add(self, count: int = 1) -> None:
        self.done += count
        if count:
            self.progress(self.done, self.total)


def measure(
    models: Sequence[BenchModel], settings: BenchSettings, progress: Progress, fetching: Progress
) -> BenchReport:
    """Run ``models`` as :func:`unet_surgery.evaluate.bench.bench` says."""
    device = choose_device(settings.device)
    dtypes = settings.dtypes or (default_dtype(device),)
    drawing = settings.steps is not None
    configs = [find_parts(m, settings.base, random=settings.random) if drawing else None for m in models]
    for found in configs:
        if found is not None and settings.steps is not None:
            check_steps(make_scheduler(found.scheduler, settings.scheduler), settings.steps)
    if not settings.random:  # all of it now: a connection that breaks off later would take the measurements with it
        models = [fetched(model, fetching) for model in models]
        configs = [found and fetched_parts(found, fetching) for found in configs]
    settle = _settling(device)
    rates = {dtype: matmul_flops(device, DTYPES[dtype], settle) for dtype in dtypes}
    _release(device)
    reserved = _Reserved(device)
    calls = (settings.rounds + settings.warm_up) * (2 if settings.is_guided else 1)
    calls += settings.pictures + PICTURE_WARM_UP if drawing else 0
    each = len(settings.batches) * calls + _asks_processes(settings, device)
    counter = _Counter(len(models) * len(dtypes) * each, progress)
    rows: list[BenchRow] = []
    for dtype in dtypes:
        entries = [_Entry(model, config) for model, config in zip(models, configs, strict=True)]
        one = _OneDtype(settings, device, dtype, settle, rates[dtype], counter, reserved, entries)
        with _compiling(settings.compiled):
            rows += one.rows()
        del one, entries
        _release(device)
    return BenchReport({**_machine(device, rates), "reserved_bytes": reserved.most()}, tuple(rows))


@dataclass(slots=True)
class _OneDtype:
    """The models in one dtype."""

    settings: BenchSettings
    device: torch.device
    dtype: str
    settle: Callable[[], None]
    rate: float | None
    counter: _Counter
    reserved: _Reserved
    entries: list[_Entry]

    def rows(self) -> list[BenchRow]:
        """Load all, time all, and return the rows, batch after batch."""
        if _asks_processes(self.settings, self.device):
            self._find_cpu_peaks()
        loaded: dict[int, Parts] = {}
        for entry in self.entries:
            if entry.failed is None:
                self._load(entry, loaded)
        return [row for batch in self.settings.batches for row in self._rows(batch)]

    def _samples(self, batch: int) -> int:
        """How many samples the largest forward has that draws ``batch`` pictures."""
        return 2 * batch if self.settings.is_guided else batch

    def _find_cpu_peaks(self) -> None:
        batches = self.settings.batches
        samples = {*batches, *map(self._samples, batches)}
        for entry in self.entries:
            entry.failed = self._too_much(entry, self._weight_bytes(entry))
            if entry.failed is None:
                entry.peaks = cpu_peaks(
                    entry.model, sorted(samples), dtype=self.dtype, channels_last=self.settings.channels_last
                )
            self.counter.add()

    def _weight_bytes(self, entry: _Entry) -> int:
        return entry.model.counts.params * int(DTYPES[self.dtype].itemsize)

    def _load(self, entry: _Entry, loaded: dict[int, Parts]) -> None:
        settings, dtype = self.settings, DTYPES[self.dtype]
        entry.failed = self._too_much(entry, self._weight_bytes(entry))
        if entry.failed is not None:
            return
        try:
            entry.unet = load_network(
                entry.model, self.device, dtype, random=settings.random, channels_last=settings.channels_last
            )
            if entry.configs is not None:
                entry.parts = self._parts(entry.configs, loaded)
            if settings.compiled:
                entry.unet.compile(dynamic=False)
        except Exception as error:
            why = why_not(error)
            if why is None:
                raise
            self._give_up(entry, why)

    def _parts(self, configs: PartConfigs, loaded: dict[int, Parts]) -> Parts:
        """Return a pipeline's parts; those that several models share lie on the device once."""
        others = (e.configs for e in self.entries if e.parts is not None and e.configs is not None)
        same = next((other for other in others if other == configs), configs)
        if id(same) not in loaded:
            loaded[id(same)] = load_all_parts(same, self.device, DTYPES[self.dtype], random=self.settings.random)
        return loaded[id(same)]

    def _too_much(self, entry: _Entry, needed: int) -> str | None:
        """Return why a CPU is not even asked for ``needed`` bytes: Linux would end the process."""
        free = available_bytes() if self.device.type == "cpu" else None
        if free is None or needed <= MEMORY_SHARE * free:
            return None
        beside = sum(other.unet is not None and other is not entry for other in self.entries)
        others = f" beside {beside} other model{'s' if beside > 1 else ''}" if beside else ""
        return f"{OUT_OF_MEMORY}{others}: it takes {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free"

    def _too_large(self, entry: _Entry, samples: int) -> str | None:
        """Return why a forward of ``samples`` is not tried, by what a process of its own took, or was ended for."""
        peak = entry.peaks.get(samples, Peak())
        if peak.failed is not None:
            return peak.failed if peak.failed.startswith(OUT_OF_MEMORY) else None  # else it says the same again
        return None if peak.num_bytes is None else self._too_much(entry, peak.num_bytes - network_bytes(entry.unet))

    def _compare(self, entry: _Entry, samples: int) -> None:
        """Note how far a compiled forward's output is from the eager one: each size is a compilation of its own.

        RuntimeError where that is too far.
        """
        if not self.settings.compiled or samples in entry.differences:
            return
        options: dict[str, Any] = {"channels_last": self.settings.channels_last}
        eager, compiled = (
            forward(entry.unet, entry.model.latent, samples, **options, eager=is_eager)().float()
            for is_eager in (True, False)
        )
        difference = float((compiled - eager).norm() / eager.norm())
        if not difference <= COMPILED_TOLERANCE[self.dtype]:
            raise RuntimeError(f"the compiled U-Net gives another output: it differs by {difference:.2g} of its norm")
        entry.differences[samples] = difference

    def _give_up(self, entry: _Entry, why: str | None) -> None:
        entry.unet = entry.parts = None
        entry.failed = why
        _release(self.device)

    # -- timing --------------------------------------------------------------------------------------------------------

    def _rows(self, batch: int) -> list[BenchRow]:
        settings = self.settings
        most = self._samples(batch)
        once = self._pass(lambda entry: self._forward(entry, batch), batch, settings.rounds, settings.warm_up)
        twice: list[Timed] = [Timed(())] * len(self.entries)
        if settings.is_guided:
            twice = self._pass(lambda entry: self._forward(entry, most), most, settings.rounds, settings.warm_up)
        drawn: list[Timed] = [Timed(())] * len(self.entries)
        if settings.steps is not None:
            drawn = self._pass(lambda entry: self._drawing(entry, batch), most, settings.pictures, PICTURE_WARM_UP)
        rows = []
        for k, entry in enumerate(self.entries):
            row = self._row(entry, batch, once[k], twice[k], drawn[k])
            rows.append(row if entry.model.latent != self.entries[0].model.latent else _compared(row, once[k], once[0]))
        return rows

    def _pass(
        self, call_of: Callable[[_Entry], Callable[[], object]], samples: int, rounds: int, warm_up: int
    ) -> list[Timed]:
        """Time one call of each model that is there, side by side; ``samples`` is what the U-Net gets at once."""
        timed = [Timed((), entry.failed or self._too_large(entry, samples)) for entry in self.entries]
        alive = [k for k, found in enumerate(timed) if found.failed is None]
        self.counter.add((len(timed) - len(alive)) * (rounds + warm_up))
        calls = [_lazily(call_of, self.entries[k]) for k in alive]
        found = interleaved(
            calls, rounds=rounds, warm_up=warm_up, settle=self.settle, why=self._why, on_run=self.counter.add
        )
        for k, result in zip(alive, found, strict=True):
            timed[k] = result
        return timed

    def _why(self, error: Exception) -> str | None:
        why = why_not(error)
        if why is not None:
            error.__traceback__ = None  # its frames hold what there is no room for
        _release(self.device)
        return why

    def _forward(self, entry: _Entry, samples: int) -> Callable[[], object]:
        self._compare(entry, samples)
        return forward(entry.unet, entry.model.latent, samples, channels_last=self.settings.channels_last)

    def _drawing(self, entry: _Entry, batch: int) -> Callable[[], object]:
        """Return what draws ``batch`` pictures; the empty prompt's embedding is made once, as for many pictures."""
        self._compare(entry, self._samples(batch))
        settings, parts = self.settings, entry.parts
        assert parts is not None
        assert settings.steps is not None
        length = parts.text_encoder.config.max_position_embeddings
        ids_BT = torch.zeros(batch, length, dtype=torch.int64)
        uncond_1TD = encode_prompts(parts, ids_BT[:1]) if settings.is_guided else None
        shape_CHW = (parts.vae.config.latent_channels, *entry.model.latent)
        scheduler = make_scheduler(parts.scheduler_config, settings.scheduler)
        how = Sampling(settings.steps, settings.guidance, scheduler, shape_CHW, uncond_1TD)
        numbers = list(range(batch))

        def draw() -> object:
            with torch.no_grad():
                return draw_batch(entry.unet, parts, how, ids_BT, numbers, generators(0, numbers))

        return draw

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _row(self, entry: _Entry, batch: int, once: Timed, twice: Timed, drawn: Timed) -> BenchRow:
        settings = self.settings
        row = replace(
            BenchRow.of(entry.model),
            weights="random" if settings.random else "loaded",
            dtype=self.dtype,
            batch=batch,
            compile=settings.compiled,
            compile_difference=self._difference(entry, batch),
            channels_last=settings.channels_last,
            unet_ms=_milliseconds(once),
            guided_ms=_milliseconds(twice),
            picture_s=None if drawn.failed or not drawn.seconds else self._picture(entry, batch, drawn),
            failed=_what_failed(once, twice, drawn),
        )
        row = self._with_peak(row, entry, batch) if settings.memory and entry.unet is not None else row
        if row.unet_ms is not None and self.rate is not None:
            flops = 2 * row.macs_all * batch / (row.unet_ms.median / 1000)
            row = replace(row, flop_share=flops / self.rate)
        return row

    def _difference(self, entry: _Entry, batch: int) -> float | None:
        sizes = (batch, self._samples(batch))
        return max((entry.differences[size] for size in sizes if size in entry.differences), default=None)

    def _picture(self, entry: _Entry, batch: int, drawn: Timed) -> PictureTime:
        settings = self.settings
        assert settings.steps is not None
        assert entry.configs is not None
        scheduler = type(make_scheduler(entry.configs.scheduler, settings.scheduler)).__name__
        each = spread([seconds / batch for seconds in drawn.seconds])
        return PictureTime(
            each.median, each.low, each.high, each.runs, settings.steps, settings.guidance, scheduler, batch
        )

    def _with_peak(self, row: BenchRow, entry: _Entry, batch: int) -> BenchRow:
        samples = self._samples(batch)
        if self.device.type == "cpu" and samples in entry.peaks:
            peak = entry.peaks[samples]
            failed = row.failed or (None if peak.failed is None else f"memory: {peak.failed}")
            is_known = peak.num_bytes is not None
            return replace(row, peak_bytes=peak.num_bytes, peak_is=CPU_PEAK if is_known else None, failed=failed)
        if self.device.type != "cuda" or row.unet_ms is None:
            return row
        try:
            call = self._forward(entry, samples)
            self.reserved.note()  # the peak is measured from a new start
            num_bytes = cuda_peak(call, network_bytes(entry.unet), self.device)
        except RuntimeError as error:
            return replace(row, failed=row.failed or self._why(error))
        return replace(row, peak_bytes=num_bytes, peak_is=CUDA_PEAK)


def _lazily(call_of: Callable[[_Entry], Callable[[], object]], entry: _Entry) -> Callable[[], object]:
    """Return a call whose inputs are made the first time: there may be no room for them."""
    made: list[Callable[[], object]] = []

    def call() -> object:
        if not made:
            made.append(call_of(entry))
        return made[0]()

    return call


def _compared(row: BenchRow, timed: Timed, first: Timed) -> BenchRow:
    """Return a row with its ratio to the first; to itself that is 1, and no measurement."""
    if timed.failed is not None or first.failed is not None:
        return row
    if timed is first:
        return replace(row, ratio_to_first=1.0)
    found = ratio(timed.seconds, first.seconds)
    return replace(row, ratio_to_first=found.value, ratio_interval=found.interval, ratio_is_clear=found.is_clear)


def _milliseconds(timed: Timed) -> Spread | None:
    return None if timed.failed or not timed.seconds else spread([1000 * seconds for seconds in timed.seconds])


def _what_failed(once: Timed, twice: Timed, drawn: Timed) -> str | None:
    for what, timed in (("", once), ("with guidance: ", twice), ("pictures: ", drawn)):
        if timed.failed is not None:
            return f"{what}{timed.failed}"
    return None


# -- the device --------------------------------------------------------------------------------------------------------


def _asks_processes(settings: BenchSettings, device: torch.device) -> bool:
    """True if a process of its own for each model says what memory it takes."""
    return settings.memory and device.type == "cpu"


def _settling(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return torch.mps.synchronize if device.type == "mps" else lambda: None


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Reserved:
    """The most that torch's allocator has held of a GPU since this was made, through resets of its own counter."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def note(self) -> None:
        """To be called before the counter is reset."""
        if self._device.type == "cuda":
            self._most = max(self._most, torch.cuda.max_memory_reserved(self._device))

    def most(self) -> int | None:
        """Return bytes; None where it is no GPU."""
        self.note()
        return self._most if self._device.type == "cuda" else None


@contextlib.contextmanager
def _compiling(compiled: bool) -> Iterator[None]:
    """Let torch compile each model at each size, however many there are: beyond its limit it would run them eagerly."""
    if not compiled:
        yield
        return
    import torch._dynamo

    config: Any = torch._dynamo.config
    limits = {"recompile_limit": MANY, "accumulated_recompile_limit": MANY, "fail_on_recompile_limit_hit": True}
    with config.patch({name: value for name, value in limits.items() if hasattr(config, name)}):
        yield
    torch._dynamo.reset()


def _machine(device: torch.device, rates: dict[str, float | None]) -> dict[str, Any]:
    is_cuda = device.type == "cuda"
    return {
        "device": str(torch.cuda.get_device_name(device)) if is_cuda else device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cuda": torch.version.cuda if is_cuda else None,
        "matmul_tflops": {dtype: None if rate is None else rate / 1e12 for dtype, rate in rates.items()},
    }
