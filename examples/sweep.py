"""A recipe in Python: try every set of attentions to drop beside bk_small, plan each, and write the best in a budget.

    python examples/sweep.py [TEACHER] [OUT]

Plans take about a millisecond, so hundreds of candidates cost less than a second.
"""

from __future__ import annotations

import sys
from itertools import combinations

import unet_surgery
from unet_surgery import Recipe, SurgeryPlan

MAX_MACS_SHARE = 0.55
CANDIDATES = ("down.0.attentions.*", "down.2.attentions.*", "up.1.attentions.*", "up.3.attentions.*")


def candidates() -> list[Recipe]:
    """Return bk_small with every subset of the candidate removals."""
    small = unet_surgery.load_recipe("bk_small")
    subsets = [subset for size in range(len(CANDIDATES) + 1) for subset in combinations(CANDIDATES, size)]
    return [Recipe(name=f"small-{k:02d}", remove=(*small.remove, *subset)) for k, subset in enumerate(subsets)]


def main(teacher: str = "tiny-random", out: str | None = None) -> None:
    plans: list[tuple[Recipe, SurgeryPlan]] = [(r, unet_surgery.plan(r, teacher)) for r in candidates()]
    within = [(r, p) for r, p in plans if p.student.macs_all <= MAX_MACS_SHARE * p.teacher.macs_all]
    print(f"{len(plans)} plans, {len(within)} within {MAX_MACS_SHARE:.0%} of the teacher's MACs")
    recipe, plan = max(within, key=lambda pair: pair[1].student.params)
    print(f"the largest of them, {recipe.name}: {plan.student.params:,} parameters")
    print("\n".join(f"  - {selector}" for selector in recipe.remove))
    result = unet_surgery.prune(recipe, teacher, out)
    report = unet_surgery.check(result.folder, teacher)
    print(f"{result.folder}: {report.compared_tensors} tensors equal the teacher's")


if __name__ == "__main__":
    main(*sys.argv[1:])
