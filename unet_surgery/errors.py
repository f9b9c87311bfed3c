"""The exception tree: every error a caller can meet, and the exit code the command line gives it.

    SurgeryError                    1   the job failed
    ├── UsageError                  2   an argument has a wrong value
    ├── RunError                    2   a run file is wrong, or does not continue the run it is used on
    ├── RecipeError                 2   a recipe file or name is wrong
    │   ├── SelectorError           2   a selector has a bad form, or names nothing in this teacher
    │   ├── FamilyError             2   the recipe is not for this kind of U-Net
    │   └── InexpressibleError      2   stock diffusers has no config for the student
    ├── TeacherError                3   the teacher cannot be used
    │   ├── ConfigError             3   a key of config.json is missing, wrong or not modelled
    │   ├── ContainerError          3   a safetensors file is damaged or something else
    │   └── WeightsMismatchError    3   tensors contradict config.json
    ├── DataError                   3   training data cannot be used
    ├── TrainingError               1   a training run cannot go on
    ├── OutputError                 4   the output cannot be written
    │   └── OutputBusyError         4   another process is writing the output
    ├── HubError                    5   the Hugging Face Hub, or another server, cannot be reached or refuses
    ├── VerificationError           6   a student is not what its plan says
    └── MissingExtraError           1   an optional dependency is not installed

Every error answers the same questions: *what* went wrong, *where*, what was *expected*, what was
*found*, and what to do next (*hint*). They are fields, so a caller can act on them, and ``str(error)``
is the message the command line shows.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from typing import Self

__all__ = [
    "ConfigError",
    "ContainerError",
    "DataError",
    "FamilyError",
    "HubError",
    "InexpressibleError",
    "MissingExtraError",
    "OutputBusyError",
    "OutputError",
    "RecipeError",
    "RunError",
    "SelectorError",
    "SurgeryError",
    "TeacherError",
    "TrainingError",
    "UsageError",
    "VerificationError",
    "WeightsMismatchError",
    "brief",
    "escaped",
    "first_few",
    "printable",
]

MAX_QUOTED_CHARS = 200
MAX_NAMES = 4

_SHA256 = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")

_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 40
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = MAX_QUOTED_CHARS


def printable(value: object) -> str:
    """Return ``value`` as one line that is safe to print: control characters escaped, 200 characters at most."""
    text = value if isinstance(value, str) else _REPR.repr(value)
    text = escaped(text[: MAX_QUOTED_CHARS + 1])  # what is cut away need not be looked at: it may be megabytes
    return text if len(text) <= MAX_QUOTED_CHARS else text[: MAX_QUOTED_CHARS - 1] + "…"


def brief(value: object) -> str:
    """Return ``value`` as :func:`printable` does, of each SHA-256 in it the first twelve digits."""
    return printable(_SHA256.sub(r"\1…", value if isinstance(value, str) else _REPR.repr(value)))


def escaped(text: str, *, keep: str = "") -> str:
    """Return ``text`` with every character that is not printable, and not in ``keep``, as JSON escapes it."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else json.dumps(c)[1:-1] for c in text)


def first_few(names: Sequence[str]) -> str:
    """Return the first four names, safe to print, and how many more there are."""
    shown = ", ".join(printable(name) for name in names[:MAX_NAMES])
    return shown + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")


def _safe(text: str) -> str:
    """Nothing that a file says may move the cursor or begin a line of its own, wherever it got into a message."""
    return escaped(text, keep="\n").replace("\n", "\n            ")


class SurgeryError(Exception):
    """Something the user can understand and act on; see the module's docstring for the tree."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.hint = hint

    def __str__(self) -> str:
        lines = [_safe(self.what)]
        for label, value in (
            ("where", self.where),
            ("expected", self.expected),
            ("found", self.found),
            ("try", self.hint),
        ):
            if value is not None:
                lines.append(f"  {label + ':':<10}{_safe(value)}")
        return "\n".join(lines)

    def at(self, where: str) -> Self:
        """Fill in ``where`` if it is still empty and return the error itself, ready to be raised again."""
        if self.where is None:
            self.where = where
        return self


class UsageError(SurgeryError):
    """An argument has a value that it cannot have."""

    exit_code = 2


class RunError(SurgeryError):
    """A run file cannot be read, says something that makes no sense, or does not continue the run it is used on.

    ``path`` leads to the wrong value in the file's data, such as ``("objectives", "feature_kd", "weight")``.
    """

    exit_code = 2
    path: tuple[str | int, ...] = ()


class RecipeError(SurgeryError):
    """A recipe file cannot be read, or says something that makes no sense.

    ``path`` leads to the wrong value in the recipe's data, such as ``("remove", 2)``.
    """

    exit_code = 2
    path: tuple[str | int, ...] = ()


class SelectorError(RecipeError):
    """A selector has a bad form, or names nothing in this teacher."""


class FamilyError(RecipeError):
    """A recipe was used on a kind of U-Net that it is not for."""


class InexpressibleError(RecipeError):
    """No config of stock ``UNet2DConditionModel`` describes the student that the recipe asks for.

    ``about`` holds the teacher's module paths that the refusal is about, the likeliest culprit first.
    """

    def __init__(self, what: str, *, about: tuple[str, ...] = (), **fields: str | None) -> None:
        super().__init__(what, **fields)
        self.about = about


class TeacherError(SurgeryError):
    """The teacher cannot be found or used."""

    exit_code = 3


class ConfigError(TeacherError):
    """A key of the U-Net's config.json is missing, has a wrong value, or holds what is not modelled."""


class ContainerError(TeacherError):
    """A file is not the safetensors file that it should be."""


class WeightsMismatchError(TeacherError):
    """The tensors of the weights contradict config.json."""


class DataError(SurgeryError):
    """Training data cannot be used: it is missing, broken beyond the stated share, or made for other models."""

    exit_code = 3


class TrainingError(SurgeryError):
    """A training run cannot go on: its losses are not finite, its memory is spent, or its state is lost."""


class OutputError(SurgeryError):
    """The output cannot be written; nothing was left at its path."""

    exit_code = 4


class OutputBusyError(OutputError):
    """Another process is writing the same output."""


class HubError(SurgeryError):
    """The Hugging Face Hub, or another server that has data, cannot be reached or refuses."""

    exit_code = 5


class VerificationError(SurgeryError):
    """A student folder is not what its plan says."""

    exit_code = 6


class MissingExtraError(SurgeryError):
    """A command needs an optional dependency that is not installed."""
