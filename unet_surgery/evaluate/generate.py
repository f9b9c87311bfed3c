"""``generate``: what is asked for is checked here; the networks, and what runs them, come after that."""

from __future__ import annotations

import os
from pathlib import Path

from unet_surgery.checkpoint.disk import Progress
from unet_surgery.data.given import GivenPictures, open_given
from unet_surgery.errors import MissingExtraError, UsageError, printable
from unet_surgery.evaluate.request import GenerateRequest, GenerateResult, check_grids, plan_prompts, plan_protocol
from unet_surgery.hub import check_teacher_name, local_path
from unet_surgery.sample.generated import check_output

__all__ = ["GenerateResult", "generate"]


def generate(
    model: str | Path,
    prompts: str | Path | None,
    out: str | Path,
    *,
    preset: str | None = None,
    base: str | Path | None = None,
    column: str | None = None,
    limit: int | None = None,
    size: int | tuple[int, int] | None = None,
    resize: int | tuple[int, int] | None = None,
    resize_filter: str = "bicubic",
    jpeg: int | None = None,
    full_size: str | Path | None = None,
    scheduler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    seed: int | None = None,
    seeding: str = "keyed",
    batch: int = 8,
    init: str | Path | None = None,
    masks: str | Path | None = None,
    strength: float | None = None,
    teacher: str | Path | None = None,
    grids: int = 8,
    device: str = "auto",
    dtype: str | None = None,
    compiled: bool = False,
    channels_last: bool = False,
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    fetching: Progress | None = None,
) -> GenerateResult:
    """Draw a picture of each prompt by ``model`` into the folder ``out``, or go on with it.

    ``model`` is a pipeline, or a U-Net with ``base`` to bring the other parts: a folder, a built-in name or a Hub id.
    ``prompts`` is what :func:`unet_surgery.data.prompts.read_prompts` reads, with ``column`` and ``limit``; if None,
    the captions of ``init``. ``preset`` names one of :data:`unet_surgery.sample.presets.PRESETS`, whose values stand
    for arguments that are None; without one, ``steps`` is 25, ``guidance`` 7.5, ``seed`` 0, and the model says its
    ``size`` and ``scheduler``. Sizes are a side or (height, width) in pixels.

    Pictures are drawn at ``size``, made smaller to ``resize`` by a filter of :data:`unet_surgery.sample.keep.FILTERS`,
    and passed through JPEG of a quality (0 for ``resize`` or ``jpeg``: not, whatever the preset says); ``full_size`` is
    a folder that keeps them as drawn as well. ``seeding`` is ``keyed`` (noise by seed and prompt number) or ``stream``
    (one generator on the device, batch after batch). ``init`` is a folder of pictures to start from, one a prompt, of
    which ``strength`` is drawn anew (0.8, with ``masks`` 1). ``teacher`` draws the first ``grids`` prompts too, beside
    the model's pictures, in ``out``-grids. ``dtype`` is fp32, bf16 or fp16 (None: fp16 on a GPU, else fp32), ``part``
    the (index, count) of processes that share the work. ``progress`` is called with pictures done and in all,
    ``fetching`` with bytes, before the first picture, where a model has to be made first; of what comes from the Hub
    its client shows bars of its own.

    Raises:
        UsageError: an argument has no sense.
        DataError: prompts or pictures to start from cannot be read, or are not of the right number.
        OutputError: ``out`` is something else, was begun with other settings, or the disk refuses.
        TeacherError, HubError, VerificationError: a model cannot be had or is not whole, or draws what is not finite.
        MissingExtraError: torch, diffusers or transformers is not installed.
    """
    request = GenerateRequest(
        model=str(model),
        prompts=prompts,
        out=_absolute(out),
        preset=preset,
        base=None if base is None else str(base),
        column=column,
        limit=limit,
        size=size,
        resize=resize,
        resize_filter=resize_filter,
        jpeg=jpeg,
        full_size=None if full_size is None else _absolute(full_size),
        scheduler=scheduler,
        steps=steps,
        guidance=guidance,
        negative=negative,
        seed=seed,
        seeding=seeding,
        batch=batch,
        init=None if init is None else _absolute(init),
        masks=None if masks is None else _absolute(masks),
        strength=strength,
        teacher=None if teacher is None else str(teacher),
        grids=grids,
        device=device,
        dtype=dtype,
        compiled=compiled,
        channels_last=channels_last,
        part=part,
    )
    protocol = plan_protocol(request)
    for text in (request.model, request.base, request.teacher):
        if text is not None:
            check_teacher_name(text)
    planned = plan_prompts(request)
    _check_outputs(request)
    given = _given(request, len(planned.texts))
    try:
        from unet_surgery.evaluate.drawing import draw_prompts
    except (ImportError, RuntimeError, OSError) as error:  # diffusers wraps what its imports raise
        raise MissingExtraError(
            "torch, diffusers and transformers are needed for this, and do not import",
            found=printable(str(error).replace("\n", " ")),
            hint="unet-surgery doctor says why; where they are missing: pip install 'unet-surgery[train]'",
        ) from error
    return draw_prompts(request, protocol, planned, given, progress or (lambda _done, _total: None), fetching)


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))


def _check_outputs(request: GenerateRequest) -> None:
    models = [local_path(text) for text in (request.model, request.base, request.teacher) if text is not None]
    inputs = [path for path in (*models, request.init, request.masks) if path is not None]
    check_output(request.out, *inputs)
    if request.full_size is not None:
        check_output(request.full_size, *inputs)
        folders = {request.full_size, request.out}
        if len(folders) == 1 or folders & {*request.full_size.parents, *request.out.parents}:  # no others in there
            raise UsageError(
                "the pictures as drawn need a folder of their own",
                where=str(request.full_size),
                expected="a folder that is not in the other, nor has it inside",
                found=f"--out {request.out}",
            )
    check_grids(request)


def _given(request: GenerateRequest, count: int) -> tuple[GivenPictures | None, GivenPictures | None]:
    limited = request.limit is not None
    init = None if request.init is None else open_given(request.init, count, limit=limited)
    return init, None if request.masks is None else open_given(request.masks, count, limit=limited)
