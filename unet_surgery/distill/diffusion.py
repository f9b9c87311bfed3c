"""The forward process of a diffusion model: noise, targets, and which timesteps a training step sees.

z = α·x + σ·ε (arXiv 2006.11239, eq. 4, with α = √ᾱ and σ = √(1 − ᾱ)); everything here is computed in fp32, on the
device that the schedule was sent to, and no call waits for the device.

B batch, C channels, H height, W width of the latents; T timesteps of the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from unet_surgery.errors import ConfigError, printable

__all__ = ["NoiseSchedule", "PredictionType", "TimestepSampling", "draw_timesteps", "offset_noise"]

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSampling = Literal["uniform", "half_high"]

FILE = "scheduler_config.json"
MAX_BETA = 0.999
COSINE_OFFSET = 0.008


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """α and σ of every timestep, and what the network predicts; timesteps are int64 tensors of 0 … T−1.

    Timestep −1, where there is no noise (α = 1, σ = 0), is the last row of both tables, so that −1 finds it.
    """

    prediction_type: PredictionType
    alphas_cumprod_T: Tensor
    _alphas: Tensor  # [T + 1]
    _sigmas: Tensor  # [T + 1]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a pipeline's ``scheduler_config.json``; ᾱ is what every diffusers scheduler makes of it.

        Raises:
            ConfigError: a key is missing, wrong or not modelled, or epsilon is to be predicted where nothing but
                noise is left (arXiv 2305.08891, section 3.1: it is its own answer there).
        """
        kind = config.get("prediction_type", "epsilon")
        if kind not in get_args(PredictionType):
            raise _wrong("prediction_type", " or ".join(get_args(PredictionType)), kind)
        alphas_cumprod_T = torch.cumprod(1.0 - _betas(config), dim=0)
        if kind == "epsilon" and alphas_cumprod_T[-1] <= 0:
            raise ConfigError(
                "a network that predicts epsilon learns nothing at a timestep of zero SNR",
                where=f"{FILE}: prediction_type",
                expected="v_prediction or sample with rescale_betas_zero_snr",
                found="epsilon",
            )
        clean = torch.ones(1)
        alphas = torch.cat([alphas_cumprod_T.sqrt(), clean])
        sigmas = torch.cat([(1.0 - alphas_cumprod_T).sqrt(), 1.0 - clean])
        return cls(kind, alphas_cumprod_T, alphas, sigmas)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod_T)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Return the schedule with its tables on ``device``."""
        tables = (t.to(device) for t in (self.alphas_cumprod_T, self._alphas, self._sigmas))
        return NoiseSchedule(self.prediction_type, *tables)

    def alpha_sigma(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return α and σ, fp32 [B, 1, 1, 1]; timestep −1 is the clean end."""
        return self._alphas[timesteps_B].view(-1, 1, 1, 1), self._sigmas[timesteps_B].view(-1, 1, 1, 1)

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """Return z = α·x + σ·ε in the latents' dtype."""
        alpha, sigma = self.alpha_sigma(timesteps_B)
        return (alpha * latents_BCHW.float() + sigma * noise_BCHW.float()).to(latents_BCHW.dtype)

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """Return what the network should predict: ε, v = α·ε − σ·x (arXiv 2202.00512, appendix D), or x; fp32."""
        if self.prediction_type == "epsilon":
            return noise_BCHW.float()
        if self.prediction_type == "sample":
            return latents_BCHW.float()
        alpha, sigma = self.alpha_sigma(timesteps_B)
        return alpha * noise_BCHW.float() - sigma * latents_BCHW.float()

    def to_sample(self, prediction_BCHW: Tensor, noisy_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """Return x̂ of a prediction at z: (z − σ·ε)/α, α·z − σ·v, or the prediction itself; fp32."""
        alpha, sigma = self.alpha_sigma(timesteps_B)
        prediction, noisy = prediction_BCHW.float(), noisy_BCHW.float()
        if self.prediction_type == "epsilon":
            return (noisy - sigma * prediction) / alpha
        if self.prediction_type == "sample":
            return prediction
        return alpha * noisy - sigma * prediction

    def snr(self, timesteps_B: Tensor) -> Tensor:
        """Return α²/σ², fp32 [B]; 0 at a terminal timestep of zero SNR."""
        alphas_cumprod_B = self.alphas_cumprod_T[timesteps_B]
        return alphas_cumprod_B / (1.0 - alphas_cumprod_B)


def draw_timesteps(uniforms_B2: Tensor, num_timesteps: int, how: TimestepSampling = "uniform") -> Tensor:
    """Return int64 timesteps [B] for two numbers in [0, 1) a sample: its own decide, never its place in the batch.

    The first number u is the place, T·u. ``half_high``: where the second is below ½ the place is T·u^¼, which has more
    of the noisy timesteps. It breaks the plateau where a small network has learned colours but no positions.
    """
    place_B = uniforms_B2[:, 0]
    if how == "half_high":
        place_B = torch.where(uniforms_B2[:, 1] < 0.5, place_B**0.25, place_B)
    return (place_B * num_timesteps).long().clamp(max=num_timesteps - 1)  # a root of nearly 1 rounds to 1


def offset_noise(noise_BCHW: Tensor, normals_BC: Tensor, strength: float) -> Tensor:
    """Return noise with ``strength`` times one normal number a channel added.

    Guttenberg, "Diffusion with Offset Noise" (2023). It is the noise of ``add_noise`` and ``target`` alike.
    """
    return noise_BCHW + strength * normals_BC[:, :, None, None]


def _betas(config: Mapping[str, Any]) -> Tensor:
    """Return β of every timestep, fp32 [T], with the same operations in the same order as diffusers."""
    trained = config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, (list, tuple)) or not trained or not all(0 <= _number(b) < 1 for b in trained):
            raise _wrong("trained_betas", "a list of numbers from 0 to 1", trained)
        betas_T = torch.tensor(trained, dtype=torch.float32)
    else:
        betas_T = _betas_by_name(config)
    return _zero_terminal_snr(betas_T) if config.get("rescale_betas_zero_snr") else betas_T


