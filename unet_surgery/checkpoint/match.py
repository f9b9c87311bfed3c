"""Weights against config: the header's shapes are evidence, config.json is a claim, and they must agree."""

from __future__ import annotations

from collections.abc import Mapping

from unet_surgery.checkpoint.foreign import recognise_names
from unet_surgery.errors import SurgeryError, WeightsMismatchError, first_few, printable

__all__ = ["check_dtypes", "check_shapes"]

# What can be copied as it is and still means the same: fp8 is a float of its own, integers are codes for some scale.
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def check_dtypes(dtypes: Mapping[str, str], *, where: str) -> None:
    """Check that every tensor holds floating point numbers: quantised weights mean nothing without their scales.

    Raises:
        WeightsMismatchError: names the tensors that do not.
    """
    codes = [name for name, dtype in dtypes.items() if dtype not in FLOATS]
    if codes:
        raise WeightsMismatchError(
            "the weights are not floating point numbers: quantised, and their scales are not there",
            where=where,
            expected="fp32, fp16, bf16, fp64 or fp8",
            found=f"{len(codes)} tensors of {', '.join(sorted({dtypes[name] for name in codes}))}: {first_few(codes)}",
            hint="take the model's weights from before quantisation",
        )


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    where: str,
    source: str = "config.json",
    error: type[SurgeryError] = WeightsMismatchError,
    hint: str | None = None,
    recognise: bool = True,
) -> None:
    """Check that ``found`` has exactly the tensors and shapes of ``expected``, which ``source`` claims.

    With ``recognise``, names that are not expected are looked at: they may be of another kind of model.

    Raises:
        WeightsMismatchError (or ``error``): names the first missing, unexpected and misshaped tensors, and counts.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    if not (missing or extra or wrong):
        return
    problems = []
    if missing:
        problems.append(_first("missing", missing))
    if extra:
        problems.append(_first("unexpected", extra))
    if wrong:
        first = wrong[0]
        shapes = f"{first} is {printable(list(found[first]))}, expected {list(expected[first])}"
        problems.append(f"{len(wrong)} of another shape ({shapes})")
    what = recognise_names(extra) if recognise else None
    raise error(
        f"the weights do not fit {source}",
        where=where,
        expected=f"{len(expected)} tensors, as {source} says",
        found="; ".join(problems) + (f". This looks like {what}" if what else ""),
        hint=hint or f"check that weights and {source} are of the same model",
    )


def _first(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind}: {first_few(names)}"
