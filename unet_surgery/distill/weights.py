"""The student's weights while they are trained: fp32 masters, and the module that computes in the training dtype.

AdamW at 5e-5 on bf16 weights stalls: an update is smaller than half the distance between two numbers. So the optimizer
works on fp32 copies (*masters*) and the module's weights are rounded from them after each step. In fp32 they are the
same tensors; under FSDP2 the masters are the fp32 shards that it keeps anyway.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unet_surgery.distill.world import World
from unet_surgery.errors import TrainingError

__all__ = ["DTYPES", "TrainedWeights"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PREFIX = "unet."
BUCKET_VALUES = 16 << 20


class TrainedWeights:
    """A module that is trained, ready to run, and its masters. ``names[i]`` is the U-Net's name of ``masters[i]``.

    ``run`` is what to call: the module itself, or torch's wrapper around it.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, world: World) -> None:
        self._world = world
        self._sharded: list[Any] = []
        self._is_rounded = self._is_checked = False
        self.run: nn.Module = module
        named = [(name.removeprefix(PREFIX), p) for name, p in module.named_parameters()]
        self.names = [name for name, _ in named]
        if world.engine == "fsdp2":
            self._shard(module, dtype)
        else:
            self._copy(module, [p for _, p in named], dtype)
            if world.engine == "ddp":
                ids = None if world.device.type == "cpu" else [world.device.index]
                self.run = nn.parallel.DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

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

        Gradients are summed, and meet between processes, in fp32 whatever the training dtype; they meet once a step.
        """
        is_last = number == count - 1
        if self._world.engine == "fsdp2":
            self.run.set_requires_gradient_sync(is_last)
            yield
        elif self._world.engine == "ddp" and (self._is_rounded or not is_last):
            with self.run.no_sync():
                yield
        else:
            yield
        if self._is_rounded:
            self._add_to_masters(is_first=number == 0)
            if is_last and self._world.engine == "ddp":
                self._meet()

    def _add_to_masters(self, *, is_first: bool) -> None:
        sums, grads = [m.grad for m in self.masters], [p.grad for p in self._params]
        (torch._foreach_copy_ if is_first else torch._foreach_add_)(sums, grads)
        for p in self._params:
            p.grad = None

    def _meet(self) -> None:
        """Average the masters' gradients over all processes, many tensors at a time."""
        on_its_way: deque[tuple[list[Tensor], Tensor, Any]] = deque()  # two buckets: more would be a copy of them all
        for bucket in _buckets([m.grad for m in self.masters]):
            flat = torch.cat([grad.flatten() for grad in bucket])
            on_its_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
            if len(on_its_way) > 1:
                self._arrive(*on_its_way.popleft())
        while on_its_way:
            self._arrive(*on_its_way.popleft())

    def _arrive(self, bucket: list[Tensor], flat: Tensor, work: Any) -> None:
        work.wait()
        flat.div_(self._world.size)
        parts = flat.split([grad.numel() for grad in bucket])
        torch._foreach_copy_(bucket, [part.view(grad.shape) for part, grad in zip(parts, bucket, strict=True)])

    def gradients(self) -> list[Tensor]:
        """Return the masters' gradients, now that all micro-batches are done.

        Raises:
            TrainingError: this torch laid its shards out anew, and what is trained is no longer what runs.
        """
        if not self._is_checked:
            self._check_shards()
        for master, p in zip(self.masters, self._sharded, strict=False):
            master.grad = None if p.grad is None else p.grad.to_local()
        return [m.grad for m in self.masters if m.grad is not None]

    def _check_shards(self) -> None:
        """Once, after the first backward: that the masters are still the memory which FSDP2 runs with."""
        self._is_checked = True
        for master, p in zip(self.masters, self._sharded, strict=False):
            if p.to_local().data_ptr() != master.data_ptr():
                raise TrainingError(
                    "FSDP2 moved its shards after they were taken",
                    found=f"torch {torch.__version__}",
                    hint="a newer torch (2.13 keeps them), or DDP",
                )

    def spread(self) -> None:
        """Round the masters into the module's weights, and forget the gradients."""
        if self._is_rounded:
            with torch.no_grad():
                torch._foreach_copy_(self._params, self.masters)
            return
        for p in (*self._sharded, *self.masters):  # a shard's gradient is held by both
            p.grad = None

    def norm(self, grads: Sequence[Tensor]) -> Tensor:
        """Return the norm of all gradients together, a scalar on the device."""
        total = torch.stack(torch._foreach_norm(grads)).square().sum()
        if self._world.engine == "fsdp2":
            dist.all_reduce(total)
        return total.sqrt()

    def whole(self, values: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) of tensors shaped as the masters; every process must ask.

        Where nothing is sharded they are the tensors themselves, on the device.
        """
        if self._world.engine != "fsdp2":
            for name, value in zip(self.names, values, strict=True):
                yield name, value.detach()
            return
        from torch.distributed.tensor import DTensor

        for name, value, like in zip(self.names, values, self._sharded, strict=True):
            wrapped = DTensor.from_local(
                value.detach(), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
            )
            yield name, wrapped.full_tensor().cpu()

    def fill(self, targets: Sequence[Tensor], whole: Mapping[str, Tensor]) -> None:
        """Copy whole tensors, by name, into tensors shaped as the masters.

        The main process brings them; the others may come with none, and get theirs from it.
        """
        with torch.no_grad():
            for i, target in enumerate(targets):
                if self._world.engine == "fsdp2":
                    target.copy_(self._part(whole.get(self.names[i]), i))
                    continue
                if self._world.is_main:
                    target.copy_(whole[self.names[i]])
                if self._world.engine == "ddp":
                    sent = target.contiguous()
                    dist.broadcast(sent, src=0)
                    target.copy_(sent)

    def _part(self, value: Tensor | None, number: int) -> Tensor:
        """Return this process's part of a whole tensor, which the main process hands out."""
        from torch.distributed.tensor import distribute_tensor

        like = self._sharded[number]
        on_device = torch.empty(like.shape, device=like.device) if value is None else value.to(like.device, like.dtype)
        part: Tensor = distribute_tensor(on_device, like.device_mesh, like.placements).to_local()
        return part


def _buckets(tensors: Sequence[Tensor], num_values: int = BUCKET_VALUES) -> Iterator[list[Tensor]]:
    """Yield neighbours together, about so many values at a time."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= num_values:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
