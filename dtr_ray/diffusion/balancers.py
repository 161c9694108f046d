"""Balancers: they weigh the losses of timestep intervals in training. K clusters, b samples of a worker."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from dtr_ray.config.trial import UWWeighting, WeightingConfig
from dtr_ray.diffusion.intervals import Interval, uniform_intervals


class Balancer(Protocol):
    """Turns the losses of single samples into the scalar to minimise; an `nn.Module` in all but name."""

    intervals: list[Interval]

    def __call__(self, losses: Tensor, cluster: Tensor, counts: Tensor, world_size: int = 1) -> Tensor:
        """The scalar whose mean over all workers is the loss of the whole batch."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is learned beside the model."""

    def to(self, device: torch.device) -> Self:
        """Moves the parameters."""

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """From checkpoints."""


class UncertaintyWeighting(nn.Module):
    """Kendall et al.'s uncertainty weighting over K intervals, as ANT (Go et al.) uses it.

    loss = sum over clusters g of 0.5 * (exp(-s_g) * mean loss of g / K + s_g), s = `log_scales`,
    all 0 at first. A cluster without a sample in the whole batch counts for nothing in that step, its
    s_g included: that term alone would only drive the scale down.
    """

    def __init__(self, intervals: Sequence[Interval]) -> None:
        super().__init__()
        self.intervals = list(intervals)
        self.log_scales = nn.Parameter(torch.zeros(len(self.intervals)))

    def forward(self, losses: Tensor, cluster: Tensor, counts: Tensor, world_size: int = 1) -> Tensor:
        """The loss of this worker, such that the mean over the workers is the loss of the whole batch.

        Args:
            losses: of this worker's samples, (b,).
            cluster: of each of these samples, (b,) int64 in [0, K).
            counts: samples of each cluster in the whole batch, over all workers, (K,).
            world_size: number of workers.

        Returns:
            Scalar, float32.
        """
        factors = torch.exp(-self.log_scales[cluster]) / (len(self.intervals) * counts[cluster])
        data_term = world_size * (factors * losses.float()).sum()
        return 0.5 * (data_term + (self.log_scales * (counts > 0)).sum())


def build_balancer(config: WeightingConfig, num_timesteps: int) -> UncertaintyWeighting | None:
    """The balancer that a configuration asks for; its `intervals` are those to draw timesteps from.

    Raises:
        ValueError: more clusters than timesteps.
    """
    builder = BALANCERS.get(config.name)
    return None if builder is None else builder(config, num_timesteps)


def _uncertainty(config: UWWeighting, num_timesteps: int) -> UncertaintyWeighting:
    return UncertaintyWeighting(uniform_intervals(num_timesteps, config.num_clusters))


BALANCERS: dict[str, Callable[[Any, int], UncertaintyWeighting]] = {"ant_uw": _uncertainty}
