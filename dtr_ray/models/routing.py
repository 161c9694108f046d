"""Routing masks: which channels serve which timestep. T timesteps, C channels, K intervals of timesteps.

Park et al., "Denoising Task Routing for Diffusion Models" (DTR), section 4, pseudo-code 1 and table 8.
Masks are bool (T, C) on the CPU; row t belongs to the integer training timestep t in [0, T).
Which routing configuration asks for which of them: see `router.py`.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from dtr_ray.bounds import uniform_bounds


def dtr_mask(
    num_timesteps: int, num_channels: int, alpha: float, beta: float, rule: str = "pseudo_code"
) -> Tensor:
    """A window of channels that moves from the first channels to the last as t grows.

    By `pseudo_code` it is `int(beta * C)` wide and starts at round((C - width) * (t / (T - 1)) ** alpha),
    halves rounded to even (DTR, pseudo-code 1, and the authors' code). By `equation`, with s(x) = round((C -
    width) * x ** alpha), it goes from s(t / T) to s((t + 1) / T) + width (DTR, eq. (4), whose t counts from
    1): it holds the other window, and is wider by each move, in all by C - width entries of the mask.

    Args:
        num_timesteps: T, at least 2.
        num_channels: C, enough for one channel on.
        alpha: above 0; the larger it is, the longer the window stays at the first channels.
        beta: share of channels on, in (0, 1].
        rule: `pseudo_code` or `equation`.

    Returns:
        bool (T, C).

    Raises:
        ValueError: where an argument is out of its range.
    """
    width = _num_on(num_timesteps, num_channels, beta)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha is {alpha}: it must be a finite number above 0")
    if rule not in ("pseudo_code", "equation"):
        raise ValueError(f"rule is {rule!r}: it must be 'pseudo_code' or 'equation'")
    span, last = num_channels - width, num_timesteps - (rule == "pseudo_code")
    # Python's pow is exact where the result is, so that halves fall on the same side everywhere;
    # vectorised powers differ in the last digit between machines.
    places = torch.tensor([round(span * (t / last) ** alpha) for t in range(last + 1)], device="cpu")
    start = places[:num_timesteps, None]
    stop = places[-num_timesteps:, None] + width
    channel = torch.arange(num_channels, device="cpu")
    return (channel >= start) & (channel < stop)


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
    return max_roaming_mask(num_timesteps, num_channels, beta, seed, num_moves=0)


def max_roaming_mask(num_timesteps: int, num_channels: int, beta: float, seed: int, num_moves: int) -> Tensor:
    """A random mask after some moves, each of which exchanges one channel of each timestep.

    Every timestep has a random order of the channels, closed to a ring, and the `int(beta * C)` that follow
    one another from some place are on. A move goes on by one place: one channel leaves, and the one that has
    not been on for the longest, if ever, comes in; after C - width moves all have been on. (Pascal et al.,
    "Maximum Roaming Multi-Task Learning", where the channels that leave and come in are drawn on
    the way. Here nothing is, so no state needs storing.)

    Args:
        num_timesteps: T, at least 2.
        num_channels: C, enough for one channel on.
        beta: share of channels on, in (0, 1].
        seed: of the generator, 0 or above.
        num_moves: 0 or above; 0 gives `random_mask`.

    Returns:
        bool (T, C).

    Raises:
        ValueError: where an argument is out of its range.
    """
    width = _num_on(num_timesteps, num_channels, beta)
    if seed < 0:
        raise ValueError(f"seed is {seed}: it must be 0 or above")
    if num_moves < 0:
        raise ValueError(f"num_moves is {num_moves}: it must be 0 or above")
    place = _random_places(num_timesteps, num_channels, seed)
    return (place - num_moves % num_channels).remainder(num_channels) < width


def clustered_mask(
    num_timesteps: int, num_channels: int, alpha: float, beta: float, num_clusters: int
) -> Tensor:
    """DTR's mask with K uniform intervals for tasks: all timesteps of one have the same channels (CDTR).

    DTR, table 8 and appendix F, there with K = 8.

    Args:
        num_timesteps: T.
        num_channels: C, enough for one channel on.
        alpha: as for `dtr_mask`.
        beta: as for `dtr_mask`.
        num_clusters: K, in [2, T].

    Returns:
        bool (T, C).

    Raises:
        ValueError: where an argument is out of its range.
    """
    if num_clusters < 2:
        raise ValueError(f"num_clusters is {num_clusters}: it must be at least 2")
    lengths = _lengths(num_timesteps, num_clusters)
    return dtr_mask(num_clusters, num_channels, alpha, beta).repeat_interleave(lengths, dim=0)


def explicit_clustered_mask(
    num_timesteps: int, num_channels: int, shared: float, num_clusters: int
) -> Tensor:
    """The first `int(shared * C)` channels on for all, the others divided evenly over K intervals (ERCDT).

    DTR, table 8 and appendix F, there with half the channels shared and K = 8.

    Args:
        num_timesteps: T.
        num_channels: C.
        shared: share of channels on for all timesteps, in [0, 1).
        num_clusters: K, in [1, T], and no more than the channels that are not shared.

    Returns:
        bool (T, C).

    Raises:
        ValueError: where an argument is out of its range.
    """
    if not 0 <= shared < 1:
        raise ValueError(f"shared is {shared}: it must be in [0, 1)")
    num_shared = int(shared * num_channels)
    own = num_channels - num_shared
    lengths = _lengths(num_timesteps, num_clusters)
    if own < num_clusters:
        raise ValueError(
            f"num_clusters is {num_clusters}: it must be no more than the {own} channels that are not shared"
        )
    channel = torch.arange(num_channels, device="cpu")
    start, stop = torch.tensor(uniform_bounds(own, num_clusters), device="cpu").add(num_shared).unbind(1)
    mask = (channel < num_shared) | ((channel >= start[:, None]) & (channel < stop[:, None]))
    return mask.repeat_interleave(lengths, dim=0)


def between(first: float, last: float, share: float, *, ratios: bool = False) -> float:
    """From `first`, at share 0, to `last`, at share 1, both exact: in equal differences, or equal ratios."""
    if share == 1:
        return last
    return first * (last / first) ** share if ratios else first + (last - first) * share


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


def _lengths(num_timesteps: int, num_clusters: int) -> Tensor:
    bounds = uniform_bounds(num_timesteps, num_clusters)
    return torch.tensor([stop - start for start, stop in bounds], device="cpu")


@lru_cache(maxsize=8)
def _random_places(num_timesteps: int, num_channels: int, seed: int) -> Tensor:
    """Each channel's place in each timestep's random order, int32 (T, C); never written to."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    draws = torch.rand(num_timesteps, num_channels, generator=generator, device="cpu")
    return draws.argsort(dim=1, stable=True).argsort(dim=1).int()
