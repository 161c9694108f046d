"""Balancers: they weigh intervals of timesteps in training. K clusters (one an interval), b samples.

There are two kinds. A `LossBalancer` makes one loss of the losses of single samples. A `GradientBalancer`
combines the gradients of the intervals' mean losses, added up over all workers (see training/step.py).
Go et al., "Addressing Negative Transfer in Diffusion Models" (ANT).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtr_ray.config.weighting import NashWeighting, WeightingConfig
from dtr_ray.diffusion.clustering import Interval
from dtr_ray.diffusion.gradients import nash_weights, project_conflicting_gradients, projection_coefficients
from dtr_ray.diffusion.intervals import build_intervals
from dtr_ray.diffusion.noise import NoiseSchedule
from dtr_ray.randomness import keyed_generator

__all__ = [
    "Balancer",
    "GradientBalancer",
    "LossBalancer",
    "NashMTL",
    "PCGrad",
    "UncertaintyWeighting",
    "build_balancer",
    "nash_weights",
    "project_conflicting_gradients",
]

# Stream of random numbers; those of training/batches.py count up from 0.
_ORDERS = 100
# The largest weight that times a gradient of float32 is sure to be finite where their product is of order 1.
_LARGEST = 1e30


class LossBalancer(nn.Module, ABC):
    """Turns the losses of single samples into the scalar to minimise, with parameters of its own.

    Attributes:
        intervals: K half-open intervals of timesteps.
    """

    def __init__(self, intervals: Sequence[Interval]) -> None:
        super().__init__()
        self.intervals = list(intervals)

    @abstractmethod
    def forward(
        self, losses: Tensor, cluster: Tensor, counts: Tensor, world_size: int = 1, share: float = 1.0
    ) -> Tensor:
        """The loss of a part of a worker's samples.

        The sum over a worker's parts, in the mean over workers, is the loss of the whole batch.

        Args:
            losses: of the part's samples, (b,).
            cluster: of each of these samples, (b,) int64 in [0, K).
            counts: samples of each cluster in the whole batch, over all workers, (K,).
            world_size: number of workers.
            share: of this worker's samples in this part; all parts' sum to 1.

        Returns:
            Scalar, float32.
        """

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """What it does at present, by name; waits for the device."""


class UncertaintyWeighting(LossBalancer):
    """Kendall et al.'s uncertainty weighting over K intervals, as ANT (Go et al.) uses it.

    loss = sum over clusters g of 0.5 * (exp(-s_g) * mean loss of g / K + s_g), s = `log_scales`,
    all 0 at first. A cluster without a sample in the whole batch counts for nothing in that step, its
    s_g included: that term alone would only drive the scale down.
    """

    def __init__(self, intervals: Sequence[Interval]) -> None:
        super().__init__(intervals)
        self.log_scales = nn.Parameter(torch.zeros(len(self.intervals)))

    def forward(
        self, losses: Tensor, cluster: Tensor, counts: Tensor, world_size: int = 1, share: float = 1.0
    ) -> Tensor:
        """See `LossBalancer.forward`."""
        factors = torch.exp(-self.log_scales[cluster]) / (len(self.intervals) * counts[cluster])
        data_term = world_size * (factors * losses.float()).sum()
        return 0.5 * (data_term + share * (self.log_scales * (counts > 0)).sum())

    def metrics(self) -> dict[str, float]:
        """`balancer/weight_<g>`: factor of the mean loss of interval g, over that in the plain loss."""
        return _numbered("weight", 0.5 * torch.exp(-self.log_scales.detach()))


class GradientBalancer(nn.Module, ABC):
    """Combines the gradients of the mean losses of K intervals: its answer is a weight for each of them.

    Attributes:
        intervals: K half-open intervals of timesteps.
    """

    def __init__(self, intervals: Sequence[Interval]) -> None:
        super().__init__()
        self.intervals = list(intervals)

    def plain_weights(self, step: int, counts: Tensor) -> Tensor | None:
        """The weights (K,) of a step that does without the single gradients; None for one that needs them."""
        return None

    @abstractmethod
    def weigh(self, gram: Tensor, counts: Tensor, seed: int, step: int) -> Tensor:
        """The weights of the intervals' gradients at a step.

        Args:
            gram: dot products of the gradients, over the whole batch, float64 (K, K); zeros for a cluster
                without a sample.
            counts: samples of each cluster in the whole batch, (K,), on the device of `gram`.
            seed: of the run.
            step: 0-based.

        Returns:
            (K,) float32, on the device of `gram`, the same on all workers.
        """

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """What it did at the last step, by name; waits for the device."""


class PCGrad(GradientBalancer):
    """PCGrad (Yu et al.) over K intervals: the mean of the projected gradients.

    The mean over the clusters with samples, as the authors' trainer has it (it divides the losses by K and
    sums): where nothing conflicts the step is then the plain one, so that `gradient_clip` and a model's own
    extra loss mean the same as without a balancer. AdamW does not see a constant factor.
    """

    def __init__(self, intervals: Sequence[Interval]) -> None:
        super().__init__(intervals)
        self._last: tuple[Tensor, Tensor] | None = None

    def weigh(self, gram: Tensor, counts: Tensor, seed: int, step: int) -> Tensor:
        """See `GradientBalancer.weigh`; each gradient meets all in an order of its own."""
        self._last = gram, counts
        draws = torch.rand(len(gram), len(gram), generator=keyed_generator(seed, _ORDERS, step))
        orders = draws.argsort(dim=1)
        if gram.device.type == "cuda":
            orders = orders.pin_memory()
        coefficients = projection_coefficients(gram, orders.to(gram.device, non_blocking=True))
        return (coefficients.sum(0) / (counts > 0).sum()).float()

    def metrics(self) -> dict[str, float]:
        """`balancer/conflicts`: of all pairs of intervals, the share whose gradients' product is negative."""
        if self._last is None:
            return {}
        gram, counts = (value.cpu() for value in self._last)
        present = int((counts > 0).sum())
        conflicts = int((gram < 0).sum()) / max(present * (present - 1), 1)
        return {"balancer/conflicts": conflicts}


