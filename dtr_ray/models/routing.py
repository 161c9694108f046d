"""Routing masks: which channels serve which timestep. T timesteps, C channels.

Park et al., "Denoising Task Routing for Diffusion Models" (DTR), section 4 and pseudo-code 1.
Masks are bool (T, C) on the CPU; row t belongs to the integer training timestep t in [0, T).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtr_ray.config import RoutingConfig


def dtr_mask(num_timesteps: int, num_channels: int, alpha: float, beta: float) -> Tensor:
    """A window of `int(beta * C)` channels that moves from the first channels to the last as t grows.

    It starts at round((C - width) * (t / (T - 1)) ** alpha), halves rounded to even (DTR,
    pseudo-code 1). The paper's eq. (4) widens the window by each shift; the code and we do not.

    Args:
        num_timesteps: T, at least 2.
        num_channels: C, enough for one channel on.
        alpha: above 0; the larger it is, the longer the window stays at the first channels.
        beta: share of channels on, in (0, 1].

    Returns:
        bool (T, C).

    Raises:
        ValueError: where an argument is out of its range.
    """
    width = _num_on(num_timesteps, num_channels, beta)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha is {alpha}: it must be a finite number above 0")
    # Python's pow is exact where the result is, so that halves fall on the same side everywhere;
    # vectorised powers differ in the last digit between machines.
    span, last = num_channels - width, num_timesteps - 1
    starts = [round(span * (t / last) ** alpha) for t in range(num_timesteps)]
    start = torch.tensor(starts, device="cpu").unsqueeze(1)
    channel = torch.arange(num_channels, device="cpu")
    return (channel >= start) & (channel < start + width)


def random_mask(num_timesteps: int, num_channels: int, beta: float, seed: int) -> Tensor:
    """`int(beta * C)` channels on in each row, drawn for each row on its own (DTR, section 4.2: R-TR).

    Args:
        num_timesteps: T, at least 2.
        num_channels: C, enough for one channel on.
        beta: share of channels on, in (0, 1].
        seed: of the generator, 0 or above; the same seed gives the same mask.

    Returns:
        bool (T, C).

    Raises:
        ValueError: where an argument is out of its range.
    """
    width = _num_on(num_timesteps, num_channels, beta)
    if seed < 0:
        raise ValueError(f"seed is {seed}: it must be 0 or above")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    draws = torch.rand(num_timesteps, num_channels, generator=generator, device="cpu")
    chosen = draws.argsort(dim=1)[:, :width]
    return torch.zeros(num_timesteps, num_channels, dtype=torch.bool, device="cpu").scatter_(1, chosen, True)


def _num_on(num_timesteps: int, num_channels: int, beta: float) -> int:
    """Channels on in each row, the ranges checked."""
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps is {num_timesteps}: it must be at least 2")
    if not 0 < beta <= 1:
        raise ValueError(f"beta is {beta}: it must be in (0, 1]")
    width = int(beta * num_channels)
    if width < 1:
        raise ValueError(
            f"int(beta * num_channels) is {width} with beta {beta} and num_channels {num_channels}: "
            "at least one channel must be on"
        )
    return width


_BUILDERS: dict[str, Callable[[Any, int, int], Tensor | None]] = {
    "none": lambda routing, num_timesteps, num_channels: None,
    "dtr": lambda routing, num_timesteps, num_channels: dtr_mask(
        num_timesteps, num_channels, routing.alpha, routing.beta
    ),
    "random": lambda routing, num_timesteps, num_channels: random_mask(
        num_timesteps, num_channels, routing.beta, routing.seed
    ),
}


def build_mask(routing: RoutingConfig, num_timesteps: int, num_channels: int) -> Tensor | None:
    """The mask that a routing configuration asks for: bool (T, C), or None without routing.

    Raises:
        ValueError: where `int(beta * num_channels)` is 0, or `num_timesteps` is below 2.
    """
    return _BUILDERS[routing.name](routing, num_timesteps, num_channels)
