"""Rank correlations: how far two figures put the same things in the same order, and how sure that is.

Pure functions of arrays; n things, each with a figure x and a figure y, both float (n,).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]

NUM_RESAMPLES = 2000
LEVEL = 0.95
"""Of the intervals."""
# 8! orders are looked at one by one; of more things, so many orders by chance.
_MAX_EXACT = 8
_NUM_ORDERS = 10_000
_PART_ROWS = 500


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its uncertainty."""

    value: float
    """In [-1, 1]; NaN where all figures of one kind are equal."""
    low: float
    high: float
    """Bootstrap interval of 95 % over the things (percentiles); wide where they are few."""
    p_value: float
    """Share of the orders of y that agree with x as much or more, either way: exact for n up to 8."""


def spearman(x: ArrayLike, y: ArrayLike, seed: int = 0) -> Correlation:
    """Spearman's rho: Pearson's correlation of the ranks, ties sharing theirs.

    Raises ValueError for fewer than 3 things, other shapes, or figures that are not finite.
    """
    return _correlation(_rho, x, y, seed)


def kendall(x: ArrayLike, y: ArrayLike, seed: int = 0) -> Correlation:
    """Kendall's tau-b: pairs in the same order minus pairs in the other, over all that are not tied.

    Raises as `spearman`.
    """
    return _correlation(_tau, x, y, seed)


def kept(x: ArrayLike, y: ArrayLike, count: int) -> int:
    """How many of the `count` lowest by y are among the `count` lowest by x: what a cut by x leaves."""
    lowest = [set(np.argsort(np.asarray(figures), kind="stable")[:count].tolist()) for figures in (x, y)]
    return len(lowest[0] & lowest[1])


def _correlation(
    measure: Callable[[Array, Array], Array], x: ArrayLike, y: ArrayLike, seed: int
) -> Correlation:
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 3:
        raise ValueError(
            f"a rank correlation takes two figures of at least 3 things; got {a.shape}, {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a rank correlation takes finite figures")
    rng = np.random.default_rng(seed)
    value = float(measure(a[None], b[None])[0])
    drawn = rng.integers(0, len(a), (NUM_RESAMPLES, len(a)))
    resampled = _in_parts(measure, a[drawn], b[drawn])
    # A resample of one thing alone has no order.
    resampled = resampled[np.isfinite(resampled)]
    low, high = (
        np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(resampled) else (np.nan,) * 2
    )
    orders = _orders(len(a), rng)
    others = _in_parts(measure, np.broadcast_to(a, orders.shape), b[orders])
    # Rounding must not take an order that agrees just as much for another.
    p_value = float(np.mean(np.abs(others) >= abs(value) - 1e-9)) if math.isfinite(value) else math.nan
    return Correlation(value, float(low), float(high), p_value)


def _in_parts(measure: Callable[[Array, Array], Array], x: Array, y: Array) -> Array:
    """Row by row, in little memory: all pairs of a row are looked at."""
    parts = range(0, len(x), _PART_ROWS)
    return np.concatenate([measure(x[i : i + _PART_ROWS], y[i : i + _PART_ROWS]) for i in parts])


def _orders(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """All orders of so many things, or many by chance (the given one among them), (orders, count)."""
    if count <= _MAX_EXACT:
        return np.array(list(itertools.permutations(range(count))))
    drawn = rng.permuted(np.tile(np.arange(count), (_NUM_ORDERS, 1)), axis=1)
    return np.concatenate([np.arange(count)[None], drawn])


def _rho(x: Array, y: Array) -> Array:
    """Row by row: (r, n), (r, n) -> (r,)."""
    ranks = [rankdata(figures, axis=1) for figures in (x, y)]
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    return _ratio((a * b).sum(1), (a * a).sum(1), (b * b).sum(1))


def _tau(x: Array, y: Array) -> Array:
    """Row by row: (r, n), (r, n) -> (r,)."""
    first, second = np.triu_indices(x.shape[1], k=1)
    a, b = (np.sign(figures[:, first] - figures[:, second]) for figures in (x, y))
    return _ratio((a * b).sum(1), (a * a).sum(1), (b * b).sum(1))


def _ratio(shared: Array, one: Array, other: Array) -> Array:
    scale = np.sqrt(one * other)
    ratio: Array = np.divide(
        shared, scale, out=np.full(np.broadcast(shared, scale).shape, np.nan), where=scale > 0
    )
    return ratio
