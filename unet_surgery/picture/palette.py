"""The colours, light and dark, and the stylesheet made of them.

Text stands out from its ground by 4.5 : 1 and an outline by 3 : 1 (WCAG 2, AA). No meaning is carried by colour alone:
what is removed is dashed and hollow, what is bypassed dotted, and each kind of node has its own shape and word.

Plain classes and one media query, no custom properties: converters to PNG know the former and skip the latter.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DARK", "FONTS", "LIGHT", "Palette", "Tone", "stylesheet"]

FONTS = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Noto Sans', 'Liberation Sans', "
    "'DejaVu Sans', sans-serif"
)


@dataclass(frozen=True, slots=True)
class Tone:
    """The colours of a kind of node: its ground, its outline, and the text on it."""

    fill: str
    stroke: str
    text: str


@dataclass(frozen=True, slots=True)
class Palette:
    """One set of colours."""

    page: str
    card: str
    edge: str
    """The outline of page and cards: decoration, the labels say the same."""
    text: str
    muted: str
    ghost: str
    """The outline of what is removed or bypassed, and its skips."""
    skip: str
    moved: str
    flow: str
    resnet: Tone
    attention: Tone
    sampler: Tone
    conv: Tone


LIGHT = Palette(
    page="#ffffff",
    card="#f5f7f9",
    edge="#dde3e9",
    text="#1b242d",
    muted="#57626d",
    ghost="#838d98",
    skip="#6f7c89",
    moved="#a3246f",
    flow="#333e49",
    resnet=Tone("#d9e8f8", "#3d78b5", "#143a63"),
    attention=Tone("#fbe5cb", "#b36b17", "#5b3207"),
    sampler=Tone("#e3e7eb", "#6b7783", "#2c363f"),
    conv=Tone("#ffffff", "#6b7783", "#2c363f"),
)

DARK = Palette(
    page="#11161c",
    card="#1a2129",
    edge="#2c353f",
    text="#e8edf2",
    muted="#a3afbb",
    ghost="#74808c",
    skip="#8894a0",
    moved="#f08cc4",
    flow="#c4ced8",
    resnet=Tone("#1c3a5a", "#6aa3dc", "#d8e9fa"),
    attention=Tone("#4b3114", "#d9984a", "#fbe6cd"),
    sampler=Tone("#343e49", "#93a0ad", "#e4eaf0"),
    conv=Tone("#11161c", "#93a0ad", "#e4eaf0"),
)


def stylesheet() -> str:
    """Return the CSS of the picture: light, and dark where the reader prefers it."""
    dark = "".join(f"  {rule}\n" for rule in _colours(DARK))
    light = "".join(f"{rule}\n" for rule in _colours(LIGHT))
    return f"text {{ font-family: {FONTS}; }}\n{_LINES}{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"


_LINES = """\
.bold { font-weight: 600; }
.page, .card { stroke-width: 1; }
.node { stroke-width: 1.25; }
.removed, .bypassed { stroke-width: 1; }
.card.removed, .node.removed, .skip.removed { stroke-dasharray: 4 3; }
.node.bypassed { stroke-width: 1.5; stroke-dasharray: 0.1 3.4; stroke-linecap: round; }
.skip, .flow { fill: none; }
.skip { stroke-width: 1.25; }
.skip.removed { stroke-width: 1; }
.skip.moved { stroke-width: 1.75; }
.flow { stroke-width: 1.75; }
"""


def _colours(palette: Palette) -> list[str]:
    p = palette
    tones = {"resnet": p.resnet, "attention": p.attention, "sampler": p.sampler, "conv": p.conv}
    return [
        f".page {{ fill: {p.page}; stroke: {p.edge}; }}",
        f".card {{ fill: {p.card}; stroke: {p.edge}; }}",
        f".card.removed {{ fill: {p.page}; stroke: {p.ghost}; }}",
        f".plain {{ fill: {p.text}; }}",
        f".muted, .ghost-text {{ fill: {p.muted}; }}",
        *(f".node.{name} {{ fill: {tone.fill}; stroke: {tone.stroke}; }}" for name, tone in tones.items()),
        *(f".on-{name} {{ fill: {tone.text}; }}" for name, tone in tones.items()),
        # after the kinds, so that fate wins over kind; the ground is opaque, so that lines pass behind it
        f".node.removed, .node.bypassed {{ fill: {p.card}; stroke: {p.ghost}; }}",
        f".gone .node.removed, .legend.removed {{ fill: {p.page}; }}",
        f".cell {{ fill: {p.attention.stroke}; stroke: {p.attention.stroke}; stroke-width: 0.75; }}",
        f".cell.out {{ fill: {p.attention.fill}; }}",
        f".skip {{ stroke: {p.skip}; }}",
        f".skip.removed {{ stroke: {p.ghost}; }}",
        f".skip.moved {{ stroke: {p.moved}; }}",
        f".dot {{ fill: {p.moved}; }}",
        f".flow {{ stroke: {p.flow}; }}",
        f".head {{ fill: {p.flow}; }}",
        f".track {{ fill: {p.edge}; }}",
        f".filled {{ fill: {p.flow}; }}",
    ]
