"""From a graph to what it means on disk: student config, weight map, feature map, costs, and the plan of them all.

Pure values and functions, like :mod:`unet_surgery.graph`.
"""

from unet_surgery.lower.adaptermeta import renamed_metadata
from unet_surgery.lower.adapters import Moves, Transplant, make_transplant, module_moves
from unet_surgery.lower.config import lower_config
from unet_surgery.lower.controlnet import (
    CONTROL_CLASS,
    ControlNetPlan,
    ControlTensor,
    carry_controlnet,
    control_shapes,
    start_controlnet,
)
from unet_surgery.lower.counts import Counts, count, count_modules, part_of, quantity
from unet_surgery.lower.features import FeatureMap, FeaturePair, Tap, feature_map
from unet_surgery.lower.make import BYTES_PER_PARAM, make_plan
from unet_surgery.lower.modules import CONTEXT_TOKENS, Module, Placed, Tensor, modules
from unet_surgery.lower.plan import PLAN_FORMAT, Bypassed, ConfigChange, Part, StoredFile, StoredWeights, SurgeryPlan
from unet_surgery.lower.report import NodeReport, report_nodes
from unet_surgery.lower.skips import ChangedSkip, changed_skips, skip_outputs, skip_sources
from unet_surgery.lower.weights import replaced_tensor, shapes_of, unused_tensors, weight_map

__all__ = [
    "BYTES_PER_PARAM",
    "CONTEXT_TOKENS",
    "CONTROL_CLASS",
    "PLAN_FORMAT",
    "Bypassed",
    "ChangedSkip",
    "ConfigChange",
    "ControlNetPlan",
    "ControlTensor",
    "Counts",
    "FeatureMap",
    "FeaturePair",
    "Module",
    "Moves",
    "NodeReport",
    "Part",
    "Placed",
    "StoredFile",
    "StoredWeights",
    "SurgeryPlan",
    "Tap",
    "Tensor",
    "Transplant",
    "carry_controlnet",
    "changed_skips",
    "control_shapes",
    "count",
    "count_modules",
    "feature_map",
    "lower_config",
    "make_plan",
    "make_transplant",
    "module_moves",
    "modules",
    "part_of",
    "quantity",
    "renamed_metadata",
    "replaced_tensor",
    "report_nodes",
    "shapes_of",
    "skip_outputs",
    "skip_sources",
    "start_controlnet",
    "unused_tensors",
    "weight_map",
]
