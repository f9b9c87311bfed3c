"""Loading recipes: built-in names and files, ``extends`` followed, every removal knowing its line."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from unet_surgery.errors import RecipeError, SurgeryError, printable
from unet_surgery.graph import FAMILIES, Selection, Skipped, UNetGraph, resolve
from unet_surgery.recipe.schema import Recipe
from unet_surgery.recipe.yamlfile import MAX_BYTES, LocatedData, parse_yaml

__all__ = ["builtin_names", "builtin_text", "find_recipe", "load_recipe", "read_recipe_file", "select"]

SUFFIXES = (".yaml", ".yml")
MAX_CHAIN = 20


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Return the built-in recipe of this name, or the one in this YAML file, with ``extends`` followed.

    The result has no ``extends``: its ``remove`` is the union, bases first.

    Raises:
        RecipeError: no such recipe or file, wrong YAML, a wrong key or value (with line, column and the
            nearest valid spelling), or recipes that extend each other in a circle.
    """
    return _follow(find_recipe(name_or_path), (), {})


def builtin_names() -> list[str]:
    """Return the names of the built-in recipes, sorted."""
    return sorted(path.stem for path in _builtin_folder().iterdir() if path.suffix in SUFFIXES)


def builtin_text(name: str) -> str:
    """Return the YAML of a built-in recipe as it was written.

    Raises:
        RecipeError: there is no built-in recipe of this name.
    """
    return _find_builtin(name).read_text("utf-8")


def find_recipe(name_or_path: str | Path, relative_to: Path | None = None) -> Path:
    """Return the file of a built-in recipe or of a path; a path is what has a separator or ends in .yaml."""
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith(SUFFIXES):
        path = Path(os.path.expanduser(text))
        if relative_to is not None and not path.is_absolute():
            path = relative_to / path
        if not path.is_file():
            what = "is not a file" if os.path.lexists(path) else "does not exist"
            raise RecipeError(
                f"the recipe file {printable(text)} {what}",
                hint="built-in recipes are named without .yaml: " + ", ".join(builtin_names()),
            )
        return path
    return _find_builtin(text)


def _find_builtin(text: str) -> Path:
    if text not in builtin_names():
        close = get_close_matches(text, builtin_names(), n=1)
        raise RecipeError(
            f"there is no built-in recipe {printable(text)!r}",
            expected=", ".join(builtin_names()),
            hint=f"did you mean {close[0]!r}?" if close else "give a path ending in .yaml for a file of your own",
        )
    return _builtin_folder() / f"{text}.yaml"


def read_recipe_file(path: Path) -> tuple[Recipe, LocatedData]:
    """Return one file's recipe as it is written, ``extends`` not followed, and where its values stand."""
    shown = f"recipes/{path.name}" if path.parent == _builtin_folder() else str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8", "strict" if len(data) <= MAX_BYTES else "replace")  # parsing refuses the size
    except OSError as error:
        raise RecipeError("the recipe file cannot be read", where=shown, found=error.strerror) from error
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is none"
        raise RecipeError("the recipe file cannot be read as UTF-8 text", where=shown, found=found) from error
    located = parse_yaml(text, shown)
    try:
        return Recipe(**located.data), located
    except RecipeError as error:
        raise error.at(located.where(error.path)) from error.__cause__


def select(recipe: Recipe, graph: UNetGraph) -> Selection:
    """Resolve the recipe's selectors against ``graph``.

    Raises:
        SelectorError: a selector names nothing here; ``where`` is its file and line.
    """
    nodes: dict[str, str] = {}
    skipped: list[Skipped] = []
    for i, selector in enumerate(recipe.remove):
        try:
            part = resolve(graph, [selector])
        except SurgeryError as error:
            raise error.at(recipe.origin(i)) from None
        for path, text in part.nodes.items():
            nodes.setdefault(path, text)
        skipped.extend(part.skipped)
    return Selection(nodes, tuple(skipped))


def _builtin_folder() -> Path:
    """The wheel ships the recipes inside the package; a checkout has them beside it."""
    package = Path(str(importlib.resources.files("unet_surgery")))
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def _follow(path: Path, above: tuple[Path, ...], known: dict[Path, Recipe]) -> Recipe:
    """Return the recipe in ``path`` with its bases' removals; ``known`` holds what was followed already."""
    real = path.resolve()
    if real in known:  # read once, however often it is extended: each of thirty files may name the next one twice
        return known[real]
    recipe, located = read_recipe_file(path)
    if real in above:
        circle = " → ".join(p.name for p in (*above[above.index(real) :], real))
        raise RecipeError("recipes extend each other in a circle", where=located.where(("extends",)), found=circle)
    if len(above) >= MAX_CHAIN:
        raise RecipeError("recipes extend each other too deeply", where=located.file, expected=f"at most {MAX_CHAIN}")
    bases = []
    for i, base in enumerate(recipe.extends):
        try:
            bases.append(_follow(find_recipe(base, relative_to=path.parent), (*above, real), known))
        except RecipeError as error:
            raise error.at(located.where(("extends", i))) from None
    known[real] = _union(recipe, located, bases)
    return known[real]


def _union(recipe: Recipe, located: LocatedData, bases: Sequence[Recipe]) -> Recipe:
    removals: dict[str, str] = {}
    for base in bases:
        for i, selector in enumerate(base.remove):
            removals.setdefault(selector, base.origin(i))
    for i, selector in enumerate(recipe.remove):
        removals.setdefault(selector, located.where(("remove", i)))
    given = recipe.model_fields_set
    inherited: dict[str, Any] = {"extends": (), "remove": tuple(removals)}
    if "teacher" not in given:
        inherited["teacher"] = next((base.teacher for base in bases if base.teacher), None)
    if "families" not in given:
        inherited["families"] = _common_families(bases, located)
    if "allow_skip_change" not in given:
        inherited["allow_skip_change"] = any(base.allow_skip_change for base in bases)
    result = recipe.model_copy(update=inherited)
    return result.located(tuple(removals.values()), located.where(("families",)))


def _common_families(bases: Sequence[Recipe], located: LocatedData) -> tuple[str, ...] | None:
    limits = [set(base.families) for base in bases if base.families is not None]
    if not limits:
        return None
    common = tuple(family for family in FAMILIES if all(family in limit for limit in limits))
    if not common:
        raise RecipeError(
            "the extended recipes have no family in common",
            where=located.where(("extends",)),
            found="; ".join(f"{base.name}: {', '.join(base.families or FAMILIES)}" for base in bases),
            hint="write families: if you know that all of them resolve",
        )
    return common
