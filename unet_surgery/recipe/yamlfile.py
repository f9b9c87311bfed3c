"""Plain YAML with positions: text → data and the line and column of every value.

Anything that makes YAML more than data is refused before a single value is built: anchors, aliases, merge keys,
tags, duplicate keys, a second document. A 426-byte alias bomb can hang whatever prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from unet_surgery.errors import RecipeError, SurgeryError, printable

__all__ = ["MAX_BYTES", "Kind", "LocatedData", "Path", "parse_yaml"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_EVENTS = 20_000  # two a value, or so: a recipe has dozens

# libyaml where PyYAML was built with it: the parser in Python takes 40 s for a hostile megabyte
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Path = tuple[str | int, ...]

_SCALARS: Mapping[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:str": str,
    "tag:yaml.org,2002:int": lambda text: int(text, 0),
    "tag:yaml.org,2002:float": float,
    "tag:yaml.org,2002:null": lambda _: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() in ("true", "yes", "on"),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What errors call a file: its name, a few of its keys, and the error that is raised."""

    name: str
    keys: str
    error: type[SurgeryError]


RECIPE = Kind("recipe", "name: and remove:", RecipeError)


@dataclass(frozen=True, slots=True)
class LocatedData:
    """The data of a YAML file and where each of its values stands."""

    data: dict[str, Any]
    file: str
    marks: Mapping[Path, tuple[int, int]]

    def where(self, path: Path) -> str:
        """Return ``file:line:column`` of the value at ``path``, or of its nearest parent."""
        while path and path not in self.marks:
            path = path[:-1]
        line, column = self.marks.get(path, (1, 1))
        return f"{self.file}:{line}:{column}"


def parse_yaml(text: str, file: str, kind: Kind = RECIPE) -> LocatedData:
    """Parse ``text``, one YAML mapping; ``file`` is the name errors use.

    Raises:
        SurgeryError: (of this kind) not YAML, not a mapping, or YAML that is more than data; with line and column.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise kind.error(f"the {kind.name} file is too large", where=file, expected="at most 1 MiB")
    try:
        _refuse_more_than_data(text, file, kind)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise kind.error(
            f"the {kind.name} is not valid YAML",
            where=f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file,
            found=printable(error.problem or "unreadable"),
            hint=None
            if error.problem is None or "alias" not in error.problem
            else "quote a selector that begins with *",
        ) from error
    except yaml.YAMLError as error:
        found = printable(str(error).partition("\n")[0])
        raise kind.error(f"the {kind.name} is not valid YAML", where=file, found=found) from error
    marks: dict[Path, tuple[int, int]] = {}
    if not isinstance(node, yaml.MappingNode):
        raise kind.error(f"the {kind.name} is not a mapping", where=f"{file}:1:1", expected=f"keys such as {kind.keys}")
    return LocatedData(_Construction(file, kind, marks).mapping(node, ()), file, marks)


def _refuse_more_than_data(text: str, file: str, kind: Kind) -> None:
    depth = documents = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        mark = event.start_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        _refuse_event(event, where, kind)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if depth > MAX_DEPTH:
            raise kind.error(
                f"the {kind.name} is nested too deeply", where=where, expected=f"at most {MAX_DEPTH} levels"
            )
        if documents > 1:
            raise kind.error(
                f"the {kind.name} holds a second YAML document", where=where, expected=f"one {kind.name} a file"
            )
        if number > MAX_EVENTS:
            raise kind.error(f"the {kind.name} has too many values", where=where, expected=f"at most {MAX_EVENTS // 2}")


def _refuse_event(event: yaml.Event, where: str, kind: Kind) -> None:
    if isinstance(event, yaml.AliasEvent):
        raise kind.error(
            f"YAML aliases are not allowed in a {kind.name}",
            where=where,
            found=f"*{printable(event.anchor)}",
            hint=f'quote it if it is a selector: "*{printable(event.anchor)}"',
        )
    for what, mark_of in (("anchors", "anchor"), ("tags", "tag")):
        found = getattr(event, mark_of, None)
        if found is not None:
            raise kind.error(f"YAML {what} are not allowed in a {kind.name}", where=where, found=printable(found))


@dataclass(frozen=True, slots=True)
class _Construction:
    """Nodes become data, and leave word of where they stood."""

    file: str
    kind: Kind
    marks: dict[Path, tuple[int, int]]

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.marks[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        make = _SCALARS.get(node.tag)
        try:
            if make is None:
                raise ValueError
            return make(node.value)
        except ValueError:
            if node.tag == "tag:yaml.org,2002:float":  # .nan, .inf
                raise self.kind.error(
                    "a number that is not finite",
                    where=f"{self.file}:{self.marks[path][0]}:{self.marks[path][1]}",
                    expected="a finite number",
                    found=printable(node.value),
                    hint="write one in digits, such as 1.0e-4",
                ) from None
            raise self.kind.error(
                "a value that is not text, a number, true, false or null",
                where=f"{self.file}:{self.marks[path][0]}:{self.marks[path][1]}",
                found=printable(node.value),
                hint=f'quote it: "{printable(node.value)}"',
            ) from None

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        self.marks[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = f"{self.file}:{key_node.start_mark.line + 1}:{key_node.start_mark.column + 1}"
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise self.kind.error(f"YAML merge keys are not allowed in a {self.kind.name}", where=where, found="<<")
            if key_node.tag != "tag:yaml.org,2002:str":
                raise self.kind.error("a key that is not text", where=where, found=printable(str(key_node.value)))
            key = key_node.value
            if key in result:
                raise self.kind.error(f"the key {printable(key)!r} stands twice", where=where, hint="keep one of them")
            result[key] = self.value(value_node, (*path, key))
            self.marks[(*path, key)] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        return result
