"""``unet-surgery verify``."""

from __future__ import annotations

from unet_surgery.cli.check import Student
from unet_surgery.cli.options import DEFAULT_MAX_HEADER, Base, Compared, MaxHeader, Quiet, Variant
from unet_surgery.cli.sink import command, progress_bar, show

__all__ = ["verify"]


@command
def verify(
    folder: Student,
    teacher: Compared = None,
    base: Base = None,
    variant: Variant = None,
    max_header: MaxHeader = DEFAULT_MAX_HEADER,
    quiet: Quiet = False,
) -> None:
    """Check a student, then load it in diffusers and run it once. Needs torch.

    Fails when a tensor is missing, unexpected, misshaped, NaN or infinite, and names it.

    Example: unet-surgery verify ./sd-v1-random-bk_tiny
    """
    from unet_surgery import verify as run

    with progress_bar("comparing", quiet) as progress:
        report = run(folder, teacher, base=base, variant=variant, max_header=max_header, progress=progress)
    if not quiet:
        show(f"{folder}: as planned, {report.check.num_tensors} tensors, all finite")
        shape = " x ".join(map(str, report.output_shape))
        loads = f"diffusers {report.diffusers_version} loads the U-Net, 0 missing, 0 unexpected"
        show(f"{loads}; a forward gives {shape}, finite")
