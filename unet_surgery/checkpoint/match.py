"""Weights against config: the header's shapes are evidence, config.json is a claim, and they must agree."""

from __future__ import annotations

from collections.abc import Mapping

from unet_surgery.errors import SurgeryError, WeightsMismatchError, first_few

__all__ = ["check_shapes"]


_FOREIGN = (
    ("a LoRA: an adapter for a U-Net, not a U-Net", lambda n: "lora_" in n or ".lora." in n),
    ("a single-file checkpoint in the original LDM layout", lambda n: n.startswith("model.diffusion_model.")),
    ("a ControlNet", lambda n: n.startswith("controlnet_")),
    ("a VAE", lambda n: n.startswith(("encoder.down", "decoder.up", "post_quant_conv"))),
    (
        "a diffusion transformer (SD 3 or Flux), not a U-Net",
        lambda n: "joint_blocks" in n or "single_transformer" in n,
    ),
    (
        "a U-Net whose names have a prefix (DDP's module. or torch.compile's _orig_mod.)",
        lambda n: n.startswith(("module.", "_orig_mod.", "unet.")),
    ),
)


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    where: str,
    source: str = "config.json",
    error: type[SurgeryError] = WeightsMismatchError,
) -> None:
    """Check that ``found`` has exactly the tensors and shapes of ``expected``, which ``source`` claims.

    Raises:
        WeightsMismatchError (or ``error``): names the first missing, unexpected and misshaped tensors, and counts.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    if not (missing or extra or wrong):
        return
    problems = []
    if missing:
        problems.append(_first("missing", missing))
    if extra:
        problems.append(_first("unexpected", extra))
    if wrong:
        first = wrong[0]
        shapes = f"{first} is {list(found[first])}, expected {list(expected[first])}"
        problems.append(f"{len(wrong)} of another shape ({shapes})")
    what = next((label for label, test in _FOREIGN if extra and any(test(name) for name in extra)), None)
    raise error(
        f"the weights do not fit {source}",
        where=where,
        expected=f"{len(expected)} tensors, as {source} says",
        found="; ".join(problems) + (f". This looks like {what}" if what else ""),
        hint=f"check that weights and {source} are of the same model",
    )


def _first(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind}: {first_few(names)}"
