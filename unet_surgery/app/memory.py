"""The most memory that drawing takes at once, beyond what was there before."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["most_bytes", "weight_bytes"]


def most_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Call ``run`` and return the most bytes of tensors that were there at once and had not been before.

    On CUDA by the allocator, so with what operators take inside; else by counting the tensors that operators return,
    which is the same on every machine, and less than what the process takes of the system.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        most: int = torch.cuda.max_memory_allocated(device) - before
        return most
    counted = _Counting()
    with counted:
        run()
    return counted.most


def weight_bytes(modules: Sequence[torch.nn.Module]) -> int:
    """Return the bytes of all parameters and buffers."""
    num_bytes: int = sum(t.nbytes for module in modules for t in (*module.parameters(), *module.buffers()))
    return num_bytes


class _Counting(TorchDispatchMode):  # type: ignore[misc]
    """Sees every operator below autograd, and follows the storages of what they return until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}  # views and in-place operators return these
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given and storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes()).atexit = False
        self.most = max(self.most, self.live)
        return result

    def _gone(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]
