"""Distances between two sets of images, from their features; all in float64.

Shapes: N samples, D features. Arguments are numpy arrays or CPU tensors.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_EPSILON = float(np.finfo(np.float64).eps)
# Rows whose distances to all others are held in memory at once.
_CHUNK_ROWS = 2048


def statistics(features: ArrayLike) -> tuple[Array, Array]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), N at least 2."""
    x = _features("features", features)
    mu = x.mean(0)
    centred = x - mu
    return mu, centred.T @ centred / (len(x) - 1)


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
    values, vectors = np.linalg.eigh(_covariance("sigma", sigma))
    largest = max(float(values[-1]), 0.0)
    if values[0] < -1e-6 * largest or (largest == 0 and values[0] < 0):
        raise ValueError(f"sigma is no covariance: its smallest eigenvalue is {values[0]:g}")
    kept = values > len(values) * _EPSILON * largest
    root: Array = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    return root


def frechet_distance_to(
    mu1: ArrayLike, sigma1: ArrayLike, root1: Array, mu2: ArrayLike, sigma2: ArrayLike
) -> float:
    """`frechet_distance` with `root1 = covariance_root(sigma1)` known: one decomposition instead of two."""
    m1, m2 = _vector("mu1", mu1), _vector("mu2", mu2)
    s1, s2 = _covariance("sigma1", sigma1), _covariance("sigma2", sigma2)
    if not m1.shape == m2.shape == s1.shape[:1] == s2.shape[:1]:
        raise ValueError(
            f"dimensions differ: mu1 {m1.shape}, sigma1 {s1.shape}, mu2 {m2.shape}, sigma2 {s2.shape}"
        )
    # sigma1 sigma2 has the eigenvalues of F sigma2 F^T and zeros besides; the latter is symmetric.
    product = root1 @ s2 @ root1.T
    values = np.linalg.eigvalsh((product + product.T) / 2) if len(product) else np.zeros(1)
    overlap = np.sqrt(values.clip(0)).sum()
    return max(float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * overlap), 0.0)


def kernel_distance(
    real: ArrayLike, fake: ArrayLike, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> float:
    """Kernel distance; of Inception features, the KID (Bińkowski et al., 2018), as clean-fid has it.

    The unbiased squared MMD under the kernel (x.y / D + 1)^3, averaged over random subsets; it may be
    slightly negative.

    Args:
        real: features (N, D).
        fake: features (M, D).
        num_subsets: pairs of subsets that are averaged.
        subset_size: samples a subset, drawn without replacement; at most N and M.
        seed: of the subsets.
    """
    x, y = _pair(real, fake)
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(f"num_subsets {num_subsets} is below 1, or subset_size {subset_size} below 2")
    size = min(len(x), len(y), subset_size)
    rng = np.random.default_rng(seed)
    total = 0.0
    for _ in range(num_subsets):
        a = x[rng.choice(len(x), size, replace=False)]
        b = y[rng.choice(len(y), size, replace=False)]
        within = _kernel(a, a) + _kernel(b, b)
        unbiased = (within.sum() - np.trace(within)) / (size * (size - 1))
        total += float(unbiased - 2 * _kernel(a, b).mean())
    return total / num_subsets


def inception_score(probabilities: ArrayLike, num_splits: int = 10) -> float:
    """Inception score (Salimans et al., 2016): exp of the mean KL(p(y|x) || p(y)), averaged over splits.

    Args:
        probabilities: class probabilities p(y|x) of the samples (N, K), each row summing to 1.
        num_splits: consecutive parts of the samples, each with a p(y) of its own.

    Returns:
        the score, from 1 to K.
    """
    p = _features("probabilities", probabilities)
    if p.min() < 0 or np.abs(p.sum(1) - 1).max() > 1e-3:
        raise ValueError("probabilities has a negative value, or a row that does not sum to 1")
    if not 1 <= num_splits <= len(p):
        raise ValueError(f"num_splits is between 1 and the {len(p)} samples; got {num_splits}")
    scores = []
    for part in np.array_split(p, num_splits):
        marginal = part.mean(0)
        ratio = np.divide(part, marginal, out=np.ones_like(part), where=part > 0)
        scores.append(np.exp((part * np.log(ratio)).sum(1).mean()))
    return float(np.mean(scores))


def precision_recall(real: ArrayLike, fake: ArrayLike, num_neighbors: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019, eq. 1 and 2), each in [0, 1].

    Precision is the share of fake features that lie within the distance from some real feature to its
    `num_neighbors`-th nearest real one; recall is the same with the sets exchanged.

    Args:
        real: features (N, D).
        fake: features (M, D).
        num_neighbors: below N and M.
    """
    x, y = _pair(real, fake)
    if not 1 <= num_neighbors < min(len(x), len(y)):
        raise ValueError(
            f"num_neighbors is at least 1 and below the numbers of samples, {len(x)} and {len(y)}; "
            f"got {num_neighbors}"
        )
    # Around the origin, squares are small and their differences keep more digits.
    centre = x.mean(0)
    x, y = x - centre, y - centre
    return _coverage(x, y, num_neighbors), _coverage(y, x, num_neighbors)


def _coverage(centres: Array, points: Array, num_neighbors: int) -> float:
    covered = np.zeros(len(points), dtype=bool)
    for start in range(0, len(centres), _CHUNK_ROWS):
        rows = centres[start : start + _CHUNK_ROWS]
        among = _squared_distances(rows, centres)
        among[np.arange(len(rows)), start + np.arange(len(rows))] = np.inf
        radii = np.partition(among, num_neighbors - 1, axis=1)[:, num_neighbors - 1]
        covered |= (_squared_distances(rows, points) <= radii[:, None]).any(0)
    return float(covered.mean())


def _squared_distances(a: Array, b: Array) -> Array:
    lengths = (a**2).sum(1)[:, None] + (b**2).sum(1)
    squared: Array = lengths - 2 * (a @ b.T)
    # Equal rows differ by rounding alone.
    squared[squared < 1e-13 * lengths] = 0
    return squared


def _kernel(a: Array, b: Array) -> Array:
    kernel: Array = (a @ b.T / a.shape[1] + 1) ** 3
    return kernel


def _finite(name: str, values: ArrayLike, num_dims: int) -> Array:
    array: NDArray[Any] = np.asarray(values, dtype=np.float64)
    if array.ndim != num_dims or array.size == 0:
        raise ValueError(f"{name} has {num_dims} dimensions and is not empty; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite")
    return array


def _vector(name: str, values: ArrayLike) -> Array:
    return _finite(name, values, 1)


def _features(name: str, values: ArrayLike) -> Array:
    array = _finite(name, values, 2)
    if len(array) < 2:
        raise ValueError(f"{name} needs at least 2 samples; got {len(array)}")
    return array


def _pair(real: ArrayLike, fake: ArrayLike) -> tuple[Array, Array]:
    x, y = _features("real", real), _features("fake", fake)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"real has {x.shape[1]} features and fake {y.shape[1]}")
    return x, y


def _covariance(name: str, values: ArrayLike) -> Array:
    array = _finite(name, values, 2)
    if array.shape[0] != array.shape[1] or np.abs(array - array.T).max() > 1e-6 * np.abs(array).max():
        raise ValueError(f"{name} is no covariance: it is not symmetric (shape {array.shape})")
    return array
