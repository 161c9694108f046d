"""Intervals of timesteps, half-open (start, stop), and timesteps drawn evenly from them.

T timesteps, K clusters (one an interval), B batch, n measured timesteps. Go et al., "Addressing Negative
Transfer in Diffusion Models" (ANT).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dtr_ray.bounds import uniform_bounds
from dtr_ray.config.trial import DiffusionConfig
from dtr_ray.config.weighting import AffinityIntervals, WeightingConfig
from dtr_ray.diffusion.affinity import Affinity, load_affinity
from dtr_ray.diffusion.clustering import Interval, affinity_costs, best_intervals, snr_costs
from dtr_ray.diffusion.noise import NoiseSchedule, noise_schedule


def uniform_intervals(num_timesteps: int, num_clusters: int) -> list[Interval]:
    """K intervals of T / K timesteps, rounded down to whole bounds, covering [0, T) in order.

    Raises:
        ValueError: K is not in [1, T].
    """
    return uniform_bounds(num_timesteps, num_clusters)


def snr_intervals(snr: ArrayLike | Tensor, num_clusters: int) -> list[Interval]:
    """The K intervals in which the signal-to-noise ratio differs the least from that of their middle (ANT).

    The exact optimum, of the costs that `snr_costs` tells; of several, always the same one.

    Args:
        snr: signal-to-noise ratio of each timestep, (T,), finite; an array or a tensor.
        num_clusters: K, in [1, T].

    Returns:
        K half-open (start, stop), covering [0, T) in order.

    Raises:
        ValueError: `snr` has another shape or a value that is not finite, or K is out of range.
    """
    return best_intervals(snr_costs(_on_host(snr)), num_clusters)


def affinity_intervals(affinity: ArrayLike | Tensor, num_clusters: int) -> list[Interval]:
    """The K intervals whose timesteps' gradients agree the most with those of their middle (ANT).

    The exact optimum, of the costs that `affinity_costs` tells; of several, always the same one.

    Args:
        affinity: (T, T), finite, row c the affinities of timestep c; an array or a tensor.
        num_clusters: K, in [1, T].

    Returns:
        K half-open (start, stop), covering [0, T) in order.

    Raises:
        ValueError: `affinity` has another shape or a value that is not finite, or K is out of range.
    """
    return best_intervals(affinity_costs(_on_host(affinity)), num_clusters)


def measured_intervals(affinity: Affinity, num_clusters: int) -> list[Interval]:
    """As `affinity_intervals`, of n measured timesteps, for all T.

    Two intervals of measured timesteps meet half-way between the neighbours that they end and begin with;
    where that is a timestep, it belongs to the later interval.

    Raises:
        ValueError: K is not in [1, n].
    """
    if not 1 <= num_clusters <= len(affinity.timesteps):
        raise ValueError(
            f"num_clusters is {num_clusters}: it must be from 1 to the {len(affinity.timesteps)} timesteps "
            "that were measured"
        )
    measured = affinity.timesteps.tolist()
    starts = [start for start, _ in affinity_intervals(affinity.matrix, num_clusters)[1:]]
    inner = [(measured[start - 1] + measured[start] + 1) // 2 for start in starts]
    return list(pairwise([0, *inner, affinity.num_timesteps]))


def build_intervals(config: WeightingConfig, schedule: NoiseSchedule) -> list[Interval]:
    """The intervals that the configuration of a balancer (`ant_*`) asks for, covering [0, T) in order.

    Raises:
        ValueError: more clusters than timesteps (or measured ones); or the affinity file is missing, is no
            such file, or is of another number of timesteps. The message names the key and the file.
    """
    assert config.name in ("ant_uw", "ant_pcgrad", "ant_nash"), config.name
    return INTERVALS[config.intervals.name](config.intervals, config.num_clusters, schedule)


def check_intervals(weighting: WeightingConfig, diffusion: DiffusionConfig) -> None:
    """Checks that the affinity file of a trial, where it names one, serves it, before any work starts.

    Raises:
        ValueError: as `build_intervals`.
    """
    if isinstance(getattr(weighting, "intervals", None), AffinityIntervals):
        build_intervals(weighting, noise_schedule(diffusion.schedule, diffusion.num_timesteps))


def _uniform(config: object, num_clusters: int, schedule: NoiseSchedule) -> list[Interval]:
    return uniform_intervals(schedule.num_timesteps, num_clusters)


def _snr(config: object, num_clusters: int, schedule: NoiseSchedule) -> list[Interval]:
    return snr_intervals(schedule.snr, num_clusters)


def _affinity(config: AffinityIntervals, num_clusters: int, schedule: NoiseSchedule) -> list[Interval]:
    path = Path(config.from_).expanduser()
    try:
        affinity = load_affinity(path)
        if affinity.num_timesteps != schedule.num_timesteps:
            raise ValueError(
                f"{str(path)!r} is of {affinity.num_timesteps} timesteps, but diffusion.num_timesteps is "
                f"{schedule.num_timesteps}: measure a model that was trained with as many"
            )
    except ValueError as error:
        raise ValueError(f"weighting.intervals.from: {error}") from error
    try:
        return measured_intervals(affinity, num_clusters)
    except ValueError as error:
        raise ValueError(f"weighting.{error} in {str(path)!r}") from error


INTERVALS: dict[str, Callable[[Any, int, NoiseSchedule], list[Interval]]] = {
    "uniform": _uniform,
    "snr": _snr,
    "affinity": _affinity,
}


def _on_host(values: ArrayLike | Tensor) -> ArrayLike:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def stratified_timesteps(
    intervals: Sequence[Interval], batch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Timesteps for a batch whose consecutive parts belong to the intervals in order.

    Sample i belongs to cluster i * K // B, and its timestep is uniform in that interval. With B < K
    each sample's cluster is drawn from its K / B share of them, or else some would never be trained.

    Args:
        intervals: K half-open intervals.
        batch_size: B, of all workers together, at least 1.
        generator: where the draws come from, and on whose device the answer is.

    Returns:
        t (B,) and cluster (B,), both int64.
    """
    device, clusters = generator.device, len(intervals)
    place = torch.arange(batch_size, device=device)
    if batch_size < clusters:
        shift = torch.rand(batch_size, generator=generator, device=device, dtype=torch.float64)
        cluster = ((place + shift) * (clusters / batch_size)).long().clamp(max=clusters - 1)
    else:
        cluster = place * clusters // batch_size
    start, stop = torch.tensor(intervals, device=device).unbind(1)
    start, width = start[cluster], (stop - start)[cluster]
    share = torch.rand(batch_size, generator=generator, device=device, dtype=torch.float64)
    return start + (share * width).long(), cluster
