"""Noise schedules and the forward process. T timesteps, B batch, C channels.

Symbols as in Ho et al., "Denoising Diffusion Probabilistic Models" (DDPM), section 2: beta_t,
alpha_t = 1 - beta_t, abar_t = product of alpha up to t; t is an integer in [0, T), 0 the least noisy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """What training gathers by timestep: float32 tensors (T,) on one device."""

    signal_scale: Tensor
    """sqrt(abar)"""
    noise_scale: Tensor
    """sqrt(1 - abar)"""
    log_variance_range: Tensor
    """As the schedule's own."""
    error_weight: Tensor
    """As the schedule's own."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise of every timestep: float64 tensors (T,) on the CPU, and their float32 copies elsewhere."""

    betas: Tensor
    """Variance added at each timestep, in (0, 1)."""
    alphas_cumprod: Tensor
    """abar: share of the image's variance that is left, in (0, 1), falling."""
    _on_device: dict[torch.device, Coefficients] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio abar / (1 - abar), above 0, falling."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """The abar of the timestep before; 1 at t = 0."""
        return torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7); 0 at t = 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> Tensor:
        """Log of the posterior variance, at t = 0 that of t = 1 in place of log(0)."""
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def posterior_mean_coef1(self) -> Tensor:
        """Factor of x_0 in the mean of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7)."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Tensor:
        """Factor of x_t in the mean of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7)."""
        return (1 - self.betas).sqrt() * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def log_variance_range(self) -> Tensor:
        """log(beta) less the posterior log variance: what a learned-range variance interpolates over."""
        return self.betas.log() - self.posterior_log_variance_clipped

    @cached_property
    def mean_error_scale(self) -> Tensor:
        """Error of the reverse step's mean for an error of 1 in the predicted noise (DDPM, eq. 11)."""
        return self.betas / ((1 - self.betas) * (1 - self.alphas_cumprod)).sqrt()

    @cached_property
    def error_weight(self) -> Tensor:
        """Squared `mean_error_scale` over the posterior variance: twice the factor of DDPM, eq. 12."""
        return self.mean_error_scale**2 / self.posterior_log_variance_clipped.exp()

    def coefficients(self, device: torch.device) -> Coefficients:
        """The float32 copies on a device; made once, so that a training step copies nothing."""
        found = self._on_device.get(device)
        if found is None:
            scales = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
            # A tensor made in inference mode could not be used in training later.
            with torch.inference_mode(False):
                vectors = *scales, self.log_variance_range, self.error_weight
                found = Coefficients(*(vector.to(device, torch.float32) for vector in vectors))
            self._on_device[found.signal_scale.device] = found
        return found

    def to(self, device: torch.device | str) -> Self:
        """The same schedule, with the coefficients on `device` made ahead."""
        self.coefficients(torch.device(device))
        return self


def noise_schedule(name: str, num_timesteps: int) -> NoiseSchedule:
    """A named noise schedule.

    Args:
        name: `linear`, or `cosine` (also called `squaredcos_cap_v2`).
        num_timesteps: T, at least 2; above 20 for `linear`, whose last beta is 20 / T.

    Raises:
        ValueError: the name is unknown, or there are too few timesteps.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}: one of {', '.join(SCHEDULES)}")
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps is {num_timesteps}: a noise schedule needs at least 2")
    betas = SCHEDULES[name](num_timesteps)
    return NoiseSchedule(betas, torch.cumprod(1 - betas, dim=0))


def _linear_betas(num_timesteps: int) -> Tensor:
    """From 0.0001 to 0.02 at T = 1000 (DDPM, section 4), scaled by 1000 / T at others."""
    if num_timesteps <= 20:
        raise ValueError(f"num_timesteps is {num_timesteps}: the linear schedule needs more than 20")
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 0.0001, scale * 0.02, num_timesteps, dtype=torch.float64, device="cpu")


def _cosine_betas(num_timesteps: int) -> Tensor:
    """Nichol & Dhariwal, "Improved DDPM", eq. 17: a squared cosine, beta at most 0.999."""
    times = torch.arange(num_timesteps + 1, dtype=torch.float64, device="cpu") / num_timesteps
    level = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": _linear_betas,
    "cosine": _cosine_betas,
    "squaredcos_cap_v2": _cosine_betas,
}


def q_sample(schedule: NoiseSchedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, eq. 4).

    Args:
        schedule: of T timesteps.
        x_start: (B, C, H, W).
        t: (B,) int64 in [0, T), on the device of `x_start`.
        noise: standard normal, as `x_start`.
    """
    coefficients = schedule.coefficients(x_start.device)
    shape = (-1,) + (1,) * (x_start.ndim - 1)
    signal, scale = coefficients.signal_scale[t].view(shape), coefficients.noise_scale[t].view(shape)
    return signal * x_start + scale * noise
