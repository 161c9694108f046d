"""Weighting: what counts how much in the loss. T timesteps, K clusters of them.

A weighting is a factor for each timestep, known before training; a balancer (`ant_*`) weighs intervals of
timesteps while training. Go et al., "Addressing Negative Transfer in Diffusion Models" (ANT).
"""

from typing import Annotated, Literal

from pydantic import Field

from dtr_ray.config.base import Config, Positive, PositiveFloat, Text


class UniformIntervals(Config):
    """K intervals of equally many timesteps."""

    name: Literal["uniform"] = "uniform"


class SNRIntervals(Config):
    """K intervals in which the signal-to-noise ratio differs the least from that of their middle."""

    name: Literal["snr"] = "snr"


class AffinityIntervals(Config):
    """K intervals whose timesteps' gradients agree the most with those of their middle."""

    name: Literal["affinity"] = "affinity"
    from_: Text = Field(alias="from")
    """File that `python -m dtr_ray.analyze affinity` wrote; from the current folder."""


IntervalsConfig = Annotated[UniformIntervals | SNRIntervals | AffinityIntervals, Field(discriminator="name")]


class VanillaWeighting(Config):
    """Every timestep counts the same."""

    name: Literal["vanilla"] = "vanilla"


class MinSNRWeighting(Config):
    """Min-SNR: min(SNR, gamma) / SNR for noise prediction."""

    name: Literal["min_snr"] = "min_snr"
    gamma: PositiveFloat = 5.0


class P2Weighting(Config):
    """P2: 1 / (k + SNR) ** gamma."""

    name: Literal["p2"] = "p2"
    gamma: Annotated[float, Field(ge=0)] = 1.0
    k: PositiveFloat = 1.0


class UWWeighting(Config):
    """ANT's uncertainty weighting of intervals: learned scales of their losses."""

    name: Literal["ant_uw"] = "ant_uw"
    num_clusters: Positive = 8
    """K."""
    intervals: IntervalsConfig = UniformIntervals()
    lr: PositiveFloat = 0.025
    """Learning rate of the interval scales, apart from the model's."""


class PCGradWeighting(Config):
    """ANT with PCGrad: of two intervals' gradients that conflict, each loses its part against the other."""

    name: Literal["ant_pcgrad"] = "ant_pcgrad"
    num_clusters: Positive = 8
    """K."""
    intervals: IntervalsConfig = UniformIntervals()


class NashWeighting(Config):
    """ANT with NashMTL: intervals weighed by the bargain G a = 1 / a over their gradients' Gram matrix G."""

    name: Literal["ant_nash"] = "ant_nash"
    num_clusters: Positive = 8
    """K."""
    intervals: IntervalsConfig = UniformIntervals()
    every_steps: Positive = 1
    """Steps between new weights; in between a step costs no more than a plain one."""


WeightingConfig = Annotated[
    VanillaWeighting | MinSNRWeighting | P2Weighting | UWWeighting | PCGradWeighting | NashWeighting,
    Field(discriminator="name"),
]
