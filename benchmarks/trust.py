"""What the README says of hostile inputs, faults and races, counted on this machine.

Runs the generator of ``tests/hostile`` through the real command line, and the sweeps and races of ``tests/faults.py``.
All fault points take about ten minutes; ``--every 8`` takes an eighth of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from measure import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

NUM_RACES = 30  # of either kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="take every n-th fault of each call")
    options = parser.parse_args()
    print(machine())
    hostile()
    faults(options.every)
    races()


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
    headers = [v for v in refused if v.case.group == "container"]
    kinds = Counter(v.case.group for v in refused)
    line("hostile inputs refused in words / tried", f"{sum(not v.problems for v in refused)} / {len(refused)}")
    print("    " + ", ".join(f"{group} {count}" for group, count in kinds.items()))
    line("legal oddities accepted / tried", f"{sum(not v.problems for v in legal)} / {len(legal)}")
    line("wrong inputs accepted", str(sum(v.code == ACCEPTED for v in refused)))
    for label, group in (("header fault", headers), ("refusal", refused)):
        slowest = max(group, key=lambda v: v.seconds)
        largest = max(group, key=lambda v: v.peak_bytes)
        line(f"worst time of a {label}, whole process", f"{slowest.seconds:.2f} s  ({slowest.case.id})")
        line(f"worst memory of a {label}", f"{largest.peak_bytes / 1e6:.0f} MB  ({largest.case.id})")
    for verdict in verdicts:
        for problem in verdict.problems:
            print(f"    WRONG  {verdict.case.id}: {problem}")


def faults(every: int) -> None:
    from faults import SCENARIOS, sweep

    start = time.perf_counter()
    outcomes = [outcome for name in SCENARIOS for outcome in sweep(name, every=every)]
    seconds = time.perf_counter() - start
    kinds = Counter(outcome.fault.partition(" ")[0] for outcome in outcomes)
    line("fault points survived / tried", f"{sum(not o.wrong for o in outcomes)} / {len(outcomes)}")
    print(f"    {len(SCENARIOS)} scenarios in {seconds:.0f} s: " + ", ".join(f"{k} {n}" for k, n in kinds.items()))
    for outcome in outcomes:
        if outcome.wrong:
            print(f"    WRONG  {outcome}")


def races() -> None:
    from faults import races as run

    found = [race for force in (False, True) for race in run(NUM_RACES, force=force)]
    line("races of two writers ending whole / run", f"{sum(not race.wrong for race in found)} / {len(found)}")
    for race in found:
        if race.wrong:
            print(f"    WRONG  {race}")


def line(label: str, value: str) -> None:
    print(f"{label:<46}{value}", flush=True)


if __name__ == "__main__":
    main()