class NashMTL(GradientBalancer):
    """NashMTL (Navon et al.) over K intervals: the mean of a_g times gradient g, where G a = 1 / a.

    The mean over the clusters with samples, as the authors' trainer has it. At a step with new weights the
    combined gradient has the norm 1 / sqrt(K), however large the losses are. New weights are computed at
    the multiples of `every_steps`; these steps wait for the device once. A cluster without a gradient then
    gets the mean of the others' weights, for the steps in between.
    """

    weights: Tensor

    def __init__(self, intervals: Sequence[Interval], every_steps: int = 1) -> None:
        super().__init__(intervals)
        self.every_steps = every_steps
        self.register_buffer("weights", torch.ones(len(self.intervals)))

    def plain_weights(self, step: int, counts: Tensor) -> Tensor | None:
        """See `GradientBalancer.plain_weights`."""
        return None if step % self.every_steps == 0 else self._mean(counts)

    def weigh(self, gram: Tensor, counts: Tensor, seed: int, step: int) -> Tensor:
        """See `GradientBalancer.weigh`; all ones where the gradients are not finite, for the loss to tell."""
        on_host = gram.cpu()
        if bool(on_host.isfinite().all()):
            self.weights.copy_(nash_weights(on_host).clamp(max=_LARGEST))
        else:
            self.weights.fill_(1.0)
        return self._mean(counts)

    def _mean(self, counts: Tensor) -> Tensor:
        present = counts > 0
        return self.weights * present / present.sum()

    def metrics(self) -> dict[str, float]:
        """`balancer/weight_<g>`: a_g."""
        return _numbered("weight", self.weights)


Balancer = LossBalancer | GradientBalancer


def build_balancer(config: WeightingConfig, schedule: NoiseSchedule) -> Balancer | None:
    """The balancer that a configuration asks for; its `intervals` are those to draw timesteps from.

    Raises:
        ValueError: as `build_intervals`.
    """
    builder = BALANCERS.get(config.name)
    return None if builder is None else builder(config, build_intervals(config, schedule))


def _nash(config: NashWeighting, intervals: Sequence[Interval]) -> NashMTL:
    return NashMTL(intervals, config.every_steps)


BALANCERS: dict[str, Callable[[Any, Sequence[Interval]], Balancer]] = {
    "ant_uw": lambda _, intervals: UncertaintyWeighting(intervals),
    "ant_pcgrad": lambda _, intervals: PCGrad(intervals),
    "ant_nash": _nash,
}


def _numbered(name: str, values: Tensor) -> dict[str, float]:
    return {f"balancer/{name}_{number}": value for number, value in enumerate(values.tolist())}
