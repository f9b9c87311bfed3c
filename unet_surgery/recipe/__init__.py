"""Recipes: YAML that says what to remove, checked and located."""

from unet_surgery.recipe.load import (
    builtin_names,
    builtin_text,
    find_recipe,
    load_recipe,
    read_recipe_file,
    select,
)
from unet_surgery.recipe.nearest import nearest_for_family, nearest_for_selection
from unet_surgery.recipe.schema import Recipe

__all__ = [
    "Recipe",
    "builtin_names",
    "builtin_text",
    "find_recipe",
    "load_recipe",
    "nearest_for_family",
    "nearest_for_selection",
    "read_recipe_file",
    "select",
]
