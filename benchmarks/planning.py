"""How long a plan takes once everything is loaded: what a search over thousands of recipes would pay."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from measure import machine

from unet_surgery.checkpoint.bundled import FAMILY_TEACHERS, bundled_folder
from unet_surgery.checkpoint.jsonfile import read_object
from unet_surgery.graph import UNetGraph, build, parse_config, remove
from unet_surgery.lower import SurgeryPlan, count, make_plan
from unet_surgery.recipe import Recipe, load_recipe, select

ROUNDS = 200
CASES = (("sd1", "bk_tiny"), ("sd1", "bk_base"), ("sdxl", "koala_700m"), ("sdxl", "ssd_1b"))


def main() -> None:
    print(machine())
    print(f"median (worst) of {ROUNDS} in one process, in milliseconds\n")
    print(f"{'':<24}{'full plan':>18}{'counts only':>18}")
    for family, name in CASES:
        raw = read_object(bundled_folder(FAMILY_TEACHERS[family]) / "config.json")
        recipe = load_recipe(name)

        def full(raw: dict[str, object] = raw, recipe: Recipe = recipe) -> SurgeryPlan:
            config = parse_config(raw)
            graph = build(config)
            selection = select(recipe, graph)
            return make_plan(config, selection, recipe=recipe.to_data(), teacher_id="local", teacher=graph)

        graph = build(parse_config(raw))

        def counts(graph: UNetGraph = graph, recipe: Recipe = recipe) -> int:
            return count(remove(graph, select(recipe, graph).nodes)).params

        assert counts() == full().student.params
        print(f"{name + ' on ' + family:<24}{spread(full):>18}{spread(counts):>18}")


def spread(function: Callable[[], object]) -> str:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return f"{statistics.median(times):.2f} ({max(times):.2f})"


if __name__ == "__main__":
    main()
