"""Every hostile input gets one clear message and its exit code, in bounded time and memory, and leaves no trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import ACCEPTED, CASES, Case, Launcher, judge


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher(is_warm=True) as launcher:
        yield launcher


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_hostile_inputs(case: Case, tmp_path: Path, launcher: Launcher) -> None:
    verdict = judge(case, tmp_path, launcher)
    assert not verdict.problems, f"{', '.join(verdict.problems)}\n{verdict.message}"


def test_there_are_enough_of_every_kind() -> None:
    kinds = Counter(case.group for case in CASES if case.code != ACCEPTED)
    assert sum(kinds.values()) >= 150
    assert min(kinds[group] for group in ("container", "weights", "layout", "config", "recipe", "student")) >= 20
    assert len({case.id for case in CASES}) == len(CASES)
    assert sum(case.code == ACCEPTED for case in CASES) >= 20
