"""The data's own features and their statistics: computed once, cached, shared by all trials.

Shapes: N features, D their size, R the rank of their covariance.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from dtr_ray.data import ImageData
from dtr_ray.data.cache import build_once, write_npy
from dtr_ray.evaluation.features import Extractor
from dtr_ray.evaluation.metrics import Array, covariance_root, frechet_distance_to
from dtr_ray.randomness import keyed_generator

MAX_FEATURES = 50_000
"""Images whose features are kept, for metrics that need more than statistics: 0.4 GB of Inception's."""
_ORDER_STREAM = 300
"""Of the order in which features are kept: apart from all other random numbers."""


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
    data: ImageData,
    extractor: Extractor,
    cache_dir: Path,
    batch_size: int = 250,
    features: NDArray[np.float32] | None = None,
) -> Reference:
    """Statistics of all images of `data`, none of them flipped; read from the cache where they are there.

    The file is keyed by the data's identity (name, resolution, content) and the extractor's name. One
    process computes it while others wait.

    Args:
        data: the images.
        extractor: of their features.
        cache_dir: where the file is.
        batch_size: images that are extracted at once.
        features: of `reference_features`; where they are those of all images, none is extracted again.

    Raises:
        ValueError: fewer than 2 images.
    """
    if len(data) < 2:
        raise ValueError(f"statistics need at least 2 images; the data has {len(data)}")
    path = cache_dir / f"reference-{data.identity}-{extractor.name}.npz"

    def batches() -> Iterator[Array]:
        if features is not None and len(features) == len(data):
            yield from (
                features[i : i + batch_size].astype(np.float64) for i in range(0, len(data), batch_size)
            )
        else:
            for indices in torch.split(torch.arange(len(data)), batch_size):
                yield extractor(data.pixels(indices)).double().cpu().numpy()

    build_once(path, lambda temporary: _compute(batches(), len(data), temporary))
    with np.load(path, allow_pickle=False) as arrays:
        return Reference(arrays["mu"], arrays["sigma"], arrays["root"], int(arrays["num_images"]))


def reference_features(
    data: ImageData, extractor: Extractor, cache_dir: Path, batch_size: int = 250
) -> NDArray[np.float32]:
    """Features of the data's own images, none of them flipped: float32 (N, D), mapped from the cache.

    Of all images, or of MAX_FEATURES that are drawn once for all where there are more; in random order, so
    that the first n are a fair choice of n. The file is keyed as that of the statistics.

    Raises:
        ValueError: fewer than 2 images.
    """
    if len(data) < 2:
        raise ValueError(f"distances need at least 2 images; the data has {len(data)}")
    count = min(len(data), MAX_FEATURES)
    path = cache_dir / f"features-{data.identity}-{extractor.name}-{count}.npy"
    chosen = torch.randperm(len(data), generator=keyed_generator(0, _ORDER_STREAM))[:count]

    def chunks() -> Iterator[NDArray[np.float32]]:
        for indices in chosen.split(batch_size):
            yield extractor(data.pixels(indices)).cpu().numpy()

    shape = (count, extractor.num_features)
    build_once(path, lambda temporary: write_npy(temporary, shape, np.float32, chunks()))
    # Copy on write: torch warns of maps that it must not write to.
    features: NDArray[np.float32] = np.load(path, mmap_mode="c", allow_pickle=False)
    return features


def _compute(batches: Iterator[Array], num_images: int, path: Path) -> None:
    # Sums, not the features themselves: those of ImageNet would take 21 GB. Subtracting the first batch's
    # mean from all keeps the sums' digits.
    first = next(batches)
    shift = first.mean(0)
    total, products = np.zeros(len(shift)), np.zeros((len(shift), len(shift)))
    for features in chain([first], batches):
        features -= shift
        total += features.sum(0)
        products += features.T @ features
    mean = total / num_images
    sigma = (products - num_images * np.outer(mean, mean)) / (num_images - 1)
    with path.open("wb") as file:
        np.savez(file, mu=mean + shift, sigma=sigma, root=covariance_root(sigma), num_images=num_images)
