"""Bounds of uniform intervals of timesteps: for masks, models and losses alike."""

from itertools import pairwise


def uniform_bounds(num_timesteps: int, num_clusters: int) -> list[tuple[int, int]]:
    """K half-open intervals (start, stop) of T / K timesteps, rounded down to whole bounds, covering [0, T).

    Raises:
        ValueError: K is not in [1, T].
    """
    if not 1 <= num_clusters <= num_timesteps:
        raise ValueError(f"num_clusters is {num_clusters}: it must be from 1 to {num_timesteps} timesteps")
    # In integers: int(T / K * i) loses the last timestep for some K (19, 38, 61, ... at T = 1000).
    return list(pairwise(i * num_timesteps // num_clusters for i in range(num_clusters + 1)))
