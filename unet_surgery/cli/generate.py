"""``unet-surgery generate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.options import TEACHER_HELP, Json, Quiet, size_of
from unet_surgery.cli.processes import own_device, part_of_work
from unet_surgery.cli.sink import Terminated, TwoBars, command, say, show, show_json
from unet_surgery.errors import MissingExtraError, UsageError, printable

if TYPE_CHECKING:
    from unet_surgery.evaluate.generate import GenerateResult

__all__ = ["generate"]


@command
def generate(
    model: Annotated[str, typer.Argument(help=f"Whose U-Net draws. {TEACHER_HELP}")],
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            "-p",
            help="A text; a .txt with a prompt a line; a .csv, .jsonl, .json or .parquet with a column of them; COCO's "
            "captions; or a folder with metadata.csv.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The pictures' folder.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Defaults as a published protocol has them: mscoco30k, mscoco5k or hpsv2. Options override."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="A pipeline that brings the other parts, for a U-Net alone.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column of prompts. Default: text, caption or prompt.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take only the first prompts.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Pixels to draw at: 512, or 512x768 (width x height). Default: the model's.")
    ] = None,
    resize: Annotated[
        str | None, typer.Option(help="Make pictures this small before they are kept; 0: not, whatever the preset.")
    ] = None,
    resize_filter: Annotated[
        str, typer.Option("--resize-filter", help="nearest, box, bilinear, bicubic or lanczos, as PIL has them.")
    ] = "bicubic",
    jpeg: Annotated[
        int | None,
        typer.Option(help="Pass pictures through JPEG of this quality, as some protocols do; 0: not. Files stay PNG."),
    ] = None,
    full_size: Annotated[
        Path | None,
        typer.Option("--full-size", help="A folder that keeps pictures at the size they were drawn at, too."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            "-s",
            help="ddim, ddim-trailing, ddpm, dpmsolver++, euler, euler-a, heun, lcm, pndm, unipc, or a class "
            "of diffusers. Default: the model's.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: 25.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1: none. Default: 7.5.")] = None,
    negative: Annotated[str, typer.Option(help="The negative prompt.")] = "",
    seed: Annotated[int | None, typer.Option(help="Of all noise. Default: 0.")] = None,
    seeding: Annotated[
        str, typer.Option(help="keyed: noise by seed and prompt number; stream: one generator, batch after batch.")
    ] = "keyed",
    batch: Annotated[int, typer.Option(help="Pictures drawn at once.")] = 8,
    init: Annotated[
        Path | None, typer.Option("--init", help="Start from pictures: a folder with one a prompt, in order.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="The share of the steps drawn anew. Default: 0.8; with --masks 1.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option("--masks", help="For inpainting U-Nets: a folder of masks, white where to draw.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", "-t", help="Draw the first prompts by this model too, and show both in OUT-grids."),
    ] = None,
    grids: Annotated[int, typer.Option("--grids", help="How many prompts --teacher draws.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. Default: fp16 on a GPU, else fp32.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the U-Net: for many pictures on a GPU.")] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="The memory layout that GPUs convolve fastest in.")
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            help="i/n, from 1/n to n/n: one of n such commands that share the work. Default: RANK, WORLD_SIZE."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw a picture of each prompt, for evaluation: PNGs, metadata.csv and generation.json in one folder. Needs torch.

    A picture depends on seed and prompt number alone, whatever the batch and however many processes. A run that was
    stopped goes on when the same command is given again; generation.json, which says how all was drawn, comes last.

    For many processes: accelerate launch -m unet_surgery generate …

    Example: unet-surgery generate toy -p "a large red circle at the left on a white background" --out ./pictures
    """
    if out is None:
        raise UsageError("--out is needed", hint="unet-surgery generate --help")
    index, count = part_of_work(part)
    quiet = quiet or (index > 0 and part is None)
    sizes = {name: size_of(name, text, "512 or 512x768") for name, text in (("size", size), ("resize", resize))}
    run = _drawing()
    done = [0, 0]
    with TwoBars("drawing", quiet) as bars:

        def progress(num_done: int, total: int) -> None:
            done[:] = num_done, total
            bars.works(num_done, total)

        try:
            result = run(
                model,
                prompts,
                out,
                preset=preset,
                base=base,
                column=column,
                limit=limit,
                size=sizes["size"],
                resize=sizes["resize"],
                resize_filter=resize_filter,
                jpeg=jpeg,
                full_size=full_size,
                scheduler=scheduler,
                steps=steps,
                guidance=guidance,
                negative=negative,
                seed=seed,
                seeding=seeding,
                batch=batch,
                init=init,
                masks=masks,
                strength=strength,
                teacher=teacher,
                grids=grids,
                device=own_device(device),
                dtype=dtype,
                compiled=compiled,
                channels_last=channels_last,
                part=(index, count),
                progress=progress,
                fetching=bars.fetches,
            )
        except (KeyboardInterrupt, Terminated):
            if not quiet and done[1]:
                say(f"about {done[0]} of {done[1]} pictures are drawn; the same command goes on from there")
            raise
    if index == 0 or part is not None:
        _tell(result, as_json=as_json, quiet=quiet)


def _drawing() -> Callable[..., GenerateResult]:
    try:
        from unet_surgery.evaluate.generate import generate as run
    except ImportError as error:
        raise MissingExtraError(
            "numpy and pillow are needed for this, and do not import",
            found=printable(str(error).replace("\n", " ")),
            hint="unet-surgery doctor says why; where they are missing: pip install 'unet-surgery[train]'",
        ) from error
    return run


def _tell(result: GenerateResult, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        show_json({**asdict(result), "folder": str(result.folder), "grids": [str(path) for path in result.grids]})
    else:
        show(str(result.folder))
        for path in result.grids:
            show(str(path))
    if quiet:
        return
    rate = f", {result.num_drawn / result.seconds:.3g} a second" if result.num_drawn and result.seconds else ""
    say(f"{result.num_there} picture{'s' if result.num_there != 1 else ''}; {result.num_drawn} drawn now{rate}")
    if not result.finished:
        say(f"of {result.num_pictures}; the part that is done last completes the folder")
