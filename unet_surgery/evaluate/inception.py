"""The Inception network that FID, IS and KID are defined by, from its one public weights file, and both its resizes.

The network of 2015-12-05 (Szegedy et al., "Rethinking the Inception architecture", arXiv 1512.00567) as TensorFlow's
FID code ran it: average pools that leave the padding out of the mean, and one maximum where the paper has an average.
pytorch-fid and torch-fidelity publish the same file of its weights under two names, and bring pictures to its size in
two ways, which is why their numbers differ.

Shapes: B batch; pictures are uint8 [B, 3, H, W]; pool3 features [B, 2048]; logits [B, 1008].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from unet_surgery.errors import TeacherError, first_few

__all__ = ["NUM_CLASSES", "NUM_FEATURES", "SIDE", "FidInception", "Resize", "resized", "tensor_shapes"]

SIDE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
BATCH_NORM_EPSILON = 1e-3
NOT_A_WEIGHT = "num_batches_tracked"  # counts the batches of training; some copies of the file have it

Resize = Literal["pytorch-fid", "torch-fidelity"]
"""How a picture becomes 299 × 299: bilinear between pixel centres, or between corners as TensorFlow 1 did it."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A convolution without bias, its batch norm and a ReLU."""

    channels_in: int
    channels_out: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: tuple[int, int] = (0, 0)


