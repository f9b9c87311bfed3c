"""``bench``: what U-Nets cost, counted from their configs and measured on this machine.

Counting needs neither weights nor torch. Measuring takes the models in turn, one call each, round after round, so that
what disturbs the machine disturbs all of them; see :mod:`unet_surgery.evaluate.timing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from unet_surgery.errors import MissingExtraError, UsageError, printable
from unet_surgery.evaluate.benchmodels import check_weights, find_models
from unet_surgery.evaluate.benchresult import NOT_RUN, BenchReport, BenchRow, BenchSettings
from unet_surgery.sample.schedulers import check_scheduler_name

__all__ = ["DTYPE_NAMES", "bench"]

DTYPE_NAMES = ("fp32", "bf16", "fp16")

Progress = Callable[[int, int], None]
"""Called with what is done, and what there is in all."""


def bench(
    models: Sequence[str | Path],
    *,
    run: bool = True,
    latent: int | tuple[int, int] | None = None,
    device: str = "auto",
    dtypes: Iterable[str] = (),
    batches: Iterable[int] = (1,),
    random: bool = False,
    base: str | Path | None = None,
    steps: int | None = None,
    guidance: float = 7.5,
    scheduler: str | None = None,
    pictures: int = 3,
    compiled: bool = False,
    channels_last: bool = False,
    rounds: int = 10,
    warm_up: int = 2,
    memory: bool = True,
    progress: Progress | None = None,
    fetching: Progress | None = None,
) -> BenchReport:
    """Count and time the U-Nets of ``models``: folders, built-in names, Hub ids, or plans; the first is the reference.

    Parameters and MACs come from the configs; with ``run=False`` that is all, and plans and single files do as well.
    ``latent`` is a side or (height, width) in latents, by default each U-Net's own.

    One forward is timed at each of ``batches`` and ``dtypes`` (fp32, bf16, fp16; by default fp16 on a GPU, else fp32),
    and, where ``guidance`` is above 1, one of twice the batch. ``steps`` draws whole pictures of so many steps as well,
    ``pictures`` rounds of them: text encoder, U-Net, VAE, by ``scheduler`` (the model's own if None); a U-Net alone
    takes the other parts from ``base``. ``random`` makes the networks of random weights by their configs: they take as
    long, and nothing large is fetched; parts that are missing are those of SD v1 or v2. ``memory`` measures the peak,
    on a CPU in a process of its own. ``progress`` is called with calls done and in all; ``fetching``, before that, with
    bytes done and in all while models are fetched or made.

    A model that fails, such as for want of memory, has a row that says so.

    Raises:
        UsageError: an argument has no sense, or a model lacks weights or parts.
        TeacherError, HubError, VerificationError: a model cannot be had, is not supported, or is not whole.
        MissingExtraError: torch, diffusers or transformers is not installed.
    """
    if isinstance(models, str | Path):
        models = [models]
    settings = BenchSettings(
        device=device,
        dtypes=tuple(dict.fromkeys(dtypes)),
        batches=tuple(dict.fromkeys(batches)),
        random=random,
        base=None if base is None else str(base),
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        pictures=pictures,
        compiled=compiled,
        channels_last=channels_last,
        rounds=rounds,
        warm_up=warm_up,
        memory=memory,
    )
    _check(settings)
    found = find_models(models, latent=(latent, latent) if isinstance(latent, int) else latent)
    if not run:
        return BenchReport(NOT_RUN, tuple(BenchRow.of(model) for model in found))
    if not random:
        check_weights(found)
    try:
        from unet_surgery.evaluate.benchrun import measure
    except (ImportError, RuntimeError, OSError) as error:  # diffusers wraps what its imports raise
        raise MissingExtraError(
            "torch, diffusers and transformers are needed to run models, and do not import",
            found=printable(str(error).replace("\n", " ")),
            hint="unet-surgery doctor says why; --no-run counts parameters and MACs without them",
        ) from error
    return measure(found, settings, progress or _silent, fetching or _silent)


def _silent(_done: int, _total: int) -> None:
    pass


def _check(settings: BenchSettings) -> None:
    for name in settings.dtypes:
        if name not in DTYPE_NAMES:
            raise UsageError("there is no such dtype", expected=", ".join(DTYPE_NAMES), found=printable(name))
    limits = {
        "batch": (settings.batches, 1),
        "steps": ((settings.steps,), 1),
        "rounds": ((settings.rounds,), 1),
        "pictures": ((settings.pictures,), 1),
        "warm-up": ((settings.warm_up,), 1),
    }
    for what, (values, least) in limits.items():
        for value in values:
            if value is not None and value < least:
                raise UsageError(f"{what} must be {least} or more", found=str(value))
    if not math.isfinite(settings.guidance):
        raise UsageError("guidance must be a finite number", found=str(settings.guidance))
    if not settings.batches:
        raise UsageError("there is no batch to run", hint="1 is the usual one")
    if settings.steps is None and (settings.base is not None or settings.scheduler is not None):
        what = "a base" if settings.scheduler is None else "a scheduler"
        raise UsageError(f"{what} is for whole pictures, and none are drawn", hint="say of how many steps: --steps 25")
    if settings.scheduler is not None:
        check_scheduler_name(settings.scheduler)
