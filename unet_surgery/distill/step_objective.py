"""Step distillation: the student does in one DDIM step what the teacher does in several.

Progressive distillation (arXiv 2202.00512, algorithm 2 and appendix G) as one stage: student and teacher are different
networks, which may predict different things, so everything meets in x. Guidance-aware with some probability, as in
SnapFusion (arXiv 2306.00980); the single stage and the task term's scale are YangPan's, his of a batch. Here each
sample has its own, so that a batch may be dealt out over micro-batches and processes and mean the same.

z = α·x + σ·ε. B batch, C channels, H height, W width; K teacher steps for one of the student. All of it in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unet_surgery.distill.diffusion import NoiseSchedule

__all__ = ["Denoise", "draw_guidance", "guided", "step_ladder", "step_loss", "step_target", "task_loss", "with_task"]

NO_ERROR = 1e-12  # below it a task term is scaled no further: nothing divides by 0

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents [B, C, H, W] and timesteps [B] → x̂, fp32: a network, its prompts, and ``guided`` where wanted."""


def step_ladder(uniforms_B: Tensor, num_timesteps: int, num_student_steps: int, num_teacher_steps: int) -> Tensor:
    """Return int64 timesteps [B, K + 1]: where the student stands, then each of the teacher's K steps, −1 being clean.

    The teacher's N·K timesteps are spaced evenly from the last one down ("trailing", arXiv 2305.08891), the student's N
    are every K-th of them: a subset, so both ends of a student's step are states that the teacher passes.
    ``uniforms_B`` in [0, 1) choose the student's timestep.

    Raises:
        ValueError: there are fewer timesteps than steps, or no steps.
    """
    total = num_student_steps * num_teacher_steps
    if not 0 < total <= num_timesteps:
        raise ValueError(f"{num_student_steps} × {num_teacher_steps} steps in {num_timesteps} timesteps")
    start_B = (uniforms_B * num_student_steps).long().clamp(max=num_student_steps - 1) * num_teacher_steps
    rungs = torch.arange(num_teacher_steps + 1, device=uniforms_B.device)
    left_BK = total - (start_B[:, None] + rungs)
    return (left_BK * num_timesteps + total // 2) // total - 1  # in integers: rounded alike on every device


def step_target(denoise: Denoise, noisy_BCHW: Tensor, ladder_BK: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return x̃ [B, C, H, W] fp32: the x̂ with which one DDIM step lands where the teacher's K steps do.

    (z_K − (σ_K/σ)·z) / (α_K − (σ_K/σ)·α), arXiv 2202.00512, appendix G. Where the ladder ends clean, it is the
    teacher's x̂.
    """
    with torch.no_grad():
        z = noisy_BCHW.float()
        alpha, sigma = schedule.alpha_sigma(ladder_BK[:, 0])
        for k in range(ladder_BK.shape[1] - 1):
            z = _ddim_step(denoise(z, ladder_BK[:, k]), z, ladder_BK[:, k], ladder_BK[:, k + 1], schedule)
        alpha_end, sigma_end = schedule.alpha_sigma(ladder_BK[:, -1])
        ratio = sigma_end / sigma
        return (z - ratio * noisy_BCHW.float()) / (alpha_end - ratio * alpha)


def step_loss(sample_BCHW: Tensor, target_BCHW: Tensor, snr_B: Tensor) -> Tensor:
    """Return [B] mean squared errors in x, weighed by max(α²/σ², 1) (arXiv 2202.00512, eq. 9: truncated SNR)."""
    return _mean_squares(sample_BCHW, target_BCHW) * snr_B.clamp(min=1.0)


def task_loss(prediction_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Return [B] mean squared errors to the diffusion target (arXiv 2006.11239, eq. 14)."""
    return _mean_squares(prediction_BCHW, target_BCHW)


def with_task(step_B: Tensor, task_B: Tensor, share: float) -> Tensor:
    """Return [B] step + share · task, each task term scaled to its step term's size; the scale has no gradient."""
    scale_B = (step_B / task_B.clamp(min=NO_ERROR)).detach()
    return step_B + share * scale_B * task_B


def draw_guidance(uniforms_B: Tensor, low: float, high: float) -> Tensor:
    """Return a guidance weight for each sample, uniform in [low, high) (arXiv 2306.00980)."""
    return low + (high - low) * uniforms_B


def guided(conditional: Tensor, unconditional: Tensor, guidance_B: Tensor) -> Tensor:
    """Return w·conditional − (w − 1)·unconditional, fp32: both of the same noisy latents and timesteps."""
    w = guidance_B.view(-1, 1, 1, 1)
    return w * conditional.float() - (w - 1.0) * unconditional.float()


def _mean_squares(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).square().flatten(1).mean(1)


def _ddim_step(sample: Tensor, z: Tensor, now_B: Tensor, then_B: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return z at ``then_B``: α'·x̂ + σ'·ε̂ with ε̂ = (z − α·x̂)/σ (arXiv 2010.02502, eq. 12, η = 0)."""
    alpha, sigma = schedule.alpha_sigma(now_B)
    alpha_then, sigma_then = schedule.alpha_sigma(then_B)
    return alpha_then * sample + sigma_then * (z - alpha * sample) / sigma
