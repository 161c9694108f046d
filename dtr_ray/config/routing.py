"""Routing: which channels serve which timestep. T timesteps, C channels.

Park et al., "Denoising Task Routing for Diffusion Models" (DTR).
"""

from typing import Annotated, Literal

from pydantic import Field

from dtr_ray.config.base import Config, Positive, PositiveFloat

Share = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0)]


class NoRouting(Config):
    """Every channel serves every timestep."""

    name: Literal["none"] = "none"


class DTRRouting(Config):
    """A window of channels that slides with the timestep (DTR, section 4.3)."""

    name: Literal["dtr"] = "dtr"
    alpha: PositiveFloat = 4.0
    """How the window's place grows with the timestep: (t / (T - 1)) ** alpha."""
    beta: Share = 0.8
    """Share of channels that are on; 1 is no routing."""
    rule: Literal["pseudo_code", "equation"] = "pseudo_code"
    """`pseudo_code`: as the paper's code; `equation`: its eq. (4), wider where the window moves."""


class ScheduledRouting(Config):
    """A DTR window whose alpha and beta go from a first to a last value, over the blocks or over training."""

    name: Literal["scheduled"] = "scheduled"
    over: Literal["blocks", "training"] = "blocks"
    """From the first block to the last, or from the first training step to `last_step`."""
    alpha: PositiveFloat = 4.0
    """At first."""
    last_alpha: PositiveFloat = 4.0
    """At last; in between in equal ratios."""
    beta: Share = 1.0
    """At first."""
    last_beta: Share = 0.8
    """At last; in between in equal differences."""
    last_step: Positive = 10_000
    """For `over: training`: the step from which the last values hold."""
    every_steps: Positive = 100
    """For `over: training`: how often the masks are made anew."""


class RandomRouting(Config):
    """Random channels for each timestep (DTR, section 4.2: R-TR)."""

    name: Literal["random"] = "random"
    beta: Share = 0.8
    seed: Seed = 0


class MaxRoamingRouting(Config):
    """Random channels that roam in training (Pascal et al., "Maximum Roaming"; DTR, table 8)."""

    name: Literal["max_roaming"] = "max_roaming"
    beta: Share = 0.8
    seed: Seed = 0
    every_steps: Positive = 100
    """Each timestep exchanges one channel for one that it has not had for the longest, so often."""


class ClusteredRouting(Config):
    """DTR with uniform intervals of timesteps as its tasks (CDTR; DTR, table 8)."""

    name: Literal["clustered"] = "clustered"
    alpha: PositiveFloat = 4.0
    beta: Share = 0.8
    num_clusters: Annotated[int, Field(ge=2)] = 8


class ExplicitClusteredRouting(Config):
    """Channels shared by all timesteps, and a part of the others for each interval (ERCDT; DTR, table 8)."""

    name: Literal["explicit_clustered"] = "explicit_clustered"
    shared: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of channels that serve all timesteps; the intervals divide the others evenly."""
    num_clusters: Positive = 8


RoutingConfig = Annotated[
    NoRouting
    | DTRRouting
    | RandomRouting
    | MaxRoamingRouting
    | ClusteredRouting
    | ExplicitClusteredRouting
    | ScheduledRouting,
    Field(discriminator="name"),
]
