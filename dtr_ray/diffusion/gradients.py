"""Combining the gradients of several losses: their Gram matrix, PCGrad and NashMTL. K gradients of P numbers.

Both methods give a linear combination of the gradients, whose coefficients follow from the K x K Gram matrix.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = TypeVar("Array", Tensor, NDArray[np.floating[Any]])

# Of the cosines, added to the diagonal where the bargain has no answer without.
_RIDGE = 1e-8
# Largest residual |a (G a) - 1| that counts as an answer, as good as rounding lets it be.
_SOLVED = 1e-3


def gram_matrix(gradients: Tensor) -> Tensor:
    """All dot products of gradients (K, P), float64 (K, K): products and sums in float64, in small parts."""
    # On a CPU as large as its cache.
    part = 1 << (22 if gradients.device.type == "cuda" else 12)
    gram = gradients.new_zeros(len(gradients), len(gradients), dtype=torch.float64)
    for columns in gradients.split(part, dim=1):
        exact = columns.double()
        gram.addmm_(exact, exact.T)
    return gram


def projection_coefficients(gram: Tensor, orders: Tensor) -> Tensor:
    """What remains of each gradient after PCGrad's projections, as a combination of the originals.

    Yu et al., "Gradient Surgery for Multi-Task Learning", algorithm 1: gradient i, as it is by then, meets
    the originals j one after the other, and loses its part along j where their product is negative. The
    authors' code lets it meet its own original, too; so do we, where the order says so.

    Args:
        gram: float64 (K, K), dot products of the gradients.
        orders: int64 (K, n), row i in which order gradient i meets the others; on the device of `gram`.

    Returns:
        float64 (K, K), row i the coefficients of the projected gradient i. Nothing waits for the device.
    """
    coefficients = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for met in orders.unbind(1):
        product = (coefficients * gram[met]).sum(1)
        # A gradient of zeros conflicts with none: never is the division by its square used.
        change = (product / gram.diagonal()[met]).where(product < 0, 0.0)
        coefficients.scatter_add_(1, met[:, None], -change[:, None])
    return coefficients


def project_conflicting_gradients(
    gradients: Array, orders: Tensor | NDArray[np.integer[Any]] | Sequence[int] | Sequence[Sequence[int]]
) -> Array:
    """PCGrad: the sum of the gradients, each without its parts that conflict; see `projection_coefficients`.

    Args:
        gradients: float (K, P), a tensor or an array.
        orders: (K, n) integers in [0, K): row i the gradients that gradient i meets, in order; or (n,), the
            same for all.

    Returns:
        (P,), of the kind and dtype of `gradients`. The sum, as the authors' function has it; their caller
        divides the losses by K, and so takes the mean.

    Raises:
        ValueError: `gradients` is not a matrix, or `orders` are not K rows of numbers in [0, K).
    """
    if isinstance(gradients, np.ndarray):
        return project_conflicting_gradients(torch.from_numpy(gradients), orders).numpy()
    if gradients.ndim != 2:
        raise ValueError(f"gradients are of shape {tuple(gradients.shape)}: they must be a matrix (K, P)")
    rows = torch.as_tensor(orders, dtype=torch.int64, device=gradients.device)
    rows = rows.expand(len(gradients), -1) if rows.ndim == 1 else rows
    if rows.ndim != 2 or len(rows) != len(gradients):
        raise ValueError(f"orders are of shape {tuple(rows.shape)}: they must be {len(gradients)} rows")
    if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < len(gradients)):
        raise ValueError(f"orders name gradients outside [0, {len(gradients)}): {rows.tolist()}")
    coefficients = projection_coefficients(gram_matrix(gradients), rows).sum(0)
    return coefficients.to(gradients.dtype) @ gradients


def nash_weights(gram: Array) -> Array:
    """NashMTL's weights: the a > 0 with G a = 1 / a.

    Navon et al., "Multi-Task Learning as a Bargaining Game", section 3. The weights minimise a'Ga / 2 - sum
    log a, and are found by damped Newton steps, which converge from anywhere as that function is
    self-concordant. For a positive definite G they are unique, and |a_i (G a)_i - 1| is below 1e-7 up to
    condition numbers of about 1e9 of the gradients' cosines; then rounding shows. Otherwise:

    - a row of zeros, a gradient that is none, would want an infinite weight: it takes no part, and gets the
      mean of the others' weights (1 where all are zero);
    - gradients that cancel one another exactly would want infinite weights too: then the answer is that of
      the cosines with 1e-8 added to their diagonal, with weights of at most sqrt(K) 1e4 / norm.

    Args:
        gram: (K, K), dot products of K gradients, symmetric and positive semi-definite.

    Returns:
        float64 (K,), finite and above 0, of the kind of `gram`; a tensor's is on its device.

    Raises:
        ValueError: `gram` is not square, has values that are not finite, or is not positive semi-definite.
    """
    if isinstance(gram, Tensor):
        found = nash_weights(gram.detach().double().cpu().numpy())
        return torch.from_numpy(found).to(gram.device)
    exact = np.asarray(gram, dtype=np.float64)
    if exact.ndim != 2 or exact.shape[0] != exact.shape[1]:
        raise ValueError(f"gram is of shape {exact.shape}: it must be square")
    if not np.isfinite(exact).all():
        raise ValueError("gram has values that are not finite")
    norms = np.sqrt(exact.diagonal().clip(min=0))
    used = norms > 0
    weights = np.ones(len(exact))
    if used.any():
        lengths = norms[used]
        weights[used] = _bargain(exact[np.ix_(used, used)] / lengths / lengths[:, None]) / lengths
        weights[~used] = weights[used].mean()
    return weights


def _bargain(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    """The b > 0 with C b = 1 / b; weights of the gradients scaled to length 1."""
    if np.linalg.eigvalsh((cosines + cosines.T) / 2)[0] < -1e-6:
        raise ValueError("gram is not positive semi-definite")
    found, residual = _newton(cosines)
    if residual > _SOLVED:
        found, _ = _newton(cosines + _RIDGE * np.eye(len(cosines)))
    return found


def _newton(cosines: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """The best b > 0 for C b = 1 / b, and its largest |b_i (C b)_i - 1|: infinite if b grows without end."""
    size = len(cosines)
    point = best = np.full(size, np.sqrt(size / max(float(cosines.sum()), 1.0)))
    lowest = np.inf
    for _ in range(1000):
        missing = 1 - point * (cosines @ point)
        residual = float(np.abs(missing).max())
        # In relative changes of b, the Hessian is well-conditioned: the identity plus a semi-definite matrix.
        change = np.linalg.solve(point * cosines * point[:, None] + np.eye(size), missing)
        decrement = np.sqrt(max(float(missing @ change), 0.0))
        if residual < lowest:
            best, lowest = point, residual
        elif decrement < 0.25:
            break  # steps of rounding errors
        if residual < 1e-14 or point.max() > 1e7:
            break
        # Full steps close to the answer; before, those that cannot leave b > 0.
        point = point * (1 + change / (1 + decrement if decrement >= 0.25 else 1))
    return best, lowest if best.max() <= 1e7 else np.inf