def resized(pictures_B3HW: torch.Tensor, how: Resize, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return uint8 pictures as the network takes them: [B, 3, 299, 299], about −1 … 1.

    ``pytorch-fid``: half-pixel centres, no antialiasing, 2 · x / 255 − 1. ``torch-fidelity``: TensorFlow 1's bilinear
    resize, whose source position of pixel i is i · H / 299, and (x − 128) / 128.
    """
    if how == "pytorch-fid":
        unit_B3HW = pictures_B3HW.to(dtype) / 255
        square = functional.interpolate(unit_B3HW, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return 2 * square - 1
    values_B3HW = pictures_B3HW.to(dtype)
    across = _between_corners(values_B3HW, -1)
    return (_between_corners(across, -2) - 128) / 128


def _channels_last(pictures: torch.Tensor) -> torch.Tensor:
    """Return the same values in the order of memory in which convolutions are fastest, by half on a CPU."""
    return pictures.contiguous(memory_format=torch.channels_last)


def _between_corners(values: torch.Tensor, axis: int) -> torch.Tensor:
    size = values.shape[axis]
    # Positions in fp32 whatever the values are: it is what TensorFlow did.
    scale = torch.tensor(size / SIDE, dtype=torch.float32, device=values.device)
    position = torch.arange(SIDE, dtype=values.dtype, device=values.device) * scale
    below = position.long()
    above = (below + 1).clamp_max(size - 1)
    share = position - below.float()
    share = share if axis == -1 else share[:, None]
    low, high = values.index_select(axis, below), values.index_select(axis, above)
    return low + (high - low) * share


class FidInception(nn.Module):  # type: ignore[misc]  # torch is not followed
    """The network in evaluation mode, each batch norm folded into its convolution (in fp64).

    Raises:
        TeacherError: ``tensors`` lack one of the network's, have one more, or one of another shape; all are checked.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        check_tensors(tensors)
        self.units = nn.ModuleDict()
        for name, unit in _units().items():
            self.units[_key(name)] = _folded(tensors, name, unit)
        self.class_weights = nn.Parameter(tensors["fc.weight"].double(), requires_grad=False)
        self.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return pool3 features [B, 2048] of what :func:`resized` gives."""
        x = _channels_last(pictures)
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
            x = self._run(name, x)
        x = functional.max_pool2d(x, 3, 2)
        for name in ("Conv2d_3b_1x1", "Conv2d_4a_3x3"):
            x = self._run(name, x)
        x = functional.max_pool2d(x, 3, 2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._mixed_5(name, x)
        x = self._mixed_6a(x)
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self._mixed_6(name, x)
        x = self._mixed_7a(x)
        x = self._mixed_7("Mixed_7b", x, _average_3x3(x))
        x = self._mixed_7("Mixed_7c", x, functional.max_pool2d(x, 3, 1, 1))
        return x.mean(dim=(2, 3))

    def logits(self, pool3_BD: torch.Tensor) -> torch.Tensor:
        """Return the class scores without their bias, [B, 1008], as the inception score is computed."""
        return pool3_BD @ self.class_weights.T

    def _run(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.units[_key(name)](x), inplace=True)

    def _chain(self, block: str, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        for name in names:
            x = self._run(f"{block}.{name}", x)
        return x

    def _mixed_5(self, block: str, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [
                self._chain(block, ("branch1x1",), x),
                self._chain(block, ("branch5x5_1", "branch5x5_2"), x),
                self._chain(block, ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), x),
                self._chain(block, ("branch_pool",), _average_3x3(x)),
            ],
            dim=1,
        )

    def _mixed_6a(self, x: torch.Tensor) -> torch.Tensor:
        double = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        parts = [self._chain("Mixed_6a", ("branch3x3",), x), self._chain("Mixed_6a", double, x)]
        return torch.cat([*parts, functional.max_pool2d(x, 3, 2)], dim=1)

    def _mixed_6(self, block: str, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [
                self._chain(block, ("branch1x1",), x),
                self._chain(block, ("branch7x7_1", "branch7x7_2", "branch7x7_3"), x),
                self._chain(block, tuple(f"branch7x7dbl_{i}" for i in range(1, 6)), x),
                self._chain(block, ("branch_pool",), _average_3x3(x)),
            ],
            dim=1,
        )

    def _mixed_7a(self, x: torch.Tensor) -> torch.Tensor:
        parts = [
            self._chain("Mixed_7a", ("branch3x3_1", "branch3x3_2"), x),
            self._chain("Mixed_7a", tuple(f"branch7x7x3_{i}" for i in range(1, 5)), x),
        ]
        return torch.cat([*parts, functional.max_pool2d(x, 3, 2)], dim=1)

    def _mixed_7(self, block: str, x: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        single = self._chain(block, ("branch3x3_1",), x)
        double = self._chain(block, ("branch3x3dbl_1", "branch3x3dbl_2"), x)
        return torch.cat(
            [
                self._chain(block, ("branch1x1",), x),
                self._chain(block, ("branch3x3_2a",), single),
                self._chain(block, ("branch3x3_2b",), single),
                self._chain(block, ("branch3x3dbl_3a",), double),
                self._chain(block, ("branch3x3dbl_3b",), double),
                self._chain(block, ("branch_pool",), pooled),
            ],
            dim=1,
        )


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Return name → shape of every tensor of the weights file, in the names that both libraries share."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, unit in _units().items():
        shapes[f"{name}.conv.weight"] = (unit.channels_out, unit.channels_in, *unit.kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (unit.channels_out,)
    return shapes | {"fc.weight": (NUM_CLASSES, NUM_FEATURES), "fc.bias": (NUM_CLASSES,)}


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are not exactly the network's.

    Raises:
        TeacherError: names the first few that are missing, unknown, misshaped or not finite.
    """
    expected = tensor_shapes()
    names = {name for name in tensors if not name.endswith(NOT_A_WEIGHT)}
    faults = {
        "missing": sorted(expected.keys() - names),
        "unknown": sorted(names - expected.keys()),
        "of another shape": sorted(n for n in names & expected.keys() if tuple(tensors[n].shape) != expected[n]),
        "not of finite numbers": sorted(
            n
            for n in names & expected.keys()
            if not (tensors[n].is_floating_point() and bool(torch.isfinite(tensors[n]).all()))
        ),
    }
    found = "; ".join(f"{kind}: {first_few(which)}" for kind, which in faults.items() if which)
    if found:
        raise TeacherError(
            "these are not the weights of the Inception network of FID",
            expected=f"its {len(expected)} tensors, as pt_inception-2015-12-05-6726825d.pth has them",
            found=found,
        )


def _average_3x3(x: torch.Tensor) -> torch.Tensor:
    return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _key(name: str) -> str:
    """Modules' names may hold no dots."""
    return name.replace(".", "/")


def _folded(tensors: Mapping[str, torch.Tensor], name: str, unit: Unit) -> nn.Conv2d:
    weight, gain, bias, mean, variance = (
        tensors[f"{name}.{part}"].double()
        for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    )
    gain = gain / torch.sqrt(variance + BATCH_NORM_EPSILON)
    with torch.device("meta"):  # random values are neither needed nor drawn
        conv = nn.Conv2d(unit.channels_in, unit.channels_out, unit.kernel, unit.stride, unit.padding)
    conv.weight = nn.Parameter(weight * gain[:, None, None, None], requires_grad=False)
    conv.bias = nn.Parameter(bias - mean * gain, requires_grad=False)
    return conv


def _units() -> dict[str, Unit]:
    stem = {
        "Conv2d_1a_3x3": Unit(3, 32, (3, 3), 2),
        "Conv2d_2a_3x3": Unit(32, 32, (3, 3)),
        "Conv2d_2b_3x3": Unit(32, 64, (3, 3), 1, (1, 1)),
        "Conv2d_3b_1x1": Unit(64, 80, (1, 1)),
        "Conv2d_4a_3x3": Unit(80, 192, (3, 3)),
    }
    blocks = [
        *(("Mixed_5" + a, _units_5(c, p)) for a, c, p in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64))),
        ("Mixed_6a", _units_6a()),
        *(("Mixed_6" + a, _units_6(c)) for a, c in (("b", 128), ("c", 160), ("d", 160), ("e", 192))),
        ("Mixed_7a", _units_7a()),
        *(("Mixed_7" + a, _units_7(c)) for a, c in (("b", 1280), ("c", 2048))),
    ]
    return stem | {f"{block}.{name}": unit for block, units in blocks for name, unit in units}


