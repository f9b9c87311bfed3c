"""``SurgeryPlan``: everything a surgery will do, as one value that can be printed, compared, stored and replayed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from unet_surgery.errors import VerificationError, printable
from unet_surgery.graph.select import Skipped
from unet_surgery.lower.counts import Counts
from unet_surgery.lower.features import FeatureMap, FeaturePair, Tap
from unet_surgery.lower.skips import ChangedSkip

__all__ = ["PLAN_FORMAT", "Bypassed", "ConfigChange", "Part", "StoredFile", "StoredWeights", "SurgeryPlan"]

PLAN_FORMAT = "unet-surgery-plan"
FORMAT_VERSION = 1
ABSENT = "(absent)"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A safetensors file that was read: its name, size, and the sha256 of its header (length prefix included)."""

    name: str
    bytes: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The teacher's weights as they lie on disk: the files, and how many tensors of each dtype they hold."""

    files: tuple[StoredFile, ...]
    dtypes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Part:
    """A stage, the mid or the stem, by its selector in the teacher, before and after."""

    name: str
    teacher: Counts
    student: Counts


@dataclass(frozen=True, slots=True)
class Bypassed:
    """An attention removed where its stage keeps others: what stock diffusers must still hold of it."""

    attention: str
    params_left: int


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """A key of config.json that the surgery changes; ``"(absent)"`` where one side lacks it."""

    key: str
    teacher: Any
    student: Any


