"""IntervalGradients: the gradients of K losses side by side in one buffer, added up over the workers at once.

K losses (one an interval of timesteps), P parameters' numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dtr_ray.diffusion.gradients import gram_matrix
from dtr_ray.distributed import Group


class IntervalGradients:
    """A float32 buffer (K + 1, P): the gradient of each loss, and in the last row the combined one.

    The `.grad` of all parameters are views of the row that collects, so that a backward pass adds to it
    with no copy; a parameter that a loss does not reach keeps zeros. The buffer takes K * P * 4 bytes more
    than a plain step, on each worker, for as long as training lasts.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_losses: int) -> None:
        """Takes the memory.

        Args:
            parameters: of the model, all on one device.
            num_losses: K.

        Raises:
            ValueError: the buffer is larger than the GPU's free memory.
        """
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in self._parameters]
        device = self._parameters[0].device
        check_memory(num_losses, sum(sizes), device)
        self._rows = torch.zeros(num_losses + 1, sum(sizes), device=device)
        self._views = [
            [part.view_as(p) for part, p in zip(row.split(sizes), self._parameters, strict=True)]
            for row in self._rows
        ]
        self._has_extra = False

    def clear(self) -> None:
        """Zeros in all rows."""
        self._rows.zero_()
        self._has_extra = False

    def collect(self, loss: int | None) -> None:
        """Lets backward passes add to the row of a loss, in [0, K), or with None to the combined one."""
        self._has_extra |= loss is None
        self._show(-1 if loss is None else loss)

    def sum_over(self, group: Group) -> Tensor:
        """Adds up all rows over the workers, and gives the K losses' dot products, float64 (K, K)."""
        # The last row is empty where nothing was collected in it, on all workers alike.
        group.sum_(self._rows if self._has_extra else self._rows[:-1])
        return gram_matrix(self._rows[:-1])

    def combine(self, weights: Tensor) -> None:
        """Adds the sum of the rows, weighted by (K,), to the combined one; all `.grad` are this row then."""
        self._rows[-1].addmv_(self._rows[:-1].T, weights)
        self._show(-1)

    def sum_combined_over(self, group: Group) -> None:
        """Adds up the combined row over the workers, when nothing was collected in the others."""
        group.sum_(self._rows[-1])
        self._show(-1)

    def _show(self, row: int) -> None:
        for parameter, view in zip(self._parameters, self._views[row], strict=True):
            parameter.grad = view


def check_memory(num_losses: int, num_parameters: int, device: torch.device) -> None:
    """Whether the gradients of K losses fit: known of a GPU alone, which tells how much memory is free.

    Raises:
        ValueError: they do not.
    """
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    needed = 4 * (num_losses + 1) * num_parameters
    if needed > free:
        raise ValueError(
            f"the gradients of {num_losses} intervals of {num_parameters:,} parameters need "
            f"{needed / 2**30:.1f} GiB, and the GPU has {free / 2**30:.1f} GiB free: lower "
            "weighting.num_clusters, or take a smaller model or ant_uw"
        )