_Units = Iterator[tuple[str, Unit]]


def _same(channels_in: int, channels_out: int, height: int, width: int) -> Unit:
    """A unit that keeps the picture's size."""
    return Unit(channels_in, channels_out, (height, width), 1, (height // 2, width // 2))


def _units_5(channels: int, pooled: int) -> _Units:
    yield "branch1x1", _same(channels, 64, 1, 1)
    yield "branch5x5_1", _same(channels, 48, 1, 1)
    yield "branch5x5_2", _same(48, 64, 5, 5)
    yield "branch3x3dbl_1", _same(channels, 64, 1, 1)
    yield "branch3x3dbl_2", _same(64, 96, 3, 3)
    yield "branch3x3dbl_3", _same(96, 96, 3, 3)
    yield "branch_pool", _same(channels, pooled, 1, 1)


def _units_6a() -> _Units:
    yield "branch3x3", Unit(288, 384, (3, 3), 2)
    yield "branch3x3dbl_1", _same(288, 64, 1, 1)
    yield "branch3x3dbl_2", _same(64, 96, 3, 3)
    yield "branch3x3dbl_3", Unit(96, 96, (3, 3), 2)


def _units_6(inner: int) -> _Units:
    yield "branch1x1", _same(768, 192, 1, 1)
    yield "branch7x7_1", _same(768, inner, 1, 1)
    yield "branch7x7_2", _same(inner, inner, 1, 7)
    yield "branch7x7_3", _same(inner, 192, 7, 1)
    yield "branch7x7dbl_1", _same(768, inner, 1, 1)
    yield "branch7x7dbl_2", _same(inner, inner, 7, 1)
    yield "branch7x7dbl_3", _same(inner, inner, 1, 7)
    yield "branch7x7dbl_4", _same(inner, inner, 7, 1)
    yield "branch7x7dbl_5", _same(inner, 192, 1, 7)
    yield "branch_pool", _same(768, 192, 1, 1)


def _units_7a() -> _Units:
    yield "branch3x3_1", _same(768, 192, 1, 1)
    yield "branch3x3_2", Unit(192, 320, (3, 3), 2)
    yield "branch7x7x3_1", _same(768, 192, 1, 1)
    yield "branch7x7x3_2", _same(192, 192, 1, 7)
    yield "branch7x7x3_3", _same(192, 192, 7, 1)
    yield "branch7x7x3_4", Unit(192, 192, (3, 3), 2)


def _units_7(channels: int) -> _Units:
    yield "branch1x1", _same(channels, 320, 1, 1)
    yield "branch3x3_1", _same(channels, 384, 1, 1)
    yield "branch3x3_2a", _same(384, 384, 1, 3)
    yield "branch3x3_2b", _same(384, 384, 3, 1)
    yield "branch3x3dbl_1", _same(channels, 448, 1, 1)
    yield "branch3x3dbl_2", _same(448, 384, 3, 3)
    yield "branch3x3dbl_3a", _same(384, 384, 1, 3)
    yield "branch3x3dbl_3b", _same(384, 384, 3, 1)
    yield "branch_pool", _same(channels, 192, 1, 1)
