"""Distances between two sets of images, from their features; all in float64.

Shapes: N samples, D features. Arguments are numpy arrays (memory maps too) or tensors, of any float type.
They are widened to float64 block by block: 50,000 x 2,048 features take no copy of the whole. Kernel
distance, precision and recall are computed on the device of the `fake` tensor.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.float64]
_EPSILON = float(np.finfo(np.float64).eps)
_BLOCK_ROWS = 2048
"""Rows that are widened to float64 at once."""
_TIES = 1e-13
"""Squared distances that differ by less, relative to the squared lengths, differ by rounding alone."""


def statistics(features: ArrayLike | Tensor) -> tuple[Array, Array]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), N at least 2."""
    x = _samples("features", features).cpu().numpy()
    mu: Array = x.mean(0, dtype=np.float64)
    products = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), _BLOCK_ROWS):
        centred = x[start : start + _BLOCK_ROWS] - mu
        products += centred.T @ centred
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
    real: ArrayLike | Tensor,
    fake: ArrayLike | Tensor,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> float:
    """Kernel distance; of Inception features, the KID (Bińkowski et al., 2018), as clean-fid has it.

    The unbiased squared MMD (their eq. 4) under the kernel (x.y / D + 1)^3, averaged over random subsets; it
    may be slightly negative. Papers often quote it times 1,000: this is not.

    Args:
        real: features (N, D), N at least 2.
        fake: features (M, D), M at least 2.
        num_subsets: pairs of subsets that are averaged.
        subset_size: samples a subset, drawn without replacement; N or M where that is less.
        seed: of the subsets.

    Raises:
        ValueError: shapes, sizes or values that are none of these.
    """
    x, y = _pair(real, fake)
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(f"num_subsets {num_subsets} is below 1, or subset_size {subset_size} below 2")
    size = min(len(x), len(y), subset_size)
    rng = np.random.default_rng(seed)
    total = 0.0
    for _ in range(num_subsets):
        chosen = [torch.from_numpy(rng.choice(len(v), size, replace=False)) for v in (x, y)]
        a, b = (v[rows.to(v.device)].to(y.device).double() for v, rows in zip((x, y), chosen, strict=True))
        within = _kernel(a, a) + _kernel(b, b)
        unbiased = (within.sum() - within.trace()) / (size * (size - 1))
        total += float(unbiased - 2 * _kernel(a, b).mean())
    return total / num_subsets


def inception_score(probabilities: ArrayLike | Tensor, num_splits: int = 10) -> float:
    """Inception score (Salimans et al., 2016): exp of the mean KL(p(y|x) || p(y)), averaged over splits.

    Args:
        probabilities: class probabilities p(y|x) of the samples (N, K), each row summing to 1.
        num_splits: consecutive parts of the samples, each with a p(y) of its own; their scores are averaged.

    Returns:
        the score, from 1 to K.

    Raises:
        ValueError: rows that are no probabilities, or `num_splits` not from 1 to N.
    """
    p = _samples("probabilities", probabilities).cpu().numpy()
    if p.min() < 0 or np.abs(p.sum(1, dtype=np.float64) - 1).max() > 1e-3:
        raise ValueError("probabilities has a negative value, or a row that does not sum to 1")
    if not 1 <= num_splits <= len(p):
        raise ValueError(f"num_splits is between 1 and the {len(p)} samples; got {num_splits}")
    scores = []
    for part in np.array_split(p, num_splits):
        rows = part.astype(np.float64)
        ratio = np.divide(rows, rows.mean(0), out=np.ones_like(rows), where=rows > 0)
        scores.append(np.exp((rows * np.log(ratio)).sum(1).mean()))
    return float(np.mean(scores))


