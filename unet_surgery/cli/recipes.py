"""``unet-surgery recipes`` and its subcommands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unet_surgery.cli.options import Json
from unet_surgery.cli.sink import command, say, show, show_json, table

if TYPE_CHECKING:
    from unet_surgery.lower import SurgeryPlan

__all__ = ["recipes"]

recipes = typer.Typer(no_args_is_help=False)

Name = Annotated[str, typer.Argument(help="A built-in recipe or a YAML file.")]


@recipes.callback(invoke_without_command=True)
def main(context: typer.Context, as_json: Json = False) -> None:
    """List the recipes; show, check, copy and compare them.

    Without a command: the built-in recipes with what each leaves of its families' U-Nets, "–" where it is not for one.

    Example: unet-surgery recipes
    """
    if context.invoked_subcommand is None:
        list_recipes(as_json)


@command
def list_recipes(as_json: bool) -> None:
    """Print the table of built-in recipes."""
    from unet_surgery.api import plan_families
    from unet_surgery.graph import FAMILIES
    from unet_surgery.lower import quantity
    from unet_surgery.recipe import builtin_names, load_recipe

    rows, data = [], []
    for name in builtin_names():
        recipe = load_recipe(name)
        plans = plan_families(recipe)
        cells = [f"{quantity(p.student.params)} ({_kept(p)})" if (p := plans.get(f)) else "–" for f in FAMILIES]
        rows.append((name, recipe.summary, *cells))
        leaves = {family: {"params": p.student.params, "macs": p.student.macs} for family, p in plans.items()}
        data.append({"name": name, "summary": recipe.summary, "teacher": recipe.teacher, "leaves": leaves})
    if as_json:
        show_json(data)
    else:
        show(table(("recipe", "what it does", *FAMILIES), rows, right=(2, 3, 4)))
        show('parameters left; "–": not for this family. More: unet-surgery recipes show NAME')


@recipes.command("show")
@command
def show_recipe(name: Name, as_json: Json = False) -> None:
    """Show a recipe with extends followed, and what it leaves of its families.

    Example: unet-surgery recipes show bk_tiny
    """
    from unet_surgery.api import plan_families
    from unet_surgery.recipe import load_recipe

    recipe = load_recipe(name)
    if as_json:
        show_json(recipe.to_data())
        return
    show(recipe.to_yaml().rstrip("\n"))
    _show_families(plan_families(recipe))


@recipes.command("check")
@command
def check_recipe(file: Name) -> None:
    """Check a recipe: its keys, its selectors, and that it can be expressed for every family it names.

    Example: unet-surgery recipes check my_recipe.yaml
    """
    from unet_surgery.api import plan_families
    from unet_surgery.recipe import load_recipe

    recipe = load_recipe(file)
    plans = plan_families(recipe)
    show(f"{recipe.name}: {len(recipe.remove)} selectors, valid for {', '.join(plans)}")
    _show_families(plans)


@recipes.command("copy")
@command
def copy_recipe(name: Name, file: Annotated[Path, typer.Argument(help="The new YAML file.")]) -> None:
    """Copy a built-in recipe to a file of your own, as it is written.

    Example: unet-surgery recipes copy bk_tiny my_recipe.yaml
    """
    from unet_surgery.api import copy_recipe as copy

    copy(name, file)
    show(str(file))
    say(f"edit it, then:  unet-surgery recipes check {file}")


@recipes.command("diff")
@command
def diff_recipes(a: Name, b: Name) -> None:
    """Show what two recipes remove differently, and what each leaves.

    Example: unet-surgery recipes diff bk_small bk_tiny
    """
    from unet_surgery.api import plan_families
    from unet_surgery.graph import FAMILIES
    from unet_surgery.lower import quantity
    from unet_surgery.recipe import load_recipe

    first, second = load_recipe(a), load_recipe(b)
    for sign, selectors, other in (("-", first.remove, second.remove), ("+", second.remove, first.remove)):
        for selector in selectors:
            if selector not in other:
                show(f"{sign} {selector}")
    same = sum(selector in second.remove for selector in first.remove)
    show(f"{same} selectors in both; - is only in {a}, + only in {b}")
    plans = plan_families(first), plan_families(second)
    rows = [
        (family, *(f"{quantity(p[family].student.params)} ({_kept(p[family])})" if family in p else "–" for p in plans))
        for family in FAMILIES
        if any(family in p for p in plans)
    ]
    show(table(("family", a, b), rows, right=(1, 2)))


def _show_families(plans: dict[str, SurgeryPlan]) -> None:
    from unet_surgery.lower import quantity

    rows = [
        (family, quantity(p.student.params), _kept(p), quantity(p.student.macs), quantity(p.student.macs_all))
        for family, p in plans.items()
    ]
    show(table(("leaves", "params", "share", "MACs", "all"), rows, right=(1, 2, 3, 4)))


def _kept(plan: SurgeryPlan) -> str:
    return f"{plan.student.params / plan.teacher.params:.0%}"
