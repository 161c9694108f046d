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
from torch import Tensor

from dtr_ray.cache import build_once, write_npy
from dtr_ray.config import DataConfig
from dtr_ray.data import ImageData
from dtr_ray.data.arrays import load_array, load_arrays
from dtr_ray.data.prepared import check_prepared
from dtr_ray.evaluation.features import Extractor
from dtr_ray.evaluation.metrics import Array, covariance_root, frechet_distance_of, frechet_distance_to
from dtr_ray.evaluation.uncertainty import FrechetEstimate, frechet_estimate
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

    def frechet_distance_of(self, features: ArrayLike | Tensor) -> float:
        """Fréchet distance of samples to the data, from their features (N, D) by the cheapest exact way."""
        return frechet_distance_of(self.mu, self.sigma, self.root, features)

    def frechet_estimate(
        self, features: ArrayLike | Tensor, strata: ArrayLike | Tensor | None = None
    ) -> FrechetEstimate:
        """The same distance with its standard error and its extrapolation to infinitely many samples.

        Args:
            features: of the samples (N, D).
            strata: whole numbers (N,), the samples' classes, where the classes come in turn; default: the
                samples are drawn independently.
        """
        return frechet_estimate(self.mu, self.sigma, self.root, features, strata)


def reference_statistics(
    data: ImageData,
    extractor: Extractor,
    cache_dir: Path,
    batch_size: int = 250,
    features: NDArray[np.float32] | None = None,
) -> Reference:
    """Statistics of all images of `data`, none of them flipped; read where they are there.

    From a prepared folder where it has them, else from the cache, by the data's identity (name, resolution,
    content) and the extractor's name: one process computes the file while others wait.

    Args:
        data: the images.
        extractor: of their features.
        cache_dir: where the file is.
        batch_size: images that are extracted at once.
        features: of `reference_features`; where they are those of all images, none is extracted again.

    Raises:
        ValueError: fewer than 2 images, or no pixels to compute them from.
    """
    if len(data) < 2:
        raise ValueError(f"statistics need at least 2 images; the data has {len(data)}")
    path = cache_dir / f"reference-{data.identity}-{extractor.name}.npz"
    ready = data.references.get(extractor.name)

    def batches() -> Iterator[Array]:
        if features is not None and len(features) == len(data):
            yield from (
                features[i : i + batch_size].astype(np.float64) for i in range(0, len(data), batch_size)
            )
        else:
            for indices in torch.split(torch.arange(len(data)), batch_size):
                yield extractor(data.pixels(indices)).double().cpu().numpy()

    if ready is None:
        build_once(path, lambda temporary: write_statistics(batches(), len(data), temporary))
    file = path if ready is None else ready.statistics
    mu, sigma, root, num_images = load_arrays(file, ("mu", "sigma", "root", "num_images"))
    count = extractor.num_features
    if (mu.shape, sigma.shape, root.shape[1:], num_images.shape) != ((count,), (count, count), (count,), ()):
        raise ValueError(f"{file} does not hold the statistics of {count} features: remove it")
    return Reference(mu, sigma, root, int(num_images))


def reference_features(
    data: ImageData, extractor: Extractor, cache_dir: Path, batch_size: int = 250
) -> NDArray[np.float32]:
    """Features of the data's own images, none of them flipped: float32 (N, D), mapped from the cache.

    Of all images, or of MAX_FEATURES that are drawn once for all where there are more; in random order, so
    that the first n are a fair choice of n. The file is found and keyed as that of the statistics.

    Raises:
        ValueError: fewer than 2 images, or no pixels to compute them from.
    """
    if len(data) < 2:
        raise ValueError(f"distances need at least 2 images; the data has {len(data)}")
    count = min(len(data), MAX_FEATURES)
    path = cache_dir / f"features-{data.identity}-{extractor.name}-{count}.npy"
    chosen = kept_images(len(data))

    def chunks() -> Iterator[NDArray[np.float32]]:
        for indices in chosen.split(batch_size):
            yield extractor(data.pixels(indices)).cpu().numpy()

    shape = (count, extractor.num_features)
    ready = data.references.get(extractor.name)
    if ready is None:
        build_once(path, lambda temporary: write_npy(temporary, shape, np.float32, chunks()))
    # Copy on write: torch warns of maps that it must not write to.
    features: NDArray[np.float32] = load_array(path if ready is None else ready.features, mmap_mode="c")
    return features


def check_references(data: DataConfig, extractor_name: str) -> None:
    """Quickly checks that evaluation can have the features of the data's own images; computes none.

    Raises:
        ValueError: the data is a prepared folder that has neither those of this extractor, nor pixels to
            compute them from.
    """
    if data.name != "prepared":
        return
    manifest = check_prepared(data)
    if extractor_name in manifest.references or manifest.has_pixels:
        return
    made = ", ".join(manifest.references)
    choose = f"choose evaluation.features: {' or '.join(manifest.references)}, or " if made else ""
    raise ValueError(
        f"evaluation.features is {extractor_name}, but {data.path} has references of {made or 'none'} alone, "
        f"and no pixels to make others from: {choose}prepare the data again with "
        f"features: [{', '.join([*manifest.references, extractor_name])}] (or keep_pixels: true)"
    )


def kept_images(num_images: int) -> Tensor:
    """Numbers of the images whose features are kept, in their random order: int64 (at most MAX_FEATURES,)."""
    return torch.randperm(num_images, generator=keyed_generator(0, _ORDER_STREAM))[:MAX_FEATURES]


def write_statistics(batches: Iterator[Array], num_images: int, path: Path) -> None:
    """Writes the statistics of all images' features as a `Reference` is read; `batches` float64 (B, D)."""
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
