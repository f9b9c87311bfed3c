"""Running the networks over folders of pictures: decoded in threads ahead, batch by batch, in plain fp32 or fp64.

Shapes: N pictures of a folder, B of a batch; pool3 features [N, 2048], logits [N, 1008].
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unet_surgery.errors import DataError, UsageError, printable
from unet_surgery.evaluate.clip import Clip, middle_square
from unet_surgery.evaluate.frechet import Moments
from unet_surgery.evaluate.inception import FidInception, resized
from unet_surgery.evaluate.pictures import PictureFolder, batches

__all__ = ["DTYPES", "Compute", "Features", "caption_cosines", "inception_features"]

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how the networks run. ``step`` is called with the number of pictures of each batch that is done."""

    device: torch.device
    dtype: str = "fp32"
    batch: int = 50
    decoders: int = 4
    step: Callable[[int], None] = field(default=lambda _count: None)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(
                "scores are not computed in this dtype", expected=" or ".join(DTYPES), found=printable(self.dtype)
            )
        if self.batch < 1 or self.decoders < 1:
            raise UsageError("batch and decoders are numbers from 1 on", found=f"{self.batch}, {self.decoders}")


@dataclass(slots=True)
class Features:
    """What the Inception network made of a folder: only what was asked for is there.

    ``sha256`` is of the pictures' files, in the names' order.
    """

    moments: Moments = field(default_factory=Moments)
    pool3_ND: NDArray[np.float32] | None = None
    logits_NC: torch.Tensor | None = None
    sha256: str | None = None


def inception_features(
    net: FidInception,
    pictures: PictureFolder,
    compute: Compute,
    *,
    moments: bool = False,
    pool3: bool = False,
    logits: bool = False,
) -> Features:
    """Return the moments of the features as pytorch-fid resizes, and features or logits as torch-fidelity does.

    Raises:
        DataError: a picture cannot be decoded, or the network gives what is not finite.
    """
    found = Features()
    kept_pool3: list[torch.Tensor] = []
    kept_logits: list[torch.Tensor] = []
    dtype = DTYPES[compute.dtype]
    files = hashlib.sha256()
    with exact_arithmetic():
        for batch_BHW3 in batches(pictures, compute.batch, decoders=compute.decoders, on_file=files.update):
            batch_B3HW = torch.from_numpy(batch_BHW3).to(compute.device).permute(0, 3, 1, 2)
            if moments:
                found.moments.add(_finite(net(resized(batch_B3HW, "pytorch-fid", dtype))))
            if pool3 or logits:
                features_BD = _finite(net(resized(batch_B3HW, "torch-fidelity", dtype)))
                if pool3:
                    kept_pool3.append(features_BD.float().cpu())
                if logits:
                    kept_logits.append(net.logits(features_BD).float().cpu())
            compute.step(len(batch_BHW3))
    if pool3:
        found.pool3_ND = torch.cat(kept_pool3).numpy()
    if logits:
        found.logits_NC = torch.cat(kept_logits)
    found.sha256 = files.hexdigest()
    return found


def caption_cosines(
    clip: Clip, pictures: PictureFolder, captions: Sequence[str], compute: Compute
) -> NDArray[np.float64]:
    """Return the cosine of each picture with its caption, [N].

    Raises:
        DataError: a picture cannot be decoded, or the network gives what is not finite.
        MissingExtraError: a caption needs ftfy, and it is not installed.
    """

    def middle(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return middle_square(picture, clip.side)

    each = middle if clip.fit == "crop" else None
    found: list[Any] = []
    done = 0
    with exact_arithmetic():
        for batch_BHW3 in batches(pictures, compute.batch, decoders=compute.decoders, each=each):
            cosines_B = clip.cosines(batch_BHW3, captions[done : done + len(batch_BHW3)])
            found.append(_finite(torch.from_numpy(cosines_B)).numpy())
            done += len(batch_BHW3)
            compute.step(len(batch_BHW3))
    return np.concatenate(found)


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """No gradients, and fp32 that is fp32: GPUs otherwise convolve in TF32, with a mantissa of 10 bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _finite(values: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise DataError(
            "the network's output is not finite",
            found="NaN or infinity",
            hint="are these the right weights? --dtype fp64 tells whether fp32 overflows",
        )
    return values
