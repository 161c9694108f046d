"""Precision and recall: how far two sets of features cover one another, by their nearest neighbours.

Shapes: N and M samples, D features. Computed in float64 on the device of the `fake` tensor.
"""

from collections.abc import Iterator

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dtr_ray.evaluation.arrays import pair

_BLOCK_ROWS = 2048
"""Rows whose distances to as many others are looked at at once."""
_TIES = 1e-13
"""Squared distances that differ by less, relative to the squared lengths, differ by rounding alone."""


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
    x, y = pair(real, fake)
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
