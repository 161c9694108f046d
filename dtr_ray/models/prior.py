"""The diffusion prior loss of Switch-DiT. B batch, T timesteps, E experts a block, M = depth * E columns.

Park et al., "Switch Diffusion Transformer": the experts that all blocks choose at a timestep are to look like
a row of a DTR mask, up to the order of the columns, which a bipartite matching finds anew at each step.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dtr_ray.models.routing import dtr_mask

_ALPHA = 4.0
_TINY = 1e-6


def prior_mask(num_timesteps: int, depth: int, num_experts: int, top_k: int) -> Tensor:
    """The pattern of experts that the gates are drawn to: a DTR mask over all blocks' experts, alpha 4.

    Args:
        num_timesteps: T, at least 2.
        depth: blocks.
        num_experts: E.
        top_k: experts chosen in a block, in [1, E].

    Returns:
        bool (T, M), `depth * top_k` on in each row.
    """
    # Half a column more than the width asked for, lest the product of rounded numbers fall below it.
    share = min(1.0, (depth * top_k + 0.5) / (depth * num_experts))
    return dtr_mask(num_timesteps, depth * num_experts, _ALPHA, share)


def matching_costs(chosen: Tensor, prior: Tensor) -> Tensor:
    """At how many timesteps an expert's choice and a column of the prior differ, for each pair of them.

    Args:
        chosen: 1.0 where an expert is of the chosen at a timestep, else 0.0, (T, M).
        prior: bool (T, M).

    Returns:
        float32 (M, M), whole numbers: [i, j] for expert i and column j.
    """
    columns = prior.to(chosen.dtype)
    # |a - b| = a + b - 2 a b of zeros and ones; sums below 2 ** 24 are exact.
    return chosen.sum(0)[:, None] + columns.sum(0) - 2 * chosen.T @ columns


class Matching:
    """The one-to-one matching of experts and columns with the least total cost, solved on the CPU.

    The costs start on their way to the CPU when it is made; only `columns` waits for them. So made
    before a model's blocks and asked after them, it keeps no GPU waiting. 84 columns, those of size XL, take
    0.4 ms at most. The same costs give the same matching, also where several cost the least.
    """

    def __init__(self, costs: Tensor) -> None:
        self._device = costs.device
        self._costs, self._arrived = costs.detach(), None
        if costs.is_cuda:
            self._costs = torch.empty_like(costs, device="cpu", pin_memory=True)
            self._costs.copy_(costs, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def columns(self) -> Tensor:
        """The prior's column for each expert: int64 (M,), a permutation, on the costs' device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        _, columns = linear_sum_assignment(self._costs.numpy())
        found = torch.from_numpy(columns.astype(np.int64))
        if self._arrived is None:
            return found
        return found.pin_memory().to(self._device, non_blocking=True)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of distributions (B, M), 1e-6 added inside logarithms: (B,), nats."""
    log_middle = torch.log((p + q) / 2 + _TINY)
    from_p = (p * (torch.log(p + _TINY) - log_middle)).sum(1)
    from_q = (q * (torch.log(q + _TINY) - log_middle)).sum(1)
    return 0.5 * (from_p + from_q)


def diffusion_prior_loss(probabilities: Tensor, rows: Tensor) -> Tensor:
    """How far the gates are from the prior: the mean divergence over the batch.

    Args:
        probabilities: of the experts in each block, (B, depth, E), summing to 1 over the last.
        rows: the prior's rows of the samples' timesteps, bool (B, M), columns in the experts' order.

    Returns:
        Scalar, float32, in [0, log 2] but for rounding.
    """
    p = probabilities.flatten(1).float() / probabilities.shape[1]
    q = rows.float()
    return jensen_shannon(p, q / q.sum(1, keepdim=True)).mean()
