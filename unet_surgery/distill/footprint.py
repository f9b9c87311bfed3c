"""What a run needs of memory and disk: exact where parameters and dtypes decide it, estimated for activations.

Exact are the student's weights, fp32 masters, gradients and Adam's moments, its average, the teacher, and the parts.

Activations are an estimate: what torch's eager forward keeps for the backward, added up module by module, in the
training dtype, for fused attention (SDPA's flash or memory-efficient kernels: no matrix of attention weights is kept):

    resnet          inputs of norm, SiLU and convolution, twice: 3·in + 3·out a pixel
    transformer     28·c a pixel in a block (12·c of it around the GEGLU's 4·c gate), 3·c for its norm and projections,
                    and keys and values of the prompt
    sampler         the convolution's input; ends: three times the first width

A segment that is computed again (``speed.checkpointing``) keeps its input alone, and the largest one comes back whole
while its backward runs. Added are both sides of the feature terms in fp32. Left out are the allocator's slack, cuDNN's
workspaces, the teacher's and the VAE's passing activations (they are gone before the student's are all there), and
what torch.compile fuses away. ``--find-batch`` tries what this estimates.

Compared with what torch's autograd keeps of BK Base and Tiny at 64 × 64 in bf16, the sum is 0.3 % too low. No GPU's
allocator was compared. BK-SDM's README says 53, 28 and 22 GB for micro-batches of 64, 16 and 2 with checkpointing; this
says 32, 20 and 17 for ours. Theirs keeps fp32 weights under autocast, which rounds them once more, computes norms in
fp32, and writes out the matrices of attention weights, so the two are no test of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unet_surgery.distill.config import RunConfig
from unet_surgery.distill.costs import is_recomputed
from unet_surgery.graph import UNetGraph
from unet_surgery.lower import CONTEXT_TOKENS, FeaturePair, Placed, count, modules

__all__ = ["VALUE_BYTES", "Disk", "Memory", "activation_values", "checkpoint_bytes", "memory"]

VALUE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
FP32 = 4
MOMENTS = {"adamw": 2 * FP32, "adamw8bit": 2}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device of one process, by what they hold. ``activations`` is an estimate, the others are exact."""

    weights: int
    masters: int
    gradients: int
    optimizer: int
    average: int
    teacher: int
    parts: int
    activations: int

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.masters
            + self.gradients
            + self.optimizer
            + self.average
            + self.teacher
            + self.parts
            + self.activations
        )


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes that a run writes, and of the cache it reads; None where nobody can know yet."""

    checkpoint: int
    checkpoints: int
    """As many as are ever there at once: those kept, and the one being written."""
    student: int
    cache: int | None


def memory(
    run: RunConfig,
    student: UNetGraph,
    teacher: UNetGraph | None,
    *,
    pairs: Sequence[FeaturePair] = (),
    part_params: tuple[int, int] = (0, 0),
    micro_batch: int,
    optimizer: str = "adamw",
) -> Memory:
    """Return what one process needs for micro-batches of ``micro_batch`` samples at the graphs' latent size.

    Where steps are guided, a sample counts twice. ``part_params`` are those of the VAE, which is kept in fp32, and of
    the text encoder. Under FSDP2 the masters, gradients, moments and the average are dealt out over the processes; here
    they are whole.
    """
    value = VALUE_BYTES[run.speed.dtype]
    params, is_rounded = count(student).params, value < FP32
    kept = activation_values(student, run.speed.checkpointing)
    features = sum(pair.channels * _area(student.latent_size, pair.stride) for pair in pairs)
    return Memory(
        weights=params * value,
        masters=params * FP32 if is_rounded else 0,
        # Of short dtypes both are there at a step's end: the module's own and the sums in fp32.
        gradients=params * (value + FP32 if is_rounded else FP32),
        optimizer=params * MOMENTS[optimizer],
        average=params * FP32,
        teacher=0 if teacher is None else count(teacher).params * value,
        parts=part_params[0] * FP32 + part_params[1] * value,
        activations=micro_batch * (kept * value + features * (value + 2 * FP32 * is_rounded)),
    )


def activation_values(unet: UNetGraph, checkpointing: str = "none") -> int:
    """Return how many values the forward of one sample keeps for its backward; an estimate, see the module."""
    kept, segments = 0, dict[str, int]()
    for placed in modules(unet):
        values = _kept(placed)
        if is_recomputed(placed.path, checkpointing, unet):
            segments[placed.path] = values
            kept += _entering(placed) * placed.num_pixels
        else:
            kept += values
    return kept + max(segments.values(), default=0)


def checkpoint_bytes(params: int, optimizer: str) -> int:
    """Return the size of a checkpoint: masters and their average in fp32, and the optimizer's moments."""
    return params * (2 * FP32 + MOMENTS[optimizer])


def _kept(placed: Placed) -> int:
    """Return how many values a module's forward keeps at its place."""
    shapes: Mapping[str, tuple[int, ...]] = {t.name: t.shape for t in placed.module.tensors}
    pixels = placed.num_pixels
    if "conv1.weight" in shapes:
        outputs, inputs = shapes["conv1.weight"][:2]
        return 3 * (inputs + outputs) * pixels
    if "attn2.to_q.weight" in shapes:
        width = shapes["attn2.to_q.weight"][0]
        return 28 * width * pixels + 2 * width * CONTEXT_TOKENS
    if "proj_in.weight" in shapes:
        return 2 * shapes["proj_in.weight"][1] * pixels
    if "proj_out.weight" in shapes:
        return shapes["proj_out.weight"][1] * pixels
    if "conv.weight" in shapes:  # a downsampler's input is finer than its output, an upsampler's is the enlarged one
        return shapes["conv.weight"][1] * pixels * (4 if "downsamplers" in placed.path else 1)
    if "conv_out.weight" in shapes:
        return 3 * shapes["conv_out.weight"][1] * pixels
    if "conv_in.weight" in shapes:
        return shapes["conv_in.weight"][1] * pixels
    return 0  # embeddings: one value a width, not a pixel


def _entering(placed: Placed) -> int:
    """Return the width of what enters a segment that is computed again."""
    shapes = {t.name: t.shape for t in placed.module.tensors}
    return shapes["conv1.weight"][1] if "conv1.weight" in shapes else shapes["attn2.to_q.weight"][0]


def _area(size: tuple[int, int], stride: int) -> int:
    return -(-size[0] // stride) * -(-size[1] // stride)
