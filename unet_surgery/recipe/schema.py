"""``Recipe``: what to remove, as a checked value."""

from __future__ import annotations

from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator

from unet_surgery.errors import SelectorError
from unet_surgery.graph import FAMILIES
from unet_surgery.graph.select import parse_selector

__all__ = ["Recipe"]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _selector(value: Any) -> Any:
    if isinstance(value, (int, float, bool)) or value is None:
        raise ValueError(f"a selector is text; quote it: {str(value).lower()!r}")
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

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
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

    def model_post_init(self, _context: Any) -> None:
        if not self.remove and not self.extends:
            raise ValueError("a recipe needs remove: or extends:")

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
