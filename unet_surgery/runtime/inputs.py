"""What a U-Net is given beside latents, timestep and text: the further conditions that its config asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

__all__ = ["context_width", "further_conditions"]


def context_width(config: Any) -> int:
    """Return how wide the text's embeddings are that a U-Net of this config takes."""
    width = config.cross_attention_dim
    return int(width if isinstance(width, int) else max(width))


def further_conditions(
    unet: UNet2DConditionModel,
    batch: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return neutral values, zeros, for the conditions beside time and text, as arguments of the U-Net's forward.

    SDXL's are a pooled embedding [batch, width] and sizes [batch, 6]; others are class labels.
    """
    import torch

    config = unet.config

    def zeros(width: int) -> torch.Tensor:
        return torch.zeros(batch, width, device=device, dtype=dtype)

    inputs: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
    if config.num_class_embeds is not None or config.class_embed_type == "timestep":
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long, device=device)
    elif config.class_embed_type in ("projection", "simple_projection"):
        inputs["class_labels"] = zeros(config.projection_class_embeddings_input_dim)
    elif config.class_embed_type == "identity":
        inputs["class_labels"] = zeros(unet.time_embedding.linear_2.out_features)
    return inputs
