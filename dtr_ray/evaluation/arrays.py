"""Checks of what the metrics take: samples' features, means and covariances."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.float64]
AnyArray = NDArray[Any]
BLOCK_ROWS = 2048
"""Rows that are widened to float64 at once."""


def samples(name: str, values: ArrayLike | Tensor) -> Tensor:
    """At least two finite samples as a tensor (N, D), in float32 or float64 where it is."""
    if isinstance(values, Tensor):
        x = values.detach()
    else:
        array: AnyArray = np.asarray(values)
        dtype = array.dtype if array.dtype in (np.float32, np.float64) else np.float64
        # Copied only where torch does not take it as it is: it warns of what it must not write to.
        x = torch.from_numpy(np.require(array, dtype, ["C", "W"]))
    if x.dtype not in (torch.float32, torch.float64):
        x = x.double()
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"{name} has 2 dimensions and is not empty; got shape {tuple(x.shape)}")
    if not all(part.isfinite().all() for part in x.split(BLOCK_ROWS)):
        raise ValueError(f"{name} has values that are not finite")
    if len(x) < 2:
        raise ValueError(f"{name} needs at least 2 samples; got {len(x)}")
    return x


def _finite(name: str, values: ArrayLike, num_dims: int) -> Array:
    array: AnyArray = np.asarray(values, dtype=np.float64)
    if array.ndim != num_dims or array.size == 0:
        raise ValueError(f"{name} has {num_dims} dimensions and is not empty; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite")
    return array


def vector(name: str, values: ArrayLike) -> Array:
    """A finite vector in float64."""
    return _finite(name, values, 1)


def pair(real: ArrayLike | Tensor, fake: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of samples of equally many features."""
    x, y = samples("real", real), samples("fake", fake)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"real has {x.shape[1]} features and fake {y.shape[1]}")
    return x, y


def covariance(name: str, values: ArrayLike) -> Array:
    """A finite symmetric matrix in float64."""
    array = _finite(name, values, 2)
    if array.shape[0] != array.shape[1] or np.abs(array - array.T).max() > 1e-6 * np.abs(array).max():
        raise ValueError(f"{name} is no covariance: it is not symmetric (shape {array.shape})")
    return array
