"""Interval clustering: the exact optimum of ANT's objectives, by dynamic programming. T points, K clusters.

Go et al., "Addressing Negative Transfer in Diffusion Models" (ANT), section 4: the T timesteps are cut into
K intervals so that the sum of the intervals' costs is the least. The costs are those of the authors' code;
its search is not: it never begins with an interval of a single timestep, and returns bounds that are off by
one, so that its result is often not the least.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[int, int]
Matrix = NDArray[np.float64]


def snr_costs(snr: ArrayLike) -> Matrix:
    """Cost of every interval [l, r]: the sum of |snr_i - snr_c| over it, c = (l + r + 1) / 2.

    A half is rounded to the even neighbour, as in the authors' code; one timestep alone costs nothing.

    Args:
        snr: of each timestep, (T,), finite, in any order.

    Returns:
        float64 (T, T), [l, r]; infinite where r < l.

    Raises:
        ValueError: another shape, or a value that is not finite.
    """
    snr = _finite("snr", snr)
    if snr.ndim != 1 or not snr.size:
        raise ValueError(f"snr has shape {snr.shape}: it must be (T,), a ratio for each timestep")
    first, last = _bounds(len(snr))
    # numpy rounds a half to the even neighbour.
    centre = np.rint((first + last + 1) / 2).astype(np.int64)
    return _costs(np.abs(snr[:, None] - snr), centre, alone=0.0)


def affinity_costs(affinity: ArrayLike) -> Matrix:
    """Cost of every interval [l, r]: minus the sum of A[c, i] over it, c = floor((l + r + 1) / 2).

    One timestep alone costs -1, the affinity of a gradient with itself.

    Args:
        affinity: A, (T, T), finite; row c has the affinities of c with all others; not always symmetric.

    Returns:
        float64 (T, T), [l, r]; infinite where r < l.

    Raises:
        ValueError: another shape, or a value that is not finite.
    """
    affinity = _finite("affinity", affinity)
    if affinity.ndim != 2 or affinity.shape[0] != affinity.shape[1] or not affinity.size:
        raise ValueError(f"affinity has shape {affinity.shape}: it must be (T, T), a row for each timestep")
    first, last = _bounds(len(affinity))
    return _costs(-affinity, (first + last + 1) // 2, alone=-1.0)


def best_intervals(costs: Matrix, num_clusters: int) -> list[Interval]:
    """The K intervals that cover [0, T) in order at the least sum of costs.

    Of several with the same sum, the last interval begins as early as it can, then the one before, and so
    on. Takes O(K T^2) operations, a vector operation a cluster, and O(T^2) memory.

    Args:
        costs: of the intervals [l, r], float64 (T, T); infinite where r < l.
        num_clusters: K, in [1, T].

    Returns:
        K half-open (start, stop).

    Raises:
        ValueError: K is out of range.
    """
    num_points = len(costs)
    if not 1 <= num_clusters <= num_points:
        raise ValueError(f"num_clusters is {num_clusters}: it must be from 1 to {num_points} timesteps")
    # least[r]: of the points up to r, in as many intervals as the round says.
    least, starts = costs[0], []
    for _ in range(num_clusters - 1):
        before = np.concatenate([[np.inf], least[:-1]])
        totals = before[:, None] + costs
        starts.append(totals.argmin(0))
        least = totals.min(0)
    intervals, stop = [], num_points
    for choice in reversed(starts):
        start = int(choice[stop - 1])
        intervals.append((start, stop))
        stop = start
    return [(0, stop), *reversed(intervals)]


def _bounds(num_points: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first point of an interval as a column, the last as a row."""
    points = np.arange(num_points)
    return points[:, None], points[None, :]


def _costs(terms: Matrix, centre: NDArray[np.int64], alone: float) -> Matrix:
    """Sums of terms[c, l..r], where c is `centre` [l, r]; `alone` for l = r."""
    # Summed from the centre outwards: differences of sums from 0 would lose the small terms of the SNR,
    # which spans 13 decades, to its largest ones.
    after = np.triu(terms).cumsum(1)
    before = np.tril(terms, -1)[:, ::-1].cumsum(1)[:, ::-1]
    first, last = _bounds(len(terms))
    # The centre of an interval that ends before it begins may be beyond the last point.
    centre = centre.clip(max=len(terms) - 1)
    costs = np.where(last < first, np.inf, before[centre, first] + after[centre, last])
    np.fill_diagonal(costs, alone)
    return costs


def _finite(name: str, values: ArrayLike) -> Matrix:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        wrong = array[~np.isfinite(array)].flat[0]
        raise ValueError(f"{name} has the value {wrong}: all must be finite numbers")
    return array
