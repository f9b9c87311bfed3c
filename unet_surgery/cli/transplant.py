"""``unet-surgery transplant``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unet_surgery.cli.options import DEFAULT_MAX_HEADER, Json, MaxHeader, Quiet
from unet_surgery.cli.sink import command, say, show, show_json

if TYPE_CHECKING:
    from unet_surgery.derive import TransplantResult

__all__ = ["transplant"]

SHOWN = 3


@command
def transplant(
    lora: Annotated[
        Path, typer.Argument(help="A LoRA's .safetensors file, or a folder with pytorch_lora_weights.safetensors.")
    ],
    plan: Annotated[Path, typer.Option("--plan", help="A student of the LoRA's model: its folder, or its plan.json.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The new file. Default: ./<lora>-<recipe>.safetensors.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    max_header: MaxHeader = DEFAULT_MAX_HEADER,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a LoRA for a student out of one that was trained on its teacher: renamed, no value changed.

    Reads what diffusers, PEFT and kohya write (LoRA, LoCon, LoHa, LoKr, DoRA). What acts on removed modules is dropped
    and listed by the selector that removed them; parts for text encoders stay. It prints the new file's path.

    Example: unet-surgery transplant ./style.safetensors --plan ./my-small
    """
    from unet_surgery.derive import transplant as run

    result = run(lora, plan, out, force=force, max_header=max_header)
    if as_json:
        show_json(_as_data(result))
        return
    show(str(result.file))
    if not quiet:
        _tell(result)


def _as_data(result: TransplantResult) -> dict[str, Any]:
    done = result.transplant
    return {
        "file": str(result.file),
        "recipe": result.plan.recipe.get("name"),
        "kept_modules": len(done.modules),
        "kept_tensors": len(done.names) - done.num_text_tensors,
        "text_encoder_tensors": done.num_text_tensors,
        "dropped_modules": sum(map(len, done.dropped.values())),
        "dropped_tensors": done.num_dropped_tensors,
        "dropped": done.dropped,
    }


def _tell(result: TransplantResult) -> None:
    done = result.transplant
    kept, gone = len(done.modules), sum(map(len, done.dropped.values()))
    text = f"; {done.num_text_tensors} tensors for text encoders as they were" if done.num_text_tensors else ""
    say(f"{kept} of {kept + gone} modules of the U-Net that it acts on are in the student{text}")
    for selector, modules in done.dropped.items():
        more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
        say(f"dropped with {selector}: {', '.join(modules[:SHOWN])}{more}")
