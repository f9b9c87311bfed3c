"""A generator of inputs that somebody damaged, confused or made to hurt, each with the outcome it must get."""

from __future__ import annotations

from hostile.config import CONFIG_CASES
from hostile.container import CONTAINER_CASES
from hostile.judge import ACCEPTED, Case, Launcher, Verdict, judge
from hostile.layout import LAYOUT_CASES
from hostile.recipe import RECIPE_CASES
from hostile.student import STUDENT_CASES
from hostile.weights import WEIGHTS_CASES

__all__ = ["ACCEPTED", "CASES", "Case", "Launcher", "Verdict", "judge"]

CASES: tuple[Case, ...] = (
    *CONTAINER_CASES,
    *WEIGHTS_CASES,
    *LAYOUT_CASES,
    *CONFIG_CASES,
    *RECIPE_CASES,
    *STUDENT_CASES,
)