def _betas_by_name(config: Mapping[str, Any]) -> Tensor:
    name, count = config.get("beta_schedule"), config.get("num_train_timesteps")
    if name not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        raise _wrong("beta_schedule", "linear, scaled_linear or squaredcos_cap_v2", name)
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        raise _wrong("num_train_timesteps", "an integer of 2 or more", count)
    if name == "squaredcos_cap_v2":
        alpha_bar = [cos((i / count + COSINE_OFFSET) / (1 + COSINE_OFFSET) * pi / 2) ** 2 for i in range(count + 1)]
        return torch.tensor([min(1 - alpha_bar[i + 1] / alpha_bar[i], MAX_BETA) for i in range(count)])
    # diffusers has a default where a key is missing, and it is not Stable Diffusion's
    start, end = (_number(config.get(key)) for key in ("beta_start", "beta_end"))
    for key, value in (("beta_start", start), ("beta_end", end)):
        if not 0 < value < 1:
            raise _wrong(key, "a number between 0 and 1", config.get(key))
    if name == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2


def _zero_terminal_snr(betas_T: Tensor) -> Tensor:
    """Return β whose last timestep is noise alone (arXiv 2305.08891, algorithm 1)."""
    root_T = torch.cumprod(1.0 - betas_T, dim=0).sqrt()
    first, last = root_T[0].clone(), root_T[-1].clone()
    alphas_cumprod_T = ((root_T - last) * (first / (first - last))) ** 2
    return 1.0 - torch.cat([alphas_cumprod_T[:1], alphas_cumprod_T[1:] / alphas_cumprod_T[:-1]])


def _number(value: object) -> float:
    """Return ``value`` as a number, and NaN, which no comparison accepts, for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")


def _wrong(key: str, expected: str, found: object) -> ConfigError:
    return ConfigError(
        "the scheduler's config has a value that is not modelled",
        where=f"{FILE}: {key}",
        expected=expected,
        found="no such key" if found is None else printable(found),
    )
