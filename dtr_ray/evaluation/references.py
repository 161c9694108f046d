"""The data's own statistics under an extractor: computed once, cached, shared by all trials.

Shapes: D features, R the rank of their covariance.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from dtr_ray.data import ImageData
from dtr_ray.data.cache import build_once
from dtr_ray.evaluation.features import Extractor
from dtr_ray.evaluation.metrics import Array, covariance_root, frechet_distance_to


@dataclass(frozen=True)
class Reference:
    """Statistics of a data set's features, float64."""

    mu: Array
    """Mean (D,)."""
    sigma: Array
    """Covariance (D, D)."""
    root: Array
    """`covariance_root(sigma)`, (R, D)."""
    num_images: int

    def frechet_distance(self, mu: ArrayLike, sigma: ArrayLike) -> float:
        """Fréchet distance of other features' mean (D,) and covariance (D, D) to the data's."""
        return frechet_distance_to(self.mu, self.sigma, self.root, mu, sigma)


def reference_statistics(
    data: ImageData, extractor: Extractor, cache_dir: Path, batch_size: int = 250
) -> Reference:
    """Statistics of all images of `data`, none of them flipped; read from the cache where they are there.

    The file is keyed by the data's identity (name, resolution, content) and the extractor's name. One
    process computes it while others wait.

    Raises:
        ValueError: fewer than 2 images.
    """
    if len(data) < 2:
        raise ValueError(f"statistics need at least 2 images; the data has {len(data)}")
    path = cache_dir / f"reference-{data.identity}-{extractor.name}.npz"
    build_once(path, lambda temporary: _compute(data, extractor, batch_size, temporary))
    with np.load(path, allow_pickle=False) as arrays:
        return Reference(arrays["mu"], arrays["sigma"], arrays["root"], int(arrays["num_images"]))


def _compute(data: ImageData, extractor: Extractor, batch_size: int, path: Path) -> None:
    # Sums, not the features themselves: those of ImageNet would take 21 GB. Subtracting the first batch's
    # mean from all keeps the sums' digits.
    shift: Array | None = None
    total, products = np.zeros(extractor.num_features), np.zeros((extractor.num_features,) * 2)
    for indices in torch.split(torch.arange(len(data)), batch_size):
        features = extractor(data.pixels(indices)).double().cpu().numpy()
        if shift is None:
            shift = features.mean(0)
        features -= shift
        total += features.sum(0)
        products += features.T @ features
    assert shift is not None
    mean = total / len(data)
    sigma = (products - len(data) * np.outer(mean, mean)) / (len(data) - 1)
    with path.open("wb") as file:
        np.savez(file, mu=mean + shift, sigma=sigma, root=covariance_root(sigma), num_images=len(data))
