"""The Fréchet distance's noise and bias: what drawing finitely many samples does to it.

Both come from the exact delete-one jackknife: the distance is known with each sample left out in turn, for
about the price of the distance itself. With Z the centred samples, F the reference's root and lambda_k, v_k
the eigenvalues and eigenvectors of M = F Z^T Z F^T, leaving out sample i takes c y y^T from M, where
y = F z_i and c = N / (N - 1). From log det(M - c y y^T + t) = log det(M + t) + log(1 - c q(t)),
q(t) = sum_k (v_k.y)^2 / (lambda_k + t), and the integral of the square root follows

    tr M^(1/2) - tr (M - c y y^T)^(1/2) = -(1 / pi) * integral over u > 0 of log(1 - c q(u^2)).

Its first order in c is the infinitesimal jackknife's, c/2 sum_k (v_k.y)^2 / lambda_k^(1/2). That alone is not
enough where N is below D or not far above: each sample is then a direction of its own.

Shapes: N samples, D features, R the rank of the reference's covariance, K the rank of M.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dtr_ray.evaluation.arrays import AnyArray, Array, samples
from dtr_ray.evaluation.frechet import (
    above_rounding,
    centred_blocks,
    nuclear_norm,
    project,
    reference_of,
    statistics,
)

_STEP = 0.5
"""Of the trapezoid rule over log u. Its error falls as exp(-pi^2 / step)."""


@dataclass(frozen=True)
class FrechetEstimate:
    """A Fréchet distance, and what its samples say of its noise and bias."""

    distance: float
    """As `frechet_distance_of`, to rounding."""
    standard_error: float
    """Of `distance`, for the noise of drawing the samples; the reference is taken as fixed."""
    num_samples: int
    num_features: int
    leave_one_out: float
    """The mean of the distances with each of the samples left out."""

    @property
    def infinity(self) -> float:
        """The distance at infinitely many samples, extrapolated linearly in 1 / N (Chong & Forsyth, 2020).

        They fit a line to the distances of random subsets. Here it is the line through N and N - 1, the
        latter being the mean of all subsets of that size: no subset is left to chance. About as noisy as
        `distance`; may be slightly negative where there is no distance.

        Raises:
            ValueError: as many features as samples or more, where the bias is far from linear in 1 / N.
        """
        if self.num_samples <= self.num_features:
            raise ValueError(
                f"the distance is extrapolated from more samples than the {self.num_features} features; "
                f"got {self.num_samples}"
            )
        return self.num_samples * self.distance - (self.num_samples - 1) * self.leave_one_out


def frechet_estimate(
    mu: ArrayLike,
    sigma: ArrayLike,
    root: Array,
    features: ArrayLike | Tensor,
    strata: ArrayLike | Tensor | None = None,
) -> FrechetEstimate:
    """Fréchet distance of samples to a reference, with its standard error and its extrapolation.

    Args:
        mu: the reference's mean (D,).
        sigma: its covariance (D, D).
        root: `covariance_root(sigma)`.
        features: of the samples (N, D), N at least 3.
        strata: whole numbers (N,): the samples' classes, where the share of each is fixed and not drawn.
            Differences between the classes are then no noise. Default: independent samples.

    Raises:
        ValueError: as `frechet_distance`; fewer than 3 samples; strata of another number.
    """
    x = samples("features", features).cpu().numpy()
    if len(x) < 3:
        raise ValueError(f"a standard error needs at least 3 samples; got {len(x)}")
    m1, s1 = reference_of(mu, sigma, x.shape[1])
    mean: Array = x.mean(0, dtype=np.float64)
    total, singular, shares = _decompose(x, mean, root)
    lengths, towards, drops = np.empty((3, len(x)))
    for part, rows in centred_blocks(x, mean):
        lengths[part], towards[part] = (rows**2).sum(1), rows @ (mean - m1)
        drops[part] = _drops(singular, shares(part, rows), len(x))
    free, fixed = len(x) - 1, float(np.trace(s1))
    squared, scatter = float(((mean - m1) ** 2).sum()), float(lengths.sum())
    distance = squared + scatter / free + fixed - 2 * total / math.sqrt(free)
    # Of the others, without sample i: mean - z_i / (N - 1) and scatter - N / (N - 1) |z_i|^2.
    without: Array = squared - 2 * towards / free + lengths / free**2 + fixed
    without += (scatter - len(x) / free * lengths) / (free - 1) - 2 * (total - drops) / math.sqrt(free - 1)
    error = _standard_error(without, _strata(strata, len(x)))
    return FrechetEstimate(max(distance, 0.0), error, len(x), x.shape[1], float(without.mean()))


def _decompose(x: AnyArray, mean: Array, root: Array) -> tuple[float, Array, Callable[[slice, Array], Array]]:
    """The spectrum of Z F^T.

    Returns:
        the sum of its singular values, those above rounding (K,), and what gives (v_k.y_i)^2 (n, K) of a
        block of the samples: of its place and the centred samples.
    """
    if len(x) <= len(root):
        projected = project(x, mean, root)
        values, vectors = (part[..., 1:] for part in np.linalg.eigh(projected @ projected.T))
        kept = above_rounding(values)
        known, columns = values[kept], vectors[:, kept]
        return nuclear_norm(values), np.sqrt(known), lambda part, rows: known * columns[part] ** 2
    product = root @ (statistics(x)[1] * (len(x) - 1)) @ root.T
    values, vectors = np.linalg.eigh((product + product.T) / 2)
    kept = above_rounding(values)
    basis = root.T @ vectors[:, kept]
    return nuclear_norm(values), np.sqrt(values[kept]), lambda part, rows: (rows @ basis) ** 2


def _drops(singular: Array, shares: Array, num_samples: int) -> Array:
    """What the sum of the singular values (K,) loses with each of the samples of these shares (n, K)."""
    if len(singular) == 0:
        return np.zeros(len(shares))
    c = num_samples / (num_samples - 1)
    # Below the first node there is nothing to speak of, beyond the last the integrand falls as u^-4.
    first, last = math.log(1e-7 * singular.sum() / num_samples), math.log(1e3 * singular[-1])
    nodes = np.exp(np.arange(first, last + _STEP, _STEP))
    leverage = c * (shares @ (1 / (singular[:, None] ** 2 + nodes**2)))
    # Without its first order, which is known in closed form. Where 1 - leverage is 0, it is rounding noise.
    rest = np.log(np.maximum(1 - leverage, np.finfo(np.float64).eps)) + leverage
    drops: Array = c / 2 * (shares @ (1 / singular)) - rest @ nodes * (_STEP / np.pi)
    return drops


def _strata(strata: ArrayLike | Tensor | None, count: int) -> NDArray[np.int64]:
    """The stratum of each sample, from 0 on; those that have one sample alone are one together."""
    if strata is None:
        return np.zeros(count, np.int64)
    values = strata.cpu().numpy() if isinstance(strata, Tensor) else np.asarray(strata)
    if values.shape != (count,):
        raise ValueError(f"strata has one value for each of the {count} samples; got shape {values.shape}")
    _, found, counts = np.unique(values, return_inverse=True, return_counts=True)
    alone = counts[found] == 1
    return np.where(alone, len(counts), found)


def _standard_error(without: Array, strata: NDArray[np.int64]) -> float:
    """The jackknife's, from the distances without each sample (N,), around the mean of its stratum."""
    counts = np.bincount(strata)
    means = np.bincount(strata, without) / counts.clip(1)
    squares = np.bincount(strata, (without - means[strata]) ** 2)
    several = counts > 1
    variance = float((squares[several] * counts[several] / (counts[several] - 1)).sum())
    return (len(without) - 1) / len(without) * math.sqrt(variance)
