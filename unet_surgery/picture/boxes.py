"""The boxes of nodes: their labels, tooltips and the cells of their transformer blocks."""

from __future__ import annotations

from typing import Literal

from unet_surgery.picture.fate import Node
from unet_surgery.picture.scene import Box, Rect, Text
from unet_surgery.picture.textsize import text_width

__all__ = ["RESNET_WIDTH", "attention_box", "conv_box", "resnet_box", "sampler_box"]

RESNET_WIDTH = 64.0
CONV_HEIGHT = 26.0
LABEL_SIZE = 11.0
LABEL_PAD = 8.0
MAX_CELLS = 24
"""Beyond it cells would be thinner than a line; the numbers are still there."""


def resnet_box(node: Node, rect: Rect) -> Box:
    """Return a resnet's box."""
    return Box(rect, "resnet", node.fate, node.path, tooltip(node), (_centred("resnet", rect, node, "resnet"),))


def conv_box(node: Node, x: float, y: float, label: str) -> Box:
    """Return the box of a convolution at an end of the U-Net."""
    rect = Rect(x, y, RESNET_WIDTH, CONV_HEIGHT)
    return Box(rect, "conv", node.fate, node.path, tooltip(node), (_centred(label, rect, node, "conv"),))


def sampler_box(node: Node, rect: Rect, side: Literal["down", "up"]) -> Box:
    """Return a sampler's box."""
    return Box(rect, side, node.fate, node.path, tooltip(node), (_centred(side, rect, node, "sampler"),))


def attention_box(node: Node, rect: Rect) -> Box:
    """Return an attention's box; of more than one transformer block with their number, before and after."""
    depth, left = len(node.blocks), sum(node.blocks)
    if node.fate == "bypassed":
        return Box(rect, "attention", node.fate, node.path, tooltip(node), (_centred("bypassed", rect, node, "muted"),))
    cut = node.fate == "kept" and left != depth
    if depth == 1 and not cut:
        label = _centred("attention", rect, node, "attention")
        return Box(rect, "attention", node.fate, node.path, tooltip(node), (label,))
    number = f"{depth} → {left}" if cut else f"×{depth}"
    cells = node.blocks if 1 < depth <= MAX_CELLS and node.fate == "kept" else ()
    y = rect.middle[1] + 0.36 * LABEL_SIZE - (2 if cells else 0)
    room = rect.width - 2.5 * LABEL_PAD - text_width(number, LABEL_SIZE, bold=True)
    word = "attention" if text_width("attention", LABEL_SIZE) <= room else "attn"
    role = _role(node, "attention")
    labels = (
        Text(rect.x + LABEL_PAD, y, word, LABEL_SIZE, role),
        Text(rect.right - LABEL_PAD, y, number, LABEL_SIZE, role, "end", bold=True),
    )
    return Box(rect, "attention", node.fate, node.path, tooltip(node), labels, cells)


def tooltip(node: Node) -> str:
    """Return what a node is and what becomes of it, in words."""
    words = f"{node.path}: {node.before:,} parameters"
    if node.fate == "removed":
        return f"{words}, removed"
    if node.fate == "bypassed":
        return f"{words}, bypassed: {node.after:,} stay because stock diffusers cannot drop them"
    if node.before != node.after:
        return f"{words}, {node.after:,} stay ({sum(node.blocks)} of {len(node.blocks)} transformer blocks)"
    return words


def _centred(word: str, rect: Rect, node: Node, role: str) -> Text:
    x, y = rect.middle
    return Text(x, y + 0.36 * LABEL_SIZE, word, LABEL_SIZE, _role(node, role), "middle")


def _role(node: Node, role: str) -> str:
    return "ghost-text" if node.fate == "removed" else role
