"""What the README says of hostile inputs, faults and races, counted on this machine.

Runs the generator of ``tests/hostile`` through the real command line, and the sweep and races of ``tests/faults.py``.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from measure import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    print(machine())
    hostile()


def hostile() -> None:
    from hostile import ACCEPTED, CASES, Launcher, judge

    verdicts = []
    with Launcher() as launcher, tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            place = Path(folder, str(number))
            place.mkdir()
            verdicts.append(judge(case, place, launcher))
    refused = [v for v in verdicts if v.case.code != ACCEPTED]
    legal = [v for v in verdicts if v.case.code == ACCEPTED]
    kinds = Counter(v.case.group for v in refused)
    print(f"hostile inputs refused in words / tried     {sum(not v.problems for v in refused)} / {len(refused)}")
    print("    " + ", ".join(f"{group} {count}" for group, count in kinds.items()))
    print(f"legal oddities accepted / tried             {sum(not v.problems for v in legal)} / {len(legal)}")
    print(f"wrong weights accepted                      {sum(v.code == 0 for v in refused)}")
    slowest = max(refused, key=lambda v: v.seconds)
    print(f"worst time of a refusal                     {slowest.seconds:.2f} s, whole process ({slowest.case.id})")
    largest = max(refused, key=lambda v: v.peak_bytes)
    print(f"worst memory of a refusal                   {largest.peak_bytes / 1e6:.0f} MB ({largest.case.id})")
    for verdict in verdicts:
        for problem in verdict.problems:
            print(f"    {verdict.case.id}: {problem}")


if __name__ == "__main__":
    main()
