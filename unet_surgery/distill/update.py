"""One optimizer step: AdamW on the masters, clipped, and not applied where a gradient is not finite.

Nothing here asks the device for a value. Whether a step is applied is decided there: torch's fused AdamW takes a flag,
and skips weights, moments and its own step count alike. Counts of what happened are read with the losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from unet_surgery.distill.config import Optimizer
from unet_surgery.distill.weights import TrainedWeights
from unet_surgery.errors import MissingExtraError

__all__ = ["Update"]

MOMENTS = ("exp_avg", "exp_avg_sq")
FIRST_SCALE = 2.0**15
GROWTH_STEPS = 2000


class Update:
    """The optimizer of one stage.

    ``scales_loss``: fp16 gradients underflow, so the loss is multiplied by a power of two that is found on the way
    (Micikevicius et al., arXiv 1710.03740): halved when a step overflows, doubled after 2000 good ones.
    """

    def __init__(self, weights: TrainedWeights, config: Optimizer, *, scales_loss: bool) -> None:
        self._weights = weights
        self._config = config
        device = weights.masters[0].device
        self._adamw = _make(weights.masters, config)
        self._is_fused = config.kind == "adamw"
        self.scale = torch.tensor(FIRST_SCALE if scales_loss else 1.0, device=device)
        self._scales = scales_loss
        self._growth = torch.zeros((), dtype=torch.int32, device=device)
        self.bad_in_a_row = torch.zeros((), dtype=torch.int32, device=device)
        self.most_in_a_row = torch.zeros((), dtype=torch.int32, device=device)
        self.bad_in_all = torch.zeros((), dtype=torch.int32, device=device)

    def apply(self, lr: float) -> Tensor:
        """Take the step at the rate ``lr``; return the gradient's norm before clipping, a scalar on the device."""
        grads = self._weights.gradients()
        if self._scales:
            torch._foreach_mul_(grads, 1 / self.scale)
        norm = self._weights.norm(grads)
        is_bad = torch.logical_not(torch.isfinite(norm))
        if self._config.clip is not None:
            torch._foreach_mul_(grads, torch.clamp(self._config.clip / (norm + 1e-6), max=1.0))
        for group in self._adamw.param_groups:
            group["lr"] = lr
        found_inf = is_bad.float()
        if self._is_fused:
            self._adamw.found_inf = found_inf
            self._adamw.step()
        elif not bool(is_bad):  # bitsandbytes has no such flag, so the device is asked
            self._adamw.step()
        self._count(is_bad)
        if self._scales:
            torch._amp_update_scale_(self.scale, self._growth, found_inf, 2.0, 0.5, GROWTH_STEPS)
        self._weights.spread()
        return norm

    def _count(self, is_bad: Tensor) -> None:
        self.bad_in_all += is_bad
        self.bad_in_a_row.add_(1).mul_(is_bad)
        torch.maximum(self.most_in_a_row, self.bad_in_a_row, out=self.most_in_a_row)

    def tensors(self) -> Iterator[tuple[str, Iterator[tuple[str, Tensor]]]]:
        """Yield (kind, (name, whole tensor) of every master): the optimizer's state. Every process must ask for all."""
        masters = self._weights.masters
        if self._is_fused:
            self._begin()
            for kind in MOMENTS:
                yield kind, self._weights.whole([self._adamw.state[m][kind] for m in masters])
            return
        names = [(name, self._adamw.state[m]) for name, m in zip(self._weights.names, masters, strict=True)]
        for kind in sorted({kind for _, held in names for kind, value in held.items() if isinstance(value, Tensor)}):
            yield kind, ((name, held[kind]) for name, held in names if kind in held)

    def facts(self) -> dict[str, float | int]:
        """Return what else continues a run exactly; asks the device."""
        steps = self._adamw.state[self._weights.masters[0]]["step"] if self._adamw.state else 0
        return {
            "adam_steps": int(steps),
            "loss_scale": float(self.scale),
            "loss_scale_growth": int(self._growth),
            "bad_in_a_row": int(self.bad_in_a_row),
            "bad_in_all": int(self.bad_in_all),
        }

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, float | int]) -> None:
        """Continue from the whole tensors of :meth:`tensors`, by kind and name, and from :meth:`facts`."""
        masters = self._weights.masters
        if self._is_fused:
            self._begin()
            for kind in MOMENTS:
                self._weights.fill([self._adamw.state[m][kind] for m in masters], tensors.get(kind, {}))
            for master in masters:
                self._adamw.state[master]["step"].fill_(float(facts["adam_steps"]))
        elif facts["adam_steps"]:
            for name, master in zip(self._weights.names, masters, strict=True):
                held = {kind: group[name].to(master.device) for kind, group in tensors.items() if name in group}
                self._adamw.state[master] = {**held, "step": int(facts["adam_steps"])}
        self.scale.fill_(float(facts["loss_scale"]))
        self._growth.fill_(int(facts["loss_scale_growth"]))
        self.bad_in_a_row.fill_(int(facts["bad_in_a_row"]))
        self.bad_in_all.fill_(int(facts["bad_in_all"]))

    def _begin(self) -> None:
        """Give every master the state that AdamW would make in its first step."""
        for master in self._weights.masters:
            if master not in self._adamw.state:
                self._adamw.state[master] = {
                    "step": torch.zeros((), dtype=torch.float32, device=master.device),
                    **{kind: torch.zeros_like(master) for kind in MOMENTS},
                }


def _make(masters: Sequence[Tensor], config: Optimizer) -> torch.optim.Optimizer:
    options = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay, "lr": config.lr}
    if config.kind == "adamw":
        return torch.optim.AdamW(masters, fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(
            "bitsandbytes is needed for optimizer.kind adamw8bit", hint="pip install bitsandbytes"
        ) from error
    return AdamW8bit(masters, **options)
