"""The student's weights while they are trained: fp32 masters, and the module that computes in the training dtype.

AdamW at 5e-5 on bf16 weights stalls: an update is smaller than half the distance between two numbers. So the optimizer
works on fp32 copies (*masters*) and the module's weights are rounded from them after each step. In fp32 they are the
same tensors; under FSDP2 the masters are the fp32 shards that it keeps anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unet_surgery.distill.world import World

__all__ = ["DTYPES", "TrainedWeights"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PREFIX = "unet."


class TrainedWeights:
    """A module that is trained, ready to run, and its masters. ``names[i]`` is the U-Net's name of ``masters[i]``.

    ``run`` is what to call: the module itself, or torch's wrapper around it.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, world: World) -> None:
        self._world = world
        self._sharded: list[Any] = []
        self._is_rounded = False
        self.run: nn.Module = module
        named = [(name.removeprefix(PREFIX), p) for name, p in module.named_parameters()]
        self.names = [name for name, _ in named]
        if world.engine == "fsdp2":
            self._shard(module, dtype)
        else:
            self._copy(module, [p for _, p in named], dtype)
            if world.engine == "ddp":
                ids = None if world.device.type == "cpu" else [world.device.index]
                self.run = nn.parallel.DistributedDataParallel(
                    module, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
                )

    def _copy(self, module: nn.Module, params: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self._is_rounded = dtype != torch.float32
        if not self._is_rounded:
            self._params = self.masters = list(params)
            return
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in params]
        nn.Module.to(module, dtype)
        self._params = list(module.parameters())
        for master in self.masters:
            master.grad = torch.zeros_like(master)

    def _shard(self, module: nn.Module, dtype: torch.dtype) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        unet = module.get_submodule(PREFIX[:-1])
        for stage in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            if stage is not None:
                fully_shard(stage, mp_policy=policy)
        fully_shard(module, mp_policy=policy)
        self._sharded = list(module.parameters())
        # Plain tensors over the same memory, so that optimizer, norm and average need not know of shards.
        self.masters = [nn.Parameter(p.to_local().detach()) for p in self._sharded]

    @contextlib.contextmanager
    def micro_batch(self, number: int, count: int) -> Iterator[None]:
        """Around the forward and backward of micro-batch ``number`` of a step's ``count``.

        Gradients of several micro-batches are summed in fp32, whatever the training dtype, and meet between processes
        once a step.
        """
        is_last = number == count - 1
        if self._world.engine == "fsdp2":
            self.run.set_requires_gradient_sync(is_last)
            yield
            return
        sums_here = self._is_rounded and count > 1
        if self._world.engine == "ddp" and (sums_here or not is_last):
            with self.run.no_sync():
                yield
        else:
            yield
        if self._is_rounded:
            self._add_to_masters(is_first=number == 0)
            if sums_here and is_last and self._world.engine == "ddp":
                self._meet()

    def _add_to_masters(self, *, is_first: bool) -> None:
        sums, grads = [m.grad for m in self.masters], [p.grad for p in self._params]
        (torch._foreach_copy_ if is_first else torch._foreach_add_)(sums, grads)
        for p in self._params:
            p.grad = None

    def _meet(self) -> None:
        works = [dist.all_reduce(m.grad, async_op=True) for m in self.masters]
        for work in works:
            work.wait()
        torch._foreach_div_([m.grad for m in self.masters], float(self._world.size))

    def gradients(self) -> list[Tensor]:
        """Return the masters' gradients, now that all micro-batches are done."""
        for master, p in zip(self.masters, self._sharded, strict=False):
            master.grad = None if p.grad is None else p.grad.to_local()
        return [m.grad for m in self.masters if m.grad is not None]

    def spread(self) -> None:
        """Round the masters into the module's weights, and forget the gradients."""
        if self._is_rounded:
            with torch.no_grad():
                torch._foreach_copy_(self._params, self.masters)
            return
        for p in self._sharded or self.masters:
            p.grad = None

    def norm(self, grads: Sequence[Tensor]) -> Tensor:
        """Return the norm of all gradients together, a scalar on the device."""
        total = torch.stack(torch._foreach_norm(grads)).square().sum()
        if self._world.engine == "fsdp2":
            dist.all_reduce(total)
        return total.sqrt()

    def whole(self, values: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor on the CPU) of tensors shaped as the masters; every process must ask."""
        if self._world.engine != "fsdp2":
            for name, value in zip(self.names, values, strict=True):
                yield name, value.detach().to("cpu", memory_format=torch.contiguous_format)
            return
        from torch.distributed.tensor import DTensor

        for name, value, like in zip(self.names, values, self._sharded, strict=True):
            wrapped = DTensor.from_local(
                value.detach(), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
            )
            yield name, wrapped.full_tensor().cpu()

    def fill(self, targets: Sequence[Tensor], whole: Mapping[str, Tensor]) -> None:
        """Copy whole tensors, by name, into tensors shaped as the masters."""
        with torch.no_grad():
            for i, target in enumerate(targets):
                target.copy_(self._part(whole[self.names[i]], i))

    def _part(self, value: Tensor, number: int) -> Tensor:
        """Return this process's part of a whole tensor."""
        if self._world.engine != "fsdp2":
            return value
        from torch.distributed.tensor import distribute_tensor

        like = self._sharded[number]
        value = value.to(device=like.device, dtype=like.dtype)
        part: Tensor = distribute_tensor(value, like.device_mesh, like.placements).to_local()
        return part
