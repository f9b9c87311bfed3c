"""``Recipe``: what to remove, as a checked value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from unet_surgery.errors import RecipeError, SelectorError, printable
from unet_surgery.graph import FAMILIES
from unet_surgery.graph.select import parse_selector

__all__ = ["Recipe"]


NOTHING_TO_DO = "a recipe needs remove: or extends:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, (list, tuple, type(None))):
        raise ValueError("a list, one entry a line")  # noqa: TRY004  # pydantic lets TypeError through
    return value


def _named(value: Any) -> Any:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError("letters, digits and _ . - only, 64 at most: it becomes part of a folder's name")
    return value


def _selector(value: Any) -> Any:
    if isinstance(value, (int, float, bool)) or value is None:
        raise ValueError(f"a selector, which is text; quote it: {str(value).lower()!r}")
    if isinstance(value, str):
        try:
            parse_selector(value)
        except SelectorError as error:
            raise ValueError(str(error)) from error
    return value


Selector = Annotated[str, BeforeValidator(_selector)]


class Recipe(BaseModel):
    """A set of nodes to remove from a teacher.

    Only ``name`` and one of ``extends`` and ``remove`` are required. A recipe without ``families``
    serves any U-Net on which its selectors resolve. :func:`unet_surgery.load_recipe` returns recipes with
    ``extends`` already followed; one made in Python must list all it removes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    name: Annotated[str, BeforeValidator(_named)]
    """Letters, digits and ``_ . -``; it becomes part of the output folder's name."""
    summary: Annotated[str, Field(max_length=500)] = ""
    teacher: Annotated[str, Field(min_length=1, max_length=300)] | None = None
    """The default teacher: a Hub id ``org/name``, a folder, or a built-in name."""
    families: Annotated[tuple[str, ...], BeforeValidator(_listed)] | None = None
    extends: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Recipes whose removals are added: names, or paths relative to this file."""
    remove: Annotated[tuple[Selector, ...], BeforeValidator(_listed)] = ()
    """Selectors, in the teacher's numbering."""
    allow_skip_change: bool = False
    """Let up stages lose their first or last layer, where shapes fit."""
    citation: Annotated[str, Field(max_length=2000)] | None = None

    _origins: tuple[str, ...] = PrivateAttr(default=())
    _families_origin: str | None = PrivateAttr(default=None)

    @field_validator("families")
    @classmethod
    def _known_families(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            if name not in FAMILIES:
                raise ValueError(f"unknown family {name!r}; there are {', '.join(FAMILIES)}")
        if value is not None and not value:
            raise ValueError("an empty list serves nothing; leave the key out to serve every family")
        return value

    def __init__(self, **values: Any) -> None:
        """Check ``values``.

        Raises:
            RecipeError: a key is unknown or has a wrong value.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _explain(error, values) from error

    def model_post_init(self, _context: Any) -> None:
        if not self.remove and not self.extends:
            raise ValueError(NOTHING_TO_DO)

    def located(self, origins: tuple[str, ...], families_origin: str) -> Recipe:
        """Return the recipe with the places its removals and families were written at."""
        copy = self.model_copy()
        copy._origins = origins
        copy._families_origin = families_origin
        return copy

    def origin(self, index: int) -> str:
        """Return ``file:line:column`` of ``remove[index]``; the recipe's name where it was made in Python."""
        return self._origins[index] if index < len(self._origins) else f"recipe {self.name}, remove[{index}]"

    @property
    def families_origin(self) -> str:
        """Where ``families`` is written, for errors."""
        return self._families_origin or f"recipe {self.name}"

    def to_data(self) -> dict[str, Any]:
        """Return the recipe as plain JSON data, without what is empty."""
        data = self.model_dump(mode="json")
        return {key: value for key, value in data.items() if value not in (None, "", [], False)}

    def to_yaml(self) -> str:
        """Return the recipe as a YAML file."""
        return yaml.safe_dump(self.to_data(), sort_keys=False, allow_unicode=True, width=100)


def _explain(error: ValidationError, data: Mapping[str, Any]) -> RecipeError:
    """Turn pydantic's first finding into one message that knows its path."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = tuple(part for part in first["loc"] if isinstance(part, (str, int)))
    key = str(path[0]) if path else ""
    result = (_wrong_selector(data, path) if key == "remove" else None) or _wrong_value(
        key, first["type"], first["msg"], data.get(key)
    )
    result.path = path
    return result


def _wrong_value(key: str, kind: str, message: str, found: object) -> RecipeError:
    if kind == "extra_forbidden":
        close = get_close_matches(key, Recipe.model_fields, n=1, cutoff=0.5)
        return RecipeError(
            f"the recipe has an unknown key {printable(key)!r}",
            expected=", ".join(Recipe.model_fields),
            hint=f"did you mean {close[0]!r}?" if close else "remove the key",
        )
    if kind == "missing":
        return RecipeError(f"the recipe has no {key!r}", hint=f"add {key}: …")
    message = message.removeprefix("Value error, ")
    if not key:
        return RecipeError(message, hint="list selectors under remove:, or name a recipe after extends:")
    return RecipeError(f"the recipe's {key!r} is wrong", expected=message, found=printable(found))


def _wrong_selector(data: Mapping[str, Any], path: tuple[str | int, ...]) -> SelectorError | None:
    """Return what is wrong with the selector at ``path``, or None where it is not even text."""
    removals = data["remove"]
    listed = len(path) > 1 and isinstance(removals, (list, tuple))
    text = removals[int(path[1])] if listed else removals
    try:
        if isinstance(text, str):
            parse_selector(text)
    except SelectorError as error:
        return error
    return None