def precision_recall(
    real: ArrayLike | Tensor, fake: ArrayLike | Tensor, num_neighbors: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019, eq. 1 and 2), each in [0, 1].

    Precision is the share of fake features that lie within the distance from some real feature to its
    `num_neighbors`-th nearest other real one; recall is the same with the sets exchanged. Both depend on the
    numbers of samples: compare only figures of the same N and M.

    Args:
        real: features (N, D).
        fake: features (M, D).
        num_neighbors: k, at least 1, below N and M.

    Raises:
        ValueError: shapes, sizes or values that are none of these.
    """
    x, y = _pair(real, fake)
    if not 1 <= num_neighbors < min(len(x), len(y)):
        raise ValueError(
            f"num_neighbors is at least 1 and below the numbers of samples, {len(x)} and {len(y)}; "
            f"got {num_neighbors}"
        )
    # Around a point between them, squares are small and their differences keep more digits.
    centre = x.mean(0, dtype=torch.float64).to(y.device)
    real_radii, fake_radii = (_squared_radii(v, centre, num_neighbors) for v in (x, y))
    real_covered = torch.zeros(len(x), dtype=torch.bool, device=y.device)
    fake_covered = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for i, a in _blocks(x, centre):
        for j, b in _blocks(y, centre):
            squared, lengths = _squared_distances(a, b)
            # What lies on the edge of a ball is in it, whatever the rounding.
            squared -= _TIES * lengths
            fake_covered[j] |= (squared <= real_radii[i, None]).any(0)
            real_covered[i] |= (squared <= fake_radii[j]).any(1)
    return float(fake_covered.double().mean()), float(real_covered.double().mean())


def _squared_radii(x: Tensor, centre: Tensor, num_neighbors: int) -> Tensor:
    """Squared distance of each feature to its `num_neighbors`-th nearest other one, float64 (N,)."""
    nearest = torch.full((len(x), num_neighbors), torch.inf, dtype=torch.float64, device=centre.device)
    for i, a in _blocks(x, centre):
        for j, b in _blocks(x, centre, start=i.start):
            squared, _ = _squared_distances(a, b)
            if i == j:
                squared.fill_diagonal_(torch.inf)
            # A distance between two blocks serves the rows of both.
            for rows, found in ((i, squared), (j, squared.T)) if i != j else ((i, squared),):
                candidates = torch.cat([nearest[rows], found], dim=1)
                nearest[rows] = candidates.topk(num_neighbors, dim=1, largest=False).values
    return nearest[:, -1].clamp(min=0)


def _blocks(x: Tensor, centre: Tensor, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """The rows of x from `start` on, a block at a time: where they are, and x - centre in float64."""
    for first in range(start, len(x), _BLOCK_ROWS):
        rows = slice(first, min(first + _BLOCK_ROWS, len(x)))
        yield rows, x[rows].to(centre.device).double() - centre


def _squared_distances(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """|a|^2 + |b|^2 - 2 a.b of all pairs of rows, (len(a), len(b)), and the sums |a|^2 + |b|^2."""
    lengths = (a**2).sum(1)[:, None] + (b**2).sum(1)
    return torch.addmm(lengths, a, b.T, alpha=-2), lengths


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    kernel: Tensor = (a @ b.T / a.shape[1] + 1) ** 3
    return kernel


def _samples(name: str, values: ArrayLike | Tensor) -> Tensor:
    """At least two finite samples as a tensor (N, D), in float32 or float64 where it is."""
    if isinstance(values, Tensor):
        x = values.detach()
    else:
        array: NDArray[Any] = np.asarray(values)
        dtype = array.dtype if array.dtype in (np.float32, np.float64) else np.float64
        # Copied only where torch does not take it as it is: it warns of what it must not write to.
        x = torch.from_numpy(np.require(array, dtype, ["C", "W"]))
    if x.dtype not in (torch.float32, torch.float64):
        x = x.double()
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"{name} has 2 dimensions and is not empty; got shape {tuple(x.shape)}")
    if not all(part.isfinite().all() for part in x.split(_BLOCK_ROWS)):
        raise ValueError(f"{name} has values that are not finite")
    if len(x) < 2:
        raise ValueError(f"{name} needs at least 2 samples; got {len(x)}")
    return x


def _finite(name: str, values: ArrayLike, num_dims: int) -> Array:
    array: NDArray[Any] = np.asarray(values, dtype=np.float64)
    if array.ndim != num_dims or array.size == 0:
        raise ValueError(f"{name} has {num_dims} dimensions and is not empty; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite")
    return array


def _vector(name: str, values: ArrayLike) -> Array:
    return _finite(name, values, 1)


def _pair(real: ArrayLike | Tensor, fake: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    x, y = _samples("real", real), _samples("fake", fake)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"real has {x.shape[1]} features and fake {y.shape[1]}")
    return x, y


def _covariance(name: str, values: ArrayLike) -> Array:
    array = _finite(name, values, 2)
    if array.shape[0] != array.shape[1] or np.abs(array - array.T).max() > 1e-6 * np.abs(array).max():
        raise ValueError(f"{name} is no covariance: it is not symmetric (shape {array.shape})")
    return array
