"""PNG from SVG, by whichever converter is there: the resvg-py wheel, else the program rsvg-convert.

Both know no media queries, so a PNG has the light palette. Text is set in the system's fonts.
"""

from __future__ import annotations

import subprocess
from shutil import which

from unet_surgery.errors import MissingExtraError, SurgeryError, UsageError, printable
from unet_surgery.picture.palette import FONTS

__all__ = ["MAX_WIDTH", "to_png"]

MAX_WIDTH = 8192
PROGRAM = "rsvg-convert"
TIMEOUT_SECONDS = 60.0
_PROBE = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="24" height="24">'
    f'<text y="20" font-family="{FONTS}">{{}}</text></svg>'
)
MAGIC = b"\x89PNG\r\n\x1a\n"


def to_png(svg: str, width: int) -> bytes:
    """Return ``svg`` as a PNG of ``width`` pixels; its height follows.

    Raises:
        MissingExtraError: there is no converter.
        UsageError: the width is not one that a picture can have.
        SurgeryError: the converter failed.
    """
    if not 1 <= width <= MAX_WIDTH:
        raise UsageError("the picture cannot have this width", expected=f"1 to {MAX_WIDTH} pixels", found=str(width))
    data = _by_wheel(svg, width)
    if data is None:
        data = _by_program(svg, width)
    if data is None:
        raise MissingExtraError(
            "a PNG needs a converter, and none is installed",
            expected=f"the Python package resvg-py, or the program {PROGRAM}",
            hint="pip install 'unet-surgery[png]', or write .svg",
        )
    if not data.startswith(MAGIC):
        raise SurgeryError("the converter gave no PNG", hint="write .svg")
    return data


def _by_wheel(svg: str, width: int) -> bytes | None:
    """Return the PNG, or None where resvg-py is not installed."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        return None
    try:
        # without one of the fonts it would leave all text out and say nothing
        if svg_to_bytes(svg_string=_PROBE.format("M")) == svg_to_bytes(svg_string=_PROBE.format("")):
            raise SurgeryError(
                "resvg-py finds no font for the picture's text", hint="install one, such as DejaVu Sans, or write .svg"
            )
        return bytes(svg_to_bytes(svg_string=svg, width=width))
    except ValueError as error:
        raise SurgeryError("resvg-py could not convert the picture", found=printable(str(error))) from error


def _by_program(svg: str, width: int) -> bytes | None:
    """Return the PNG, or None where rsvg-convert is not on the PATH."""
    program = which(PROGRAM)
    if program is None:
        return None
    command = [program, "--format=png", f"--width={width}", "--keep-aspect-ratio"]
    try:
        # no shell, and nothing in the command is from outside
        done = subprocess.run(command, input=svg.encode(), capture_output=True, timeout=TIMEOUT_SECONDS, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        raise SurgeryError(
            f"{PROGRAM} could not convert the picture", found=printable(said.decode(errors="replace"))
        ) from error
    return done.stdout
