"""Weightings: a factor for the noise prediction loss of every timestep, (T,), known before training."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtr_ray.config.weighting import MinSNRWeighting, P2Weighting, WeightingConfig
from dtr_ray.diffusion.noise import NoiseSchedule

Array = TypeVar("Array", Tensor, NDArray[np.floating[Any]])


def min_snr_weights(snr: Array, gamma: float) -> Array:
    """min(SNR, gamma) / SNR for noise prediction (Hang et al., "Min-SNR Weighting Strategy", section 3).

    Args:
        snr: signal-to-noise ratio (T,), above 0; a tensor or an array.
        gamma: cap of the ratio, above 0.

    Returns:
        (T,) in (0, 1], of the kind and dtype of `snr`.

    Raises:
        ValueError: gamma is not above 0.
    """
    if not gamma > 0:
        raise ValueError(f"Min-SNR's gamma is {gamma}: it must be above 0")
    return (gamma / snr).clip(max=1)


def p2_weights(snr: Array, gamma: float, k: float) -> Array:
    """1 / (k + SNR) ** gamma, noise prediction (Choi et al., "Perception Prioritized Training", section 3).

    Args:
        snr: signal-to-noise ratio (T,), above 0; a tensor or an array.
        gamma: strength, at least 0 (0 is no weighting).
        k: keeps the weight finite at high noise, above 0.

    Returns:
        (T,) above 0, of the kind and dtype of `snr`.

    Raises:
        ValueError: gamma or k is out of range.
    """
    if not gamma >= 0:
        raise ValueError(f"P2's gamma is {gamma}: it must be at least 0")
    if not k > 0:
        raise ValueError(f"P2's k is {k}: it must be above 0")
    return 1 / (k + snr) ** gamma


def build_weights(config: WeightingConfig, schedule: NoiseSchedule) -> Tensor | None:
    """The weights that a configuration asks for, float32 (T,) on the CPU; None where all are 1."""
    weights = WEIGHTINGS[config.name](config, schedule)
    return None if weights is None else weights.to(torch.float32)


def _none(config: WeightingConfig, schedule: NoiseSchedule) -> None:
    """Every timestep counts the same, or a balancer weights the intervals while training."""


def _min_snr(config: MinSNRWeighting, schedule: NoiseSchedule) -> Tensor:
    return min_snr_weights(schedule.snr, config.gamma)


def _p2(config: P2Weighting, schedule: NoiseSchedule) -> Tensor:
    return p2_weights(schedule.snr, config.gamma, config.k)


WEIGHTINGS: dict[str, Callable[[Any, NoiseSchedule], Tensor | None]] = {
    "vanilla": _none,
    "ant_uw": _none,
    "ant_pcgrad": _none,
    "ant_nash": _none,
    "min_snr": _min_snr,
    "p2": _p2,
}
