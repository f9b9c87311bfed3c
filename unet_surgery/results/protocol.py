"""Which numbers may be compared: those whose pictures were drawn, and measured, in the same way.

What names a file, a machine or a version is left out; what a model brings itself (its kind of prediction, its noise
schedule) is its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from unet_surgery.checkpoint.drawing import sampler_options
from unet_surgery.evaluate.metrics import METRICS
from unet_surgery.evaluate.published import PROTOCOL
from unet_surgery.results.formats import Generation, Images, Score

__all__ = [
    "LOWER_IS_BETTER",
    "NAMES",
    "Setting",
    "changed",
    "drawn_as",
    "identity",
    "in_words",
    "measured_as",
    "unlike_published",
]

SAID = ("timestep_spacing", "algorithm_type", "solver_order", "use_karras_sigmas", "eta")
"""Options of a sampler that are said of each table; the others are where they differ."""
OPTION = "sampler option "
"""What the names of a sampler's options begin with, so that they are no other setting's."""
HASH_DIGITS = 8
UNKNOWN = "not recorded"
FORMS = {
    "pictures": "{} pictures",
    "size": "{} pixels",
    "scheduler": "{}",
    "steps": "{} steps",
    "noise": "{} noise",
    "implementation": "{}",
    "resize": "{}",
    "reference": "against {}",
}
"""How a setting's value is said where its name before it would not do."""

