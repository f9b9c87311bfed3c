"""``Tapped``: a U-Net whose forward returns the activations that a distillation compares, beside its prediction.

The taps are hooks, put in place once, before anything wraps or compiles the network, and the forward hands out what
they see as results. So ``torch.compile`` traces them into the graph (a hook that is added after the first compiled
call is silently ignored), DistributedDataParallel sees the activations as outputs, and nothing is kept between calls.

B batch, C channels, H height, W width of the latents, T tokens, D width of the prompt's embeddings.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unet_surgery.errors import VerificationError, first_few, printable
from unet_surgery.lower.features import Tap, tap_name

__all__ = ["Tapped", "tap_name", "trace_taps_under_checkpointing"]

NUM_SUGGESTED = 3


class _Recording:
    """Where the hooks put what they see: a list while a forward of the ``Tapped`` that owns it runs, else None."""

    def __init__(self) -> None:
        self.taken: list[Tensor | None] | None = None


class Tapped(nn.Module):  # type: ignore[misc]
    """A U-Net with taps; ``unet`` is the network itself, with its names and state as they were.

    Why hooks that write to a list of the call: dynamo follows hooks that exist when it traces, and an assignment into
    a list that is made in the same forward is no side effect for it, so the graph stays whole. Gradient
    checkpointing runs modules again in the backward pass: no list is open then, and the hooks do nothing. A copy
    (``copy.deepcopy``) has taps of its own.

    Raises:
        VerificationError: a tap names no module of this network, or one that is never called.
    """

    def __init__(self, unet: nn.Module, taps: Sequence[Tap]) -> None:
        super().__init__()
        targets = [_module_of(unet, tap) for tap in taps]  # all are found before the first hook is put in place
        self.unet = unet
        self.taps = tuple(taps)
        self._recording = _Recording()
        self._hooks = [
            target.register_forward_pre_hook(partial(_take_input, self._recording, number), with_kwargs=True)
            if tap.at == "input"
            else target.register_forward_hook(partial(_take_output, self._recording, number))
            for number, (tap, target) in enumerate(zip(taps, targets, strict=True))
        ]

    def forward(
        self,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        prompt_embeds_BTD: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the prediction [B, C, H, W] and the activations in the order of ``taps``.

        ``added_cond_kwargs`` is what SDXL needs beside the prompt, as diffusers calls it.

        Raises:
            VerificationError: a tapped module did not run.
        """
        taken: list[Tensor | None] = [None for _ in self.taps]
        self._recording.taken = taken
        try:
            prediction_BCHW = self.unet(
                latents_BCHW,
                timesteps_B,
                encoder_hidden_states=prompt_embeds_BTD,
                added_cond_kwargs=added_cond_kwargs,
                return_dict=False,
            )[0]
        finally:
            self._recording.taken = None
        activations = tuple(t for t in taken if t is not None)
        if len(activations) != len(taken):
            raise VerificationError(
                "the network has tapped modules that its forward does not run",
                where=first_few([tap_name(tap) for tap, t in zip(self.taps, taken, strict=True) if t is None]),
                hint="tap a stage, a resnet, an attention, or a layer inside one",
            )
        return prediction_BCHW, activations

    def release(self) -> None:
        """Take the taps out of the network again; this module can not run afterwards, ``unet`` can."""
        for hook in self._hooks:
            hook.remove()


def trace_taps_under_checkpointing() -> None:
    """Let ``torch.compile`` trace taps that lie inside what gradient checkpointing runs again (resnets, attn1).

    A setting of the whole process, read when a network is traced: call it before the first compiled forward. It makes
    dynamo leave out, in the recomputation, what the forward writes to Python objects, which is what the taps do
    anyway. Taps on stages and on ``proj_out`` do not need it. An older torch has no such setting; there such a tap
    breaks the graph.
    """
    config: Any = torch._dynamo.config
    if hasattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def _take_output(recording: _Recording, number: int, _module: nn.Module, _args: object, output: Any) -> None:
    if recording.taken is not None:
        recording.taken[number] = output[0] if isinstance(output, tuple) else output


def _take_input(
    recording: _Recording, number: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if recording.taken is not None:
        recording.taken[number] = args[0] if args else next(iter(kwargs.values()))


def _module_of(unet: nn.Module, tap: Tap) -> nn.Module:
    modules = dict(unet.named_modules())
    module = modules.get(tap.module) if tap.module else None
    if module is None:
        near = difflib.get_close_matches(tap.module, [name for name in modules if name], n=NUM_SUGGESTED)
        raise VerificationError(
            "a tap names a module that the network does not have",
            where=printable(tap_name(tap)),
            hint=f"nearest: {', '.join(near)}" if near else None,
        )
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise VerificationError(
            "a tap names a list of modules, which has no output of its own",
            where=printable(tap_name(tap)),
            hint=f"nearest: {', '.join(f'{tap.module}.{name}' for name, _ in module.named_children())}",
        )
    return module