@dataclass(frozen=True, slots=True)
class SurgeryPlan:
    """A surgery, decided and checked. ``weights`` maps student tensor → teacher tensor (None: zeros)."""

    recipe: Mapping[str, Any]
    teacher_id: str
    teacher_commit: str | None
    teacher_variant: str | None
    family: str | None
    teacher_config: Mapping[str, Any]
    teacher_weights: StoredWeights | None
    teacher: Counts
    student_config: Mapping[str, Any]
    student: Counts
    student_bytes: int
    dtype: str | None
    """The dtype all weights are converted to; None: each tensor keeps the teacher's."""
    parts: tuple[Part, ...]
    removed: Mapping[str, str]
    skipped: tuple[Skipped, ...]
    changed_skips: tuple[ChangedSkip, ...]
    bypassed: tuple[Bypassed, ...]
    weights: Mapping[str, str | None]
    unused: Mapping[str, tuple[str, ...]]
    features: FeatureMap
    carried_keys: tuple[str, ...]

    def config_changes(self) -> tuple[ConfigChange, ...]:
        """Return the keys whose values differ, sorted."""
        before, after = self.teacher_config, self.student_config
        return tuple(
            ConfigChange(key, before.get(key, ABSENT), after.get(key, ABSENT))
            for key in sorted(before.keys() | after.keys())
            if before.get(key, ABSENT) != after.get(key, ABSENT)
        )

    def to_json(self) -> str:
        """Return the plan as JSON text, the same bytes for the same plan."""
        return json.dumps(_encode(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> SurgeryPlan:
        """Read a plan back; ``from_json(plan.to_json()) == plan``.

        Raises:
            VerificationError: the text is not a plan of this version, or contradicts itself.
        """
        return _decode(text)


def _encode(plan: SurgeryPlan) -> dict[str, Any]:
    return {
        "format": PLAN_FORMAT,
        "format_version": FORMAT_VERSION,
        "recipe": plan.recipe,
        "teacher": {
            "id": plan.teacher_id,
            "commit": plan.teacher_commit,
            "variant": plan.teacher_variant,
            "family": plan.family,
            **asdict(plan.teacher),
            "weights": None if plan.teacher_weights is None else asdict(plan.teacher_weights),
            "config": plan.teacher_config,
        },
        "student": {
            **asdict(plan.student),
            "bytes": plan.student_bytes,
            "dtype": plan.dtype,
            "config": plan.student_config,
        },
        "parts": [asdict(part) for part in plan.parts],
        "removed": plan.removed,
        "skipped": [asdict(skipped) for skipped in plan.skipped],
        "changed_skips": [asdict(skip) for skip in plan.changed_skips],
        "bypassed": [asdict(bypassed) for bypassed in plan.bypassed],
        "carried_keys": plan.carried_keys,
        "features": asdict(plan.features),
        "unused": plan.unused,
        "weights": plan.weights,
    }


def _decode(text: str) -> SurgeryPlan:
    try:
        top = _Object(json.loads(text), "plan")
    except (ValueError, RecursionError) as error:
        raise VerificationError("the plan is not JSON", found=printable(str(error))) from error
    if top.raw("format") != PLAN_FORMAT or top.raw("format_version") != FORMAT_VERSION:
        raise VerificationError(
            "this is not a plan that this version reads",
            expected=f"format {PLAN_FORMAT}, format_version {FORMAT_VERSION}",
            found=f"format {printable(top.raw('format'))}, format_version {printable(top.raw('format_version'))}",
        )
    teacher, student, features = top.object("teacher"), top.object("student"), top.object("features")
    weights = teacher.raw("weights")
    return SurgeryPlan(
        recipe=top.mapping("recipe"),
        teacher_id=teacher.text("id"),
        teacher_commit=teacher.optional_text("commit"),
        teacher_variant=teacher.optional_text("variant"),
        family=teacher.optional_text("family"),
        teacher_config=teacher.mapping("config"),
        teacher_weights=None if weights is None else _stored_weights(teacher.object("weights")),
        teacher=_counts(teacher),
        student_config=student.mapping("config"),
        student=_counts(student),
        student_bytes=student.integer("bytes"),
        dtype=student.optional_text("dtype"),
        parts=top.each(
            "parts", lambda o: Part(o.text("name"), _counts(o.object("teacher")), _counts(o.object("student")))
        ),
        removed=top.text_mapping("removed"),
        skipped=top.each("skipped", lambda o: Skipped(o.text("selector"), o.text("parent"), o.text("missing"))),
        changed_skips=top.each(
            "changed_skips", lambda o: ChangedSkip(o.text("layer"), o.text("teacher_skip"), o.text("student_skip"))
        ),
        bypassed=top.each("bypassed", lambda o: Bypassed(o.text("attention"), o.integer("params_left"))),
        weights=top.weight_map("weights"),
        unused=top.name_lists("unused"),
        features=FeatureMap(features.each("plan", _pair), features.each("bk", _pair)),
        carried_keys=top.texts("carried_keys"),
    )


def _counts(o: _Object) -> Counts:
    return Counts(o.integer("params"), o.integer("tensors"), o.integer("macs"), o.integer("macs_all"))


def _stored_weights(o: _Object) -> StoredWeights:
    files = o.each("files", lambda f: StoredFile(f.text("name"), f.integer("bytes"), f.text("header_sha256")))
    dtypes = {key: _Object(o.mapping("dtypes"), "dtypes").integer(key) for key in o.mapping("dtypes")}
    return StoredWeights(files, dtypes)


def _pair(o: _Object) -> FeaturePair:
    return FeaturePair(_tap(o.object("student")), _tap(o.object("teacher")), o.integer("channels"), o.integer("stride"))


def _tap(o: _Object) -> Tap:
    at, layout = o.text("at"), o.text("layout")
    if at not in ("input", "output"):
        raise o.wrong("at", "input or output")
    if layout not in ("image", "tokens"):
        raise o.wrong("layout", "image or tokens")
    return Tap(o.text("module"), "input" if at == "input" else "output", "image" if layout == "image" else "tokens")


class _Object:
    """Typed access to a JSON object of a plan; every refusal says where and what."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise VerificationError(
                "the plan has a wrong value", where=where, expected="an object", found=printable(value)
            )
        self._value: dict[str, Any] = value
        self._where = where

    def wrong(self, key: str, expected: str) -> VerificationError:
        found = printable(self._value[key]) if key in self._value else "no such key"
        return VerificationError(
            "the plan has a wrong value", where=f"{self._where}.{key}", expected=expected, found=found
        )

    def raw(self, key: str) -> Any:
        if key not in self._value:
            raise self.wrong(key, "a value")
        return self._value[key]

    def text(self, key: str) -> str:
        value = self.raw(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.raw(key) is None else self.text(key)

    def integer(self, key: str) -> int:
        value = self.raw(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(key, "a non-negative integer")
        return value

    def object(self, key: str) -> _Object:
        return _Object(self.raw(key), f"{self._where}.{key}")

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.raw(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.raw(key)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.wrong(key, "a list of strings")
        return tuple(value)

    def text_mapping(self, key: str) -> dict[str, str]:
        value = self.mapping(key)
        if not all(isinstance(v, str) for v in value.values()):
            raise self.wrong(key, "an object of strings")
        return value

    def weight_map(self, key: str) -> dict[str, str | None]:
        value = self.mapping(key)
        if not all(v is None or isinstance(v, str) for v in value.values()):
            raise self.wrong(key, "an object of teacher tensor names and nulls")
        return value

    def name_lists(self, key: str) -> dict[str, tuple[str, ...]]:
        inner = _Object(self.mapping(key), f"{self._where}.{key}")
        return {name: inner.texts(name) for name in self.mapping(key)}

    def each(self, key: str, decode: Callable[[_Object], T]) -> tuple[T, ...]:
        value = self.raw(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        return tuple(decode(_Object(item, f"{self._where}.{key}[{i}]")) for i, item in enumerate(value))
