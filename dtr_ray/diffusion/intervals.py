"""Intervals of timesteps, half-open (start, stop), and timesteps drawn evenly from them.

T timesteps, K clusters (one an interval), B batch. Go et al., "Addressing Negative Transfer in
Diffusion Models" (ANT).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

Interval = tuple[int, int]


def uniform_intervals(num_timesteps: int, num_clusters: int) -> list[Interval]:
    """K intervals of T / K timesteps, rounded down to whole bounds, covering [0, T) in order.

    Raises:
        ValueError: K is not in [1, T].
    """
    if not 1 <= num_clusters <= num_timesteps:
        raise ValueError(f"num_clusters is {num_clusters}: it must be from 1 to {num_timesteps} timesteps")
    # In integers: int(T / K * i) loses the last timestep for some K (19, 38, 61, ... at T = 1000).
    bounds = [i * num_timesteps // num_clusters for i in range(num_clusters + 1)]
    return list(pairwise(bounds))


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
