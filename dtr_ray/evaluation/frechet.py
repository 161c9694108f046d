"""The Fréchet distance between features, in float64.

Shapes: N samples, D features, R the rank of the reference's covariance.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dtr_ray.evaluation.arrays import BLOCK_ROWS, AnyArray, Array, covariance, samples, vector

_EPSILON = float(np.finfo(np.float64).eps)


def statistics(features: ArrayLike | Tensor) -> tuple[Array, Array]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), N at least 2."""
    x = samples("features", features).cpu().numpy()
    mu: Array = x.mean(0, dtype=np.float64)
    products = np.zeros((x.shape[1], x.shape[1]))
    for _, rows in centred_blocks(x, mu):
        products += rows.T @ rows
    return mu, products / (len(x) - 1)


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Squared Fréchet distance between two Gaussians; of Inception features, the FID (Heusel et al., 2017).

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), at least 0. Covariances may be singular.

    Args:
        mu1: mean (D,).
        sigma1: covariance (D, D).
        mu2: mean (D,).
        sigma2: covariance (D, D).

    Raises:
        ValueError: shapes that do not match, values that are not finite, a matrix that is no covariance.
    """
    return frechet_distance_to(mu1, sigma1, covariance_root(sigma1), mu2, sigma2)


def covariance_root(sigma: ArrayLike) -> Array:
    """A factor F (R, D), R the rank, with F^T F = sigma (D, D): what the distance needs of a reference.

    Eigenvalues that are rounding noise are left out, so a singular covariance adds no noise of its own.
    """
    values, vectors = np.linalg.eigh(covariance("sigma", sigma))
    largest = max(float(values[-1]), 0.0)
    if values[0] < -1e-6 * largest or (largest == 0 and values[0] < 0):
        raise ValueError(f"sigma is no covariance: its smallest eigenvalue is {values[0]:g}")
    kept = above_rounding(values)
    root: Array = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    return root


def frechet_distance_to(
    mu1: ArrayLike, sigma1: ArrayLike, root1: Array, mu2: ArrayLike, sigma2: ArrayLike
) -> float:
    """`frechet_distance` with `root1 = covariance_root(sigma1)` known: one decomposition instead of two."""
    m1, m2 = vector("mu1", mu1), vector("mu2", mu2)
    s1, s2 = covariance("sigma1", sigma1), covariance("sigma2", sigma2)
    if not m1.shape == m2.shape == s1.shape[:1] == s2.shape[:1]:
        raise ValueError(
            f"dimensions differ: mu1 {m1.shape}, sigma1 {s1.shape}, mu2 {m2.shape}, sigma2 {s2.shape}"
        )
    # sigma1 sigma2 has the eigenvalues of F sigma2 F^T and zeros besides; the latter is symmetric.
    product = root1 @ s2 @ root1.T
    overlap = nuclear_norm(np.linalg.eigvalsh((product + product.T) / 2))
    return max(float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * overlap), 0.0)


def frechet_distance_of(mu: ArrayLike, sigma: ArrayLike, root: Array, features: ArrayLike | Tensor) -> float:
    """`frechet_distance` of a reference to samples, from their features (N, D), by the cheaper exact way.

    With Z the centred samples and F the reference's root, the distance takes the singular values of Z F^T.
    Up to R samples they come from the Gram matrix Z F^T F Z^T (N, N), and the samples' covariance (D, D) is
    never formed; beyond, from F Z^T Z F^T (R, R).

    Args:
        mu: the reference's mean (D,).
        sigma: its covariance (D, D).
        root: `covariance_root(sigma)`.
        features: of the samples (N, D), N at least 2.

    Raises:
        ValueError: as `frechet_distance`; fewer than 2 samples.
    """
    x = samples("features", features).cpu().numpy()
    if len(x) > len(root):
        return frechet_distance_to(mu, sigma, root, *statistics(x))
    m1, s1 = reference_of(mu, sigma, x.shape[1])
    mean: Array = x.mean(0, dtype=np.float64)
    projected = project(x, mean, root)
    # One of the eigenvalues is 0, since the samples are centred: the first, but for rounding.
    overlap = nuclear_norm(np.linalg.eigvalsh(projected @ projected.T)[1:]) / math.sqrt(len(x) - 1)
    variance = sum(float((rows**2).sum()) for _, rows in centred_blocks(x, mean)) / (len(x) - 1)
    return max(float(((mean - m1) ** 2).sum() + variance + np.trace(s1) - 2 * overlap), 0.0)


def reference_of(mu: ArrayLike, sigma: ArrayLike, num_features: int) -> tuple[Array, Array]:
    """A reference's mean and covariance, checked to be those of as many features as the samples have."""
    m1, s1 = vector("mu", mu), covariance("sigma", sigma)
    if not len(m1) == len(s1) == num_features:
        raise ValueError(f"dimensions differ: mu {m1.shape}, sigma {s1.shape}, {num_features} features")
    return m1, s1


def project(x: AnyArray, mean: Array, root: Array) -> Array:
    """Centred samples in the reference's coordinates, Z F^T (N, R)."""
    projected = np.empty((len(x), len(root)))
    for part, rows in centred_blocks(x, mean):
        projected[part] = rows @ root.T
    return projected


def nuclear_norm(squares: NDArray[Any]) -> float:
    """The sum of singular values whose squares are given, but for rounding."""
    return float(np.sqrt(squares.clip(0)).sum())


def centred_blocks(x: AnyArray, mean: Array) -> Iterator[tuple[slice, Array]]:
    """The samples a block at a time: where they are, and x - mean in float64."""
    for start in range(0, len(x), BLOCK_ROWS):
        part = slice(start, min(start + BLOCK_ROWS, len(x)))
        yield part, x[part] - mean


def above_rounding(values: Array) -> NDArray[np.bool_]:
    """Which of the ascending eigenvalues of a covariance are more than a zero's rounding noise."""
    largest = max(float(values[-1]), 0.0) if len(values) else 0.0
    return values > len(values) * _EPSILON * largest
