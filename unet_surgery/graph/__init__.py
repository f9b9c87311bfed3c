"""A U-Net as data: its config, its graph, selectors over the graph, and removal.

Pure values and functions: no disk, no network, no third-party package.
"""

from unet_surgery.graph.build import build
from unet_surgery.graph.config import UNetConfig, parse_config
from unet_surgery.graph.family import FAMILIES, family_of
from unet_surgery.graph.nodes import Attention, Layer, Mid, Resnet, Sampler, Stage, Stem, UNetGraph
from unet_surgery.graph.remove import remove
from unet_surgery.graph.select import Selection, Skipped, resolve
from unet_surgery.graph.show import diff, dump
from unet_surgery.graph.verify import verify

__all__ = [
    "FAMILIES",
    "Attention",
    "Layer",
    "Mid",
    "Resnet",
    "Sampler",
    "Selection",
    "Skipped",
    "Stage",
    "Stem",
    "UNetConfig",
    "UNetGraph",
    "build",
    "diff",
    "dump",
    "family_of",
    "parse_config",
    "remove",
    "resolve",
    "verify",
]
