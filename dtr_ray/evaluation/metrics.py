"""Distances between two sets of images, from their features; all in float64.

Shapes: N samples, D features. Arguments are numpy arrays (memory maps too) or tensors, of any float type.
They are widened to float64 block by block: 50,000 x 2,048 features take no copy of the whole. Kernel
distance, precision and recall are computed on the device of the `fake` tensor.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dtr_ray.evaluation.arrays import Array, pair, samples
from dtr_ray.evaluation.frechet import (
    covariance_root,
    frechet_distance,
    frechet_distance_of,
    frechet_distance_to,
    statistics,
)
from dtr_ray.evaluation.neighbours import precision_recall

__all__ = [
    "Array",
    "covariance_root",
    "frechet_distance",
    "frechet_distance_of",
    "frechet_distance_to",
    "inception_score",
    "kernel_distance",
    "precision_recall",
    "statistics",
]


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
    x, y = pair(real, fake)
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
    p = samples("probabilities", probabilities).cpu().numpy()
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


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    kernel: Tensor = (a @ b.T / a.shape[1] + 1) ** 3
    return kernel
