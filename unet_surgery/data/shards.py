"""One shard of a latent cache: samples are read and decoded by threads, encoded in order, and written as they come."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unet_surgery.checkpoint import disk
from unet_surgery.data.arrowfile import Rows, ShardSink
from unet_surgery.data.cacheplan import BadSample, CacheSettings, ShardFacts
from unet_surgery.data.captions import check_caption
from unet_surgery.data.encode import as_pixels, encode_moments, in_half
from unet_surgery.data.pictures import decode_picture
from unet_surgery.data.reasons import BadSampleError
from unet_surgery.data.sources import Source
from unet_surgery.errors import UsageError, printable
from unet_surgery.runtime.parts import Parts, load_parts, pixels_per_latent, tokenize

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Encoder", "choose_device", "write_shard"]

READ_AHEAD = 4  # batches
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample that can be used: its picture is uint8 [R, R, 3]."""

    id: str
    caption: str
    picture: NDArray[np.uint8]


@dataclass(slots=True)
class Encoder:
    """A VAE and a tokenizer at work. A context manager: threads decode while it is open."""

    parts: Parts
    batch: int
    decoders: int = 4
    empty_ids: tuple[int, ...] = field(init=False)
    _pool: ThreadPoolExecutor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.empty_ids = tuple(tokenize(self.parts.tokenizer, [""])[0].tolist())

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str, batch: int, decoders: int) -> Encoder:
        """Load a pipeline's parts, the VAE as ``dtype`` (``fp32`` or ``bf16``)."""
        return cls(load_parts(folder, device=choose_device(device), vae_dtype=DTYPES[dtype]), batch, decoders)

    def __enter__(self) -> Encoder:
        self._pool = ThreadPoolExecutor(self.decoders)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._pool is not None
        self._pool.shutdown(wait=True, cancel_futures=True)

    def moments_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return [2C, h, w] of pictures of this size."""
        config = self.parts.vae.config
        side = resolution // pixels_per_latent(self.parts.vae)
        return 2 * config.latent_channels, side, side

    def decoded(self, indices: Sequence[int], source: Source, resolution: int) -> Iterator[Sample | BadSample]:
        """Yield the samples in order, decoded ahead by threads."""
        assert self._pool is not None
        ahead: deque[Future[Sample | BadSample]] = deque()
        try:
            for index in indices:
                ahead.append(self._pool.submit(_decode, source, index, resolution))
                if len(ahead) >= READ_AHEAD * self.batch:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def rows(self, samples: Sequence[Sample], *, flip: bool) -> tuple[Rows, list[BadSample]]:
        """Encode a batch; what is not finite in half precision is left out."""
        pixels_B3HW = as_pixels(torch.from_numpy(np.stack([s.picture for s in samples])).to(self.parts.vae.device))
        pictures = [pixels_B3HW, pixels_B3HW.flip(-1)] if flip else [pixels_B3HW]
        halves = [in_half(encode_moments(self.parts.vae, pixels)) for pixels in pictures]
        fine = torch.stack([is_finite for _, is_finite in halves]).all(0).cpu().numpy()
        ids = tokenize(self.parts.tokenizer, [s.caption for s in samples]).to(torch.int32).numpy()
        kept = [sample for sample, is_fine in zip(samples, fine, strict=True) if is_fine]
        bad = [
            BadSample(sample.id, "latent-overflow", "not finite in half precision")
            for sample, is_fine in zip(samples, fine, strict=True)
            if not is_fine
        ]
        moments = [values.flatten(1).cpu().numpy()[fine] for values, _ in halves]
        return Rows(moments, ids[fine], [s.caption for s in kept], [s.id for s in kept]), bad


def choose_device(device: str) -> torch.device:
    """Return the device that ``device`` means; ``auto`` is CUDA where there is one, else Apple's GPU, else the CPU.

    Raises:
        UsageError: torch knows no such device, or has none here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            "torch has no such device here", expected=f"auto, cpu{_accelerators()}", found=printable(device)
        ) from error
    return chosen


def _accelerators() -> str:
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return "".join(f", {name}" for name in [*names, *(["mps"] if torch.backends.mps.is_available() else [])])


def write_shard(
    path: Path,
    indices: Sequence[int],
    source: Source,
    encoder: Encoder,
    settings: CacheSettings,
    on_bad: Callable[[Counter[str]], None],
    on_samples: Callable[[int], None],
) -> ShardFacts:
    """Write the shard of the samples ``indices`` as the file ``path``: it is there whole, or as it was before.

    ``on_bad`` is called with what was left out so far, by reason, and may raise; ``on_samples`` with samples done.

    Raises:
        BlockingIOError: another process is writing this shard.
        OSError: the disk refuses.
    """
    bad: list[BadSample] = []
    facts: list[ShardFacts] = []

    def leave_out(samples: Sequence[BadSample]) -> None:
        bad.extend(samples)
        if samples:
            on_bad(Counter(sample.reason for sample in bad))

    def write(fd: int) -> None:
        sink = ShardSink(fd, settings)

        def encode(samples: list[Sample]) -> None:
            if samples:
                rows, overflows = encoder.rows(samples, flip=settings.flip)
                leave_out(overflows)
                sink.append(rows)
                on_samples(len(samples))

        good: list[Sample] = []
        for sample in encoder.decoded(indices, source, settings.resolution):
            if isinstance(sample, BadSample):
                leave_out([sample])
                on_samples(1)
                continue
            good.append(sample)
            if len(good) == encoder.batch:
                encode(good)
                good = []
        encode(good)
        digest = sink.finish()
        facts.append(ShardFacts(sink.num_rows, sink.num_bytes, digest, tuple(bad)))

    disk.replace_file(path, write, force=True)
    return facts[0]


def _decode(source: Source, index: int, resolution: int) -> Sample | BadSample:
    try:
        raw: Any = source.read(index)
        return Sample(_text(raw.id), check_caption(raw.caption), decode_picture(raw.image, resolution))
    except BadSampleError as error:
        return BadSample(_text(source.id(index)), error.reason, error.found)


def _text(name: str) -> str:
    """Return an id as UTF-8 can hold it: a file's name may be other bytes."""
    return name.encode("utf-8", "backslashreplace").decode()