NAMES: Mapping[str, str] = {metric.name: metric.label for metric in METRICS.values()}
LOWER_IS_BETTER: Mapping[str, bool] = {
    name: metric.lower_is_better for metric in METRICS.values() for name in (metric.name, metric.general)
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A value in words, and what must be equal where it is the same: a hash, where there is one.

    ``quiet`` is one that is said only where it differs.
    """

    words: str
    identity: str
    quiet: bool = False


def drawn_as(images: Images | Generation) -> dict[str, Setting]:
    """Return name → setting of all that decides how pictures were drawn."""
    count = images.count if isinstance(images, Images) else images.images
    told = _plain({"pictures": UNKNOWN if count is None else f"{count:,}", "size": f"{images.width}×{images.height}"})
    generation = images.generation if isinstance(images, Images) else images
    if generation is None:
        return told | _plain({"how they were drawn": UNKNOWN})
    drawn = (generation.drawn_width or images.width, generation.drawn_height or images.height)
    told["prompts"] = _named(generation.prompts.name, generation.prompts.sha256)
    for name, value in (("drawn from", generation.init), ("masks", generation.masks)):
        if value is not None:
            told[name] = Setting("pictures", str(value))
    told |= _plain({"scheduler": generation.scheduler.class_name.removesuffix("Scheduler")})
    for name, value in sampler_options(generation.scheduler.options).items():
        told[f"{OPTION}{name}"] = Setting(str(value), str(value), quiet=name not in SAID)
    return told | _plain(
        {
            "steps": str(generation.steps),
            "guidance": f"{generation.guidance:g}",
            "seed": str(generation.seed),
            "noise": generation.seeding or "keyed",
            "stream": _stream(generation),
            "negative prompt": generation.negative,
            "drawn at": "" if drawn == (images.width, images.height) else f"{drawn[0]}×{drawn[1]}",
            "resized by": generation.resize or "",
            "JPEG": "" if generation.jpeg is None else f"quality {generation.jpeg}",
            "strength": "" if generation.strength is None else f"{generation.strength:g}",
        }
    )


def measured_as(score: Score) -> dict[str, Setting]:
    """Return name → setting of all that decides a score of given pictures."""
    protocol = score.protocol
    weights, reference = protocol.weights, protocol.reference
    told = _plain(
        {
            "implementation": protocol.implementation,
            "resize": protocol.resize or "",
            "pictures": f"{protocol.count:,}",
        }
    )
    told["resolution"] = Setting("", str(protocol.resolution))
    if weights is not None:
        told["weights"] = _named(weights.name, weights.sha256)
    if reference is not None:
        count = "" if reference.count is None else f" of {reference.count:,} pictures"
        named = _named(reference.name, reference.sha256)
        told["reference"] = Setting(named.words + count, named.identity)
    return told


def identity(settings: Mapping[str, Setting]) -> frozenset[tuple[str, str]]:
    """Return what two protocols have in common that are the same."""
    return frozenset((name, setting.identity) for name, setting in settings.items() if setting.identity)


def in_words(settings: Mapping[str, Setting], leave_out: Iterable[str] = ()) -> str:
    """Return the settings that say something in a line."""
    left = set(leave_out)
    return ", ".join(
        FORMS.get(name, f"{name.removeprefix(OPTION)} {{}}").replace("{}", setting.words)
        for name, setting in settings.items()
        if setting.words and name not in left and not setting.quiet
    )


def changed(before: Mapping[str, Setting], now: Mapping[str, Setting]) -> str:
    """Return in words where ``now`` differs; empty where it does not."""
    nothing = Setting("", "")
    names = [
        name for name in {**before, **now} if before.get(name, nothing).identity != now.get(name, nothing).identity
    ]
    return ", ".join(
        f"{name.removeprefix(OPTION)} {before.get(name, nothing).words or 'none'} → "
        f"{now.get(name, nothing).words or 'none'}"
        for name in names
    )


def unlike_published(images: Images, score: Score) -> list[str]:
    """Return in words each way in which a score was not made as the published ones; none: they share an axis.

    The kind of noise makes no difference: theirs is one stream of a GPU's generator, which no two machines share, and
    the preset leaves it open. The prompts' hash is not published; their number is compared, and the preset's name.
    """
    generation = images.generation
    if generation is None:
        return ["how the pictures were drawn is not recorded"]
    preset = PROTOCOL.preset
    drawn = (generation.drawn_width or images.width, generation.drawn_height or images.height)
    count = generation.prompts.count
    pairs = [
        ("pictures", f"{PROTOCOL.count:,}", f"{score.protocol.count:,}"),
        ("prompts", f"{PROTOCOL.count:,}", f"{PROTOCOL.count if count is None else count:,}"),
        ("size", f"{PROTOCOL.side}×{PROTOCOL.side}", f"{images.width}×{images.height}"),
        ("drawn at", f"{preset.size}×{preset.size}", f"{drawn[0]}×{drawn[1]}"),
        ("resized by", PROTOCOL.filter, generation.resize or "none"),
        ("JPEG", _quality(preset.jpeg), _quality(generation.jpeg)),
        ("scheduler", PROTOCOL.scheduler, generation.scheduler.class_name),
        ("steps", str(preset.steps), str(generation.steps)),
        ("guidance", f"{preset.guidance:g}", f"{generation.guidance:g}"),
        ("seed", str(preset.seed), str(generation.seed)),
        ("negative prompt", "", generation.negative),
        ("strength", "", "" if generation.strength is None else f"{generation.strength:g}"),
        ("drawn from", "", "" if generation.init is None else "pictures"),
        ("preset", preset.name, generation.preset or "none"),
    ]
    reference = score.protocol.reference
    if score.metric == "fid" and reference is not None:
        number = "unknown" if reference.count is None else f"{reference.count:,}"
        pairs += [
            ("pictures of the reference", f"{PROTOCOL.reference.count:,}", number),
            ("reference prepared by", PROTOCOL.reference.change or "", reference.change or "what is not recorded"),
        ]
    return [f"{name} {ours} instead of {theirs or 'none'}" for name, theirs, ours in pairs if ours != theirs]


def _quality(jpeg: int | None) -> str:
    return "none" if jpeg is None else f"quality {jpeg}"


def _stream(generation: Generation) -> str:
    """Return what a picture of one stream of noise depends on, beside its number."""
    stream = generation.stream
    return "" if stream is None else f"of batches of {stream.batch}, on {stream.device}"


def _plain(values: Mapping[str, str]) -> dict[str, Setting]:
    return {name: Setting(value, value) for name, value in values.items()}


def _named(name: str, sha256: str | None) -> Setting:
    """Return a thing that is known by its hash, or where it has none by its name."""
    return Setting(name, name) if not sha256 else Setting(f"{name} ({sha256[:HASH_DIGITS]})", sha256)
