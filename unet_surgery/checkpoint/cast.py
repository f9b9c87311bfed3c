"""Converting floating point bytes from one dtype to another, in chunks, as ``torch.Tensor.to`` does.

Rounding is to nearest even. Every value equals torch's bit for bit except a NaN, which stays a NaN (torch's own payload
depends on the instruction set). A finite value that would become infinite is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from unet_surgery.errors import TeacherError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CAST_DTYPES", "CastOverflowError", "cast"]

CAST_DTYPES = ("F64", "F32", "F16", "BF16")
_NUMPY: dict[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class CastOverflowError(TeacherError):
    """A finite value is too large for the target dtype."""


def cast(data: bytes | memoryview, source: str, target: str) -> bytes:
    """Return ``data``, little-endian values of dtype ``source``, as values of dtype ``target``.

    Raises:
        CastOverflowError: a finite value is too large for ``target``.
    """
    values = np.frombuffer(data, dtype=_NUMPY[source])
    if source == target:
        return values.tobytes()
    wide = _widen(values, source)
    with np.errstate(over="ignore", invalid="ignore"):
        # As torch: fp64 goes to a 16-bit dtype by way of fp32.
        single = wide if target == "F64" else wide.astype("<f4")
        result = {"F64": lambda: wide.astype("<f8"), "F32": lambda: single, "F16": lambda: single.astype("<f2")}.get(
            target, lambda: _to_bfloat16(single)
        )()
    _check_finite(wide, result, target)
    return result.tobytes()


def _widen(values: NDArray[Any], source: str) -> NDArray[Any]:
    if source == "BF16":
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<f4") if source == "F16" else values


def _to_bfloat16(single: NDArray[Any]) -> NDArray[Any]:
    bits = single.view("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    # Rounding would carry a NaN's payload into the exponent.
    return np.where(np.isnan(single), np.uint16(0x7FC0) | (bits >> 16).astype("<u2"), rounded)


def _check_finite(wide: NDArray[Any], result: NDArray[Any], target: str) -> None:
    finite = (result & 0x7F80) != 0x7F80 if target == "BF16" else np.isfinite(result)
    lost = np.flatnonzero(~finite & np.isfinite(wide))
    if lost.size:
        raise CastOverflowError(
            f"a value is too large for {target}",
            found=f"{float(wide[lost[0]]):g} at element {int(lost[0])}, and {lost.size - 1} more in this piece",
            hint="use --dtype bf16, which has fp32's range, or leave --dtype out",
        )
