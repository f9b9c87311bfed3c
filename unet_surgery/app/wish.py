"""What somebody asks the demo for, checked: it comes from a browser, or from any program that speaks HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unet_surgery.errors import UsageError, printable
from unet_surgery.sample.schedulers import check_scheduler_name

__all__ = ["MAX_GUIDANCE", "MAX_PROMPT_CHARS", "MAX_SEED", "MAX_STEPS", "Limits", "Wish", "read_wish"]

MAX_PROMPT_CHARS = 1000
MAX_SEED = 2**32 - 1
MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MAX_NUMBER = 1e18
"""No number that is wanted is this large: past it, whatever has digits is no number."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Sides that can be drawn, in pixels: multiples of ``step`` from ``step`` to ``most``."""

    step: int
    most: int


@dataclass(frozen=True, slots=True)
class Wish:
    """A picture that is wanted: sides in pixels; ``scheduler`` is None for each model's own."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    scheduler: str | None


def read_wish(values: Mapping[str, Any], limits: Limits) -> Wish:
    """Return the wish that ``values`` hold under the names of its fields, whatever types they came in.

    Raises:
        UsageError: a value is of another kind or outside its range; says which, and what it may be.
    """
    scheduler = values["scheduler"]
    if scheduler is not None:
        check_scheduler_name(_text("the scheduler", scheduler))
    guidance = _number("guidance", values["guidance"])
    if not 0 <= guidance <= MAX_GUIDANCE:
        raise _outside("guidance", f"0 to {MAX_GUIDANCE:g}", guidance)
    return Wish(
        prompt=_text("the prompt", values["prompt"]),
        negative=_text("the negative prompt", values["negative"]),
        seed=_whole("the seed", values["seed"], 0, MAX_SEED),
        steps=_whole("steps", values["steps"], 1, MAX_STEPS),
        guidance=guidance,
        width=_side("width", values["width"], limits),
        height=_side("height", values["height"], limits),
        scheduler=scheduler,
    )


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{what} is not a text", found=printable(value))
    if len(value) > MAX_PROMPT_CHARS:
        raise UsageError(f"{what} is too long", expected=f"{MAX_PROMPT_CHARS} characters", found=f"{len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a pair of UTF-16, which JSON can say
        raise UsageError(f"{what} holds what is no character", found=printable(value)) from error
    return value


def _number(what: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -MAX_NUMBER <= value <= MAX_NUMBER:  # nor NaN; and an int may be too large for a float
        raise UsageError(f"{what} is not a number", found=printable(value))
    return float(value)


def _whole(what: str, value: Any, least: int, most: int) -> int:
    number = _number(what, value)
    if number != int(number) or not least <= number <= most:
        raise _outside(what, f"a whole number from {least} to {most}", value)
    return int(number)


def _side(what: str, value: Any, limits: Limits) -> int:
    side = _number(what, value)
    if side % limits.step or not limits.step <= side <= limits.most:
        raise _outside(what, f"a multiple of {limits.step} up to {limits.most} pixels", value)
    return int(side)


def _outside(what: str, expected: str, found: Any) -> UsageError:
    return UsageError(f"{what} cannot be this", expected=expected, found=printable(found))
