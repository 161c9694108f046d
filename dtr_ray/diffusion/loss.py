"""The training loss of noise prediction, with a learned-range variance where the model gives one.

B batch, C channels, T timesteps. Nichol & Dhariwal, "Improved DDPM": L_simple + L_vlb, eq. 16, where
the gradient of L_vlb reaches the variance alone, and L_vlb is one term of the bound, in bits a dimension.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dtr_ray.diffusion.noise import NoiseSchedule, q_sample


def diffusion_losses(
    model: Callable[..., Tensor],
    schedule: NoiseSchedule,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    model_kwargs: Mapping[str, Any],
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Losses of single samples, computed in float32 whatever the model's dtype (autocast is fine).

    Args:
        model: `model(x_t, t, **model_kwargs)` gives the noise (B, C, H, W), or with the variance's
            interpolation in the second half of the channels, (B, 2 C, H, W).
        schedule: of T timesteps.
        x_start: pixels or scaled latents in about [-1, 1], (B, C, H, W) float32.
        t: (B,) int64 in [0, T).
        noise: standard normal, as `x_start`.
        model_kwargs: passed on, such as `{"y": labels}`.
        weights: of the noise loss at each timestep, (T,); None is 1. Best kept on the device of `t`.

    Returns:
        float32 (B,): `mse` (weighted), `vb` (bits a dimension; 0 without a learned variance) and
        `loss` = mse + vb.

    Raises:
        ValueError: the model's output has neither C nor 2 C channels.
    """
    output = model(q_sample(schedule, x_start, t, noise), t, **model_kwargs).float()
    channels = x_start.shape[1]
    if output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"the model's output has {output.shape[1]} channels: it must have {channels} (noise), "
            f"or {2 * channels} (noise and variance)"
        )
    error = output[:, :channels] - noise.float()
    mse = error.square().flatten(1).mean(1)
    if weights is not None:
        mse = mse * weights.to(t.device, torch.float32)[t]
    if output.shape[1] == channels:
        vb = torch.zeros_like(mse)
    else:
        vb = _bound_terms(schedule, error.detach(), output[:, channels:], x_start.float(), t)
    return {"mse": mse, "vb": vb, "loss": mse + vb}


def _bound_terms(
    schedule: NoiseSchedule, error: Tensor, variance: Tensor, x_start: Tensor, t: Tensor
) -> Tensor:
    """The bound's term of each sample's timestep (DDPM, eq. 5), bits a dimension (B,).

    Written with the noise's `error` (predicted less true): the two means differ by a multiple of it, so
    nothing is lost to the cancellation that their difference suffers in float32 at high noise.
    """
    coefficients = schedule.coefficients(error.device)
    log_range = coefficients.log_variance_range[t].view(-1, 1, 1, 1)
    weight = coefficients.error_weight[t].view(-1, 1, 1, 1)
    # Log of the model's variance over the posterior's (Improved DDPM, eq. 15).
    excess = (variance + 1) / 2 * log_range
    divergence = 0.5 * (excess + torch.expm1(-excess) + torch.exp(-excess) * weight * error.square())
    # All rows take both ways: choosing rows by t would make the device wait for the host.
    decoder = _decoder_nll(schedule, error, excess, x_start)
    nats = torch.where((t == 0).view(-1, 1, 1, 1), decoder, divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def _decoder_nll(schedule: NoiseSchedule, error: Tensor, excess: Tensor, x_start: Tensor) -> Tensor:
    """Negative log likelihood of 8-bit pixels x_start at t = 0 (DDPM, eq. 13), nats, as `x_start`.

    A pixel's bin is 1 / 255 wide to either side, and open at -1 and 1. The normal distribution function
    is its tanh approximation, as in the published codes, so that figures can be compared.
    """
    centred = float(schedule.mean_error_scale[0]) * error
    log_variance = float(schedule.posterior_log_variance_clipped[0]) + excess
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = _normal_cdf((centred + 1 / 255) * inverse_std)
    lower = _normal_cdf((centred - 1 / 255) * inverse_std)
    mass = torch.where(x_start < -0.999, upper, torch.where(x_start > 0.999, 1 - lower, upper - lower))
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
