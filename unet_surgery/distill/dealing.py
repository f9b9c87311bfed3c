"""How a stage's batch is dealt out: over processes, and over micro-batches in each."""

from __future__ import annotations

from unet_surgery.distill.config import RunConfig, Stage
from unet_surgery.errors import RunError

__all__ = ["deal", "micro_batch_sizes"]


def deal(config: RunConfig, stage: Stage, num_processes: int) -> tuple[int, int]:
    """Return how many samples a process takes at once, and how often before a step: their product is its share.

    Raises:
        RunError: the batch cannot be dealt out evenly.
    """
    size = config.micro_batch or stage.batch // num_processes
    if size == 0 or stage.batch % (size * num_processes):
        raise RunError(
            "the batch cannot be dealt out evenly",
            where=f"stage {stage.name}",
            expected="batch = micro_batch × processes × a whole number",
            found=f"batch {stage.batch}, micro_batch {config.micro_batch}, {num_processes} processes",
            hint=f"micro_batch: {_nearest(stage.batch, size, num_processes)}",
        )
    return size, stage.batch // (size * num_processes)


def micro_batch_sizes(config: RunConfig, num_processes: int = 1) -> list[int]:
    """Return the micro-batches by which the batches of all stages can be dealt out, smallest first."""
    shares = [stage.batch // num_processes for stage in config.stages if stage.batch % num_processes == 0]
    if len(shares) < len(config.stages):
        return []
    return [size for size in range(1, min(shares) + 1) if all(share % size == 0 for share in shares)]


def _nearest(batch: int, size: int, num_processes: int) -> str:
    share = batch // num_processes
    fits = [n for n in range(1, share + 1) if share % n == 0 and batch % num_processes == 0]
    return str(min(fits, key=lambda n: abs(n - size))) if fits else "… and a batch that the processes divide"
