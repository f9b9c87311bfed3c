"""The processes of a run: which one this is, its device, and what they agree on.

``accelerate launch`` (or torchrun) starts them and says so in the environment; accelerate joins them. Data-parallel
training is torch's own: DistributedDataParallel, or FSDP2's ``fully_shard``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from unet_surgery.errors import MissingExtraError, TrainingError, UsageError

__all__ = ["World", "join_world"]

Engine = Literal["single", "ddp", "fsdp2"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """One process among ``size``."""

    rank: int
    size: int
    device: torch.device
    engine: Engine
    host_group: Any = None
    """A group of gloo's, for what the processes agree on without asking their devices."""

    @property
    def is_main(self) -> bool:
        """True in the process that writes and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def on_main(self, act: Callable[[], T]) -> T | None:
        """Let the main process do something that may fail while the others wait; they get None.

        Raises:
            SurgeryError: what ``act`` raised, in the main process; in the others, that it did.
        """
        error: Exception | None = None
        result = None
        if self.is_main:
            try:
                result = act()
            except Exception as raised:  # noqa: BLE001  # the others must not wait for ever
                error = raised
        if self.any(error is not None):
            raise error or TrainingError("the main process could not go on", hint="its own message says why")
        return result

    def any(self, flag: bool) -> bool:
        """Return True in all processes if ``flag`` is true in one."""
        return self.highest(int(flag)) > 0

    def highest(self, value: int) -> int:
        """Return the highest of the processes' values."""
        if self.size == 1:
            return value
        held = torch.tensor(value)
        dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(held)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over all processes of a tensor on the device."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def share(self, value: Any) -> Any:
        """Return the main process's ``value`` in all processes."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self.host_group)
        return held[0]

    def leave(self) -> None:
        """Let go of the other processes, at the end: who fails exits, and the launcher ends the rest."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join_world(environment: Mapping[str, str] = os.environ) -> World:
    """Join the processes that the environment speaks of; without any, this is the only one.

    Raises:
        UsageError: an engine that this trainer does not run (DeepSpeed, Megatron-LM, FSDP 1).
        MissingExtraError: several processes, and accelerate is not installed.
    """
    _refuse_engines(environment)
    size = int(environment.get("WORLD_SIZE", "1"))
    on_cpu = _is_true(environment, "ACCELERATE_USE_CPU")
    if size == 1:
        return World(0, 1, _device(on_cpu=on_cpu), "single")
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtraError(
            "accelerate is needed for several processes", hint="pip install 'unet-surgery[train]'"
        ) from error
    state = PartialState(cpu=on_cpu or not torch.cuda.is_available())
    engine: Engine = "fsdp2" if _is_true(environment, "ACCELERATE_USE_FSDP") else "ddp"
    group = dist.new_group(backend="gloo")
    return World(state.process_index, state.num_processes, state.device, engine, group)


def _refuse_engines(environment: Mapping[str, str]) -> None:
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if _is_true(environment, variable):
            raise UsageError(
                f"{name} is not supported",
                where=f"{variable} in the environment, from accelerate's config",
                expected="DDP or FSDP2: its training state would be pickles that own the weights",
                hint="accelerate launch --multi_gpu, or --use_fsdp --fsdp_version 2",
            )
    if _is_true(environment, "ACCELERATE_USE_FSDP") and environment.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            "FSDP 1 is not supported",
            where="FSDP_VERSION in the environment, from accelerate's config",
            expected="2",
            found=environment.get("FSDP_VERSION", "1"),
            hint="accelerate launch --use_fsdp --fsdp_version 2",
        )


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes")


def _device(*, on_cpu: bool) -> torch.device:
    if on_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
