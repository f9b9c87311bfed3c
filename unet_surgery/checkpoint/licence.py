"""The licence a student inherits: named by its teacher's card, and its text, which must travel with the files.

Texts come from the teacher's folder. Where it has none, the three licences of Stable Diffusion, and Apache's, are at
hand in ``_licences``: verbatim, as each of them demands of who passes a model on.
"""

from __future__ import annotations

import importlib.resources
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unet_surgery.checkpoint.components import check_inside
from unet_surgery.checkpoint.foreign import recognise
from unet_surgery.checkpoint.jsonfile import read_regular
from unet_surgery.errors import TeacherError, UsageError, printable

__all__ = ["CARD", "Licence", "card_licence", "find_licence", "is_licence_file"]

log = logging.getLogger(__name__)

CARD = "README.md"
LICENCE_FILE = "LICENSE"
MAX_BYTES = 1 << 20
MAX_EVENTS = 20_000
MAX_FILES = 8
_KEYS = ("license", "license_name", "license_link", "pipeline_tag")
_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_FILE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|USE[-_ ]?(POLICY|RESTRICTIONS))([-_. ][\w. -]*)?", re.IGNORECASE)
_TEXT = re.compile(r"(LICEN[CS]E|COPYING)", re.IGNORECASE)
_RESTRICTIONS = re.compile(r"^[ \t]*Attachment A\s+Use Restrictions\s", re.MULTILINE)
_NOTHING = ("", "~", "null", "none", "no", "unknown")

# Hub identifier, family (None: all others) → the file in _licences
_TEXTS = {
    ("creativeml-openrail-m", None): "creativeml-openrail-m.txt",
    ("openrail++", None): "openrail++.txt",
    ("openrail++", "sdxl"): "openrail++-sdxl.txt",
    ("apache-2.0", None): "apache-2.0.txt",
}


@dataclass(frozen=True, slots=True)
class Licence:
    """What is known of it. ``id`` is the Hub's identifier, None where nobody named one; ``files`` are name → text.

    ``task`` is the teacher's ``pipeline_tag``, which its card is read for as well.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    task: str | None = None

    @property
    def restrictions(self) -> str | None:
        """The use restrictions of an OpenRAIL licence, word for word; None where its text has none."""
        for text in self.files.values():
            if (match := _RESTRICTIONS.search(text)) is not None:
                return text[match.end() :].strip()
        return None

    @property
    def is_known(self) -> bool:
        """True if the text with the restrictions is one that this package brings, and no stranger's."""
        return any(text in _known_texts() for text in self.files.values() if _RESTRICTIONS.search(text))


def find_licence(root: Path | None, *, family: str | None, given: str | None = None) -> Licence:
    """Return the licence of the teacher whose card is in ``root`` (None: it has none).

    ``given`` names it where the card does not.

    Raises:
        UsageError: ``given`` is no identifier, or contradicts the teacher's card.
    """
    if given is not None and not _ID.fullmatch(given):
        raise UsageError(
            "this is not a licence's identifier",
            expected="one as the Hub writes them, such as creativeml-openrail-m",
            found=printable(given),
        )
    card = {} if root is None else _read_card(root / CARD)
    named = card.get("license")
    if named is not None and named.lower() in _NOTHING:
        named = None
    if named is not None and not _ID.fullmatch(named):
        log.warning("the teacher's card names a licence that is no identifier: %s", printable(named))
        named = None
    if given is not None and named not in (None, given):
        raise UsageError(
            "the teacher's card names another licence, and a student carries its teacher's",
            where=str(root and root / CARD),
            expected=named,
            found=given,
            hint="leave --license out",
        )
    identifier = named or given
    files = {} if root is None else _files(root)
    if not any(_TEXT.match(name) for name in files):  # a NOTICE is no licence
        files |= _bundled_text(identifier, family)
    return Licence(identifier, card.get("license_name"), card.get("license_link"), files, card.get("pipeline_tag"))


def card_licence(folder: Path) -> str | None:
    """Return the licence that the card in ``folder`` names in its metadata, None where it names none."""
    named = _read_card(folder / CARD, "the card").get("license")
    return named if named is not None and _ID.fullmatch(named) and named not in _NOTHING else None


def is_licence_file(name: str) -> bool:
    """True for the names under which licence texts and notices travel."""
    return _FILE.fullmatch(name) is not None


def _read_card(path: Path, whose: str = "the teacher's card") -> dict[str, str]:
    """Return what the card's metadata says under the keys that matter here; a card that cannot be read says nothing."""
    if not os.path.lexists(path):
        return {}
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
        if not text.startswith("---\n"):
            return {}
        found = _top_level(text[4:].partition("\n---")[0])
    except (TeacherError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        log.warning("%s cannot be read, so its licence is unknown: %s", whose, printable(_first_line(error)))
        return {}
    return {key: found[key] for key in _KEYS if key in found}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _top_level(text: str) -> dict[str, str]:
    """Return the top-level keys of a YAML mapping whose values are text, or lists of one text; nothing is constructed.

    Cards hold dates, anchors and whatever else people write, so this is no place to be strict; but nothing in them is
    ever built, and their number is bounded.
    """
    found: dict[str, str] = {}
    depth, key = 0, None
    values: list[str] = []
    for event in _events(text):
        if isinstance(event, yaml.SequenceStartEvent) and depth == 0:
            return {}  # a list is no metadata
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            if depth == 1 and key is not None:
                found |= {key: values[0]} if len(values) == 1 else {}
                key, values = None, []
        elif isinstance(event, (yaml.ScalarEvent, yaml.AliasEvent)) and depth == 1:
            value = event.value if isinstance(event, yaml.ScalarEvent) else ""  # what an alias stands for is not known
            if key is None:
                key = value
            else:
                found[key], key = value, None
        elif isinstance(event, yaml.ScalarEvent) and depth == 2:
            values.append(event.value)
    return found


def _events(text: str) -> Iterator[yaml.Event]:
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for number, event in enumerate(yaml.parse(text, Loader=loader)):
        if number > MAX_EVENTS:
            raise ValueError("too many values")
        if getattr(event, "tag", None) is not None:
            raise ValueError("YAML tags")
        yield event


def _files(root: Path) -> dict[str, str]:
    files: dict[str, str] = {}
    for name in sorted(name for name in os.listdir(root) if is_licence_file(name))[:MAX_FILES]:
        path = root / name
        try:
            if stat.S_ISDIR(path.stat().st_mode):
                continue
            check_inside(root, path)
            data = read_regular(path, MAX_BYTES)
            if (what := recognise(data[:64], len(data))) is not None:
                raise ValueError(what)
            if data.strip():
                files[name] = data.decode("utf-8")
        except (OSError, TeacherError, ValueError) as error:
            log.warning("the teacher's %s cannot be carried along: %s", printable(name), printable(_first_line(error)))
    return files


def _known_texts() -> set[str]:
    folder = Path(str(importlib.resources.files("unet_surgery"))) / "_licences"
    return {(folder / name).read_text("utf-8") for name in _TEXTS.values()}


def _bundled_text(identifier: str | None, family: str | None) -> dict[str, str]:
    name = _TEXTS.get((identifier or "", family)) or _TEXTS.get((identifier or "", None))
    if name is None:
        return {}
    folder = Path(str(importlib.resources.files("unet_surgery"))) / "_licences"
    return {LICENCE_FILE: (folder / name).read_text("utf-8")}
