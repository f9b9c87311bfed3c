"""What a latent cache will consist of, decided before anything is encoded; and what its cache.json says afterwards.

A shard is a fixed range of the source's samples, so it holds the same whichever process writes it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from unet_surgery.data.reasons import Reason
from unet_surgery.errors import DataError, OutputError, UsageError, brief, printable

__all__ = [
    "FORMAT",
    "BadSample",
    "CacheFacts",
    "CacheSettings",
    "Part",
    "ShardFacts",
    "check_same",
    "check_share",
    "shard_name",
    "shard_ranges",
]

FORMAT = 1
EXAMPLES = 3
_SHARD = re.compile(r"data-\d{5,}-of-\d{5,}\.arrow")


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """All that decides what a cache holds, rounding apart; a run with others does not continue it.

    ``moments_shape`` is [2C, h, w]; ``vae``, ``tokenizer`` and ``source`` are hashes of contents. ``filter`` left
    ``num_left_out`` of the source's samples out: they are none of ``num_samples``.
    """

    resolution: int
    flip: bool
    dtype: str
    num_samples: int
    shard_samples: int
    caption_column: str
    moments_shape: tuple[int, int, int]
    num_tokens: int
    scaling_factor: float
    vae: str
    tokenizer: str
    source: str
    format: int = FORMAT
    filter: tuple[str, ...] = ()
    num_left_out: int = 0

    @property
    def row_values(self) -> int:
        channels, height, width = self.moments_shape
        return channels * height * width

    @property
    def row_bytes(self) -> int:
        """Roughly what a sample takes on the disk."""
        return self.row_values * 2 * (1 + self.flip) + 4 * self.num_tokens + 150

    def to_json(self) -> dict[str, Any]:
        data = {**asdict(self), "moments_shape": list(self.moments_shape), "filter": list(self.filter)}
        if not self.filter:  # as it was before there were filters
            del data["filter"], data["num_left_out"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheSettings:
        """Raises KeyError, TypeError or ValueError for what was not written by ``to_json``."""
        channels, height, width = (int(n) for n in data["moments_shape"])
        conditions = data.get("filter", [])
        if not isinstance(conditions, list) or not all(isinstance(text, str) for text in conditions):
            raise ValueError(f"filter {conditions!r} is no list of texts")
        return cls(**{**data, "moments_shape": (channels, height, width), "filter": tuple(conditions)})


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that was left out."""

    id: str
    reason: Reason
    found: str | None


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """A finished shard, and what was left out of it."""

    rows: int
    num_bytes: int
    sha256: str
    bad: tuple[BadSample, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShardFacts:
        return cls(**{**data, "bad": tuple(BadSample(**entry) for entry in data["bad"])})


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What cache.json says. ``shards`` are those that hold rows, by name; ``examples`` the first ids of each reason."""

    settings: CacheSettings
    count: int
    empty_ids: tuple[int, ...]
    teacher: Mapping[str, str | None]
    shards: Mapping[str, ShardFacts]
    bad: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        shards = {
            name: {"rows": shard.rows, "num_bytes": shard.num_bytes, "sha256": shard.sha256}
            for name, shard in self.shards.items()
        }
        return {
            "settings": self.settings.to_json(),
            "count": self.count,
            "empty_ids": list(self.empty_ids),
            "teacher": dict(self.teacher),
            "shards": shards,
            "bad": dict(self.bad),
            "examples": {reason: list(ids) for reason, ids in self.examples.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheFacts:
        """Raises KeyError, TypeError, ValueError or AttributeError for what was not written by ``to_json``."""
        shards = {
            name: ShardFacts(int(shard["rows"]), int(shard["num_bytes"]), str(shard["sha256"]))
            for name, shard in data["shards"].items()
        }
        facts = cls(
            CacheSettings.from_json(data["settings"]),
            int(data["count"]),
            tuple(int(i) for i in data["empty_ids"]),
            dict(data["teacher"]),
            shards,
            dict(data["bad"]),
            dict(data["examples"]),
        )
        if facts.count != sum(shard.rows for shard in shards.values()):
            raise ValueError(f"count {facts.count} is not the sum of the shards' rows")
        if len(facts.empty_ids) != facts.settings.num_tokens:
            raise ValueError(f"{len(facts.empty_ids)} empty_ids in place of {facts.settings.num_tokens}")
        if wrong := next((name for name in shards if not _SHARD.fullmatch(name)), None):
            raise ValueError(f"{wrong!r} is no shard's name")
        return facts

    @classmethod
    def of(
        cls,
        settings: CacheSettings,
        empty_ids: Sequence[int],
        teacher: Mapping[str, str | None],
        shards: Mapping[str, ShardFacts],
    ) -> CacheFacts:
        """Sum up the finished shards."""
        left_out = [bad for shard in shards.values() for bad in shard.bad]
        counts = Counter(bad.reason for bad in left_out)
        examples: dict[str, Sequence[str]] = {
            reason: [printable(bad.id) for bad in left_out if bad.reason == reason][:EXAMPLES]
            for reason in sorted(counts)
        }
        return cls(
            settings,
            sum(shard.rows for shard in shards.values()),
            tuple(empty_ids),
            teacher,
            {name: shard for name, shard in shards.items() if shard.rows},
            dict(sorted(counts.items())),
            examples,
        )


@dataclass(frozen=True, slots=True)
class Part:
    """One of ``count`` processes that share the work, counted from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(
                "there is no such part", expected=f"1 to {self.count}", found=f"{self.index + 1} of {self.count}"
            )

    def shards(self, num_shards: int) -> range:
        """Return the shards that this part writes."""
        return range(self.index, num_shards, self.count)

    def split(self, index: int, count: int) -> Part:
        """Return one of ``count`` parts of this part."""
        return Part(self.index + index * self.count, self.count * count)


def shard_ranges(num_samples: int, shard_samples: int) -> list[range]:
    """Return which samples each shard is made of."""
    starts = range(0, num_samples, shard_samples)
    return [range(start, min(start + shard_samples, num_samples)) for start in starts]


def shard_name(index: int, num_shards: int) -> str:
    """Return a shard's file name, as ``datasets`` names them."""
    return f"data-{index:05d}-of-{num_shards:05d}.arrow"


def check_same(there: CacheSettings, wanted: CacheSettings, where: str) -> None:
    """Raise OutputError, naming the keys, if a cache was begun with other settings."""
    old, new = there.to_json(), wanted.to_json()
    absent = {"filter": "none", "num_left_out": 0}
    old, new = absent | old, absent | new
    keys = [key for key in new if old[key] != new[key]]
    if keys:
        raise OutputError(
            "this folder holds a cache that was begun with other settings",
            where=where,
            expected="; ".join(f"{key} {brief(old[key])}" for key in keys),
            found="; ".join(f"{key} {brief(new[key])}" for key in keys),
            hint="choose another --out, or the same settings as before",
        )


def check_share(bad: Mapping[str, int], num_samples: int, max_bad: float, where: str) -> None:
    """Raise DataError if more than ``max_bad`` of all samples are known to be bad, whatever is still to come."""
    count = sum(bad.values())
    if count > max_bad * num_samples:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(bad.items(), key=lambda item: (-item[1], item[0])))
        raise DataError(
            "too many samples cannot be used",
            where=where,
            expected=f"at most {max_bad:.2%} of {num_samples}",
            found=f"{count} so far: {reasons}",
            hint="repair the data, or allow more with --max-bad (in a run file: max_bad)",
        )
