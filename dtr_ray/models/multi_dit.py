"""The multi-expert baseline: one whole DiT for each interval of timesteps. B batch, K experts, T timesteps.

Park et al., "Denoising Task Routing for Diffusion Models" (DTR), appendix D: four DiT-B/2, 521M parameters.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dtr_ray.bounds import uniform_bounds
from dtr_ray.models.dit import DiT


class MultiDiT(nn.Module):
    """K DiTs; each is trained on, and samples at, its own K-th part of the timesteps.

    Attributes:
        bounds: the experts' intervals [start, stop), in order.
        num_timesteps: T.
        null_label, num_classes, in_channels, out_channels, input_size: those of each expert.
    """

    owners: Tensor

    def __init__(self, *, num_experts: int = 4, num_timesteps: int = 1000, **arguments: Any) -> None:
        """Builds the experts, with weights of their own each.

        Args:
            num_experts: K, in [1, T].
            num_timesteps: T.
            arguments: those of `DiT`, the same for all experts; a mask has T rows.

        Raises:
            ValueError: where sizes do not fit each other or the mask.
        """
        super().__init__()
        self.bounds = uniform_bounds(num_timesteps, num_experts)
        self.experts = nn.ModuleList(DiT(**arguments) for _ in range(num_experts))
        first = self.experts[0]
        assert isinstance(first, DiT)
        if first.num_timesteps not in (None, num_timesteps):
            raise ValueError(f"mask has {first.num_timesteps} rows: num_timesteps {num_timesteps} are needed")
        self.null_label = first.null_label
        self.num_classes = first.num_classes
        self.in_channels = first.in_channels
        self.out_channels = first.out_channels
        self.input_size = first.input_size
        self.num_timesteps = num_timesteps
        lengths = torch.tensor([stop - start for start, stop in self.bounds], device="cpu")
        owners = torch.arange(num_experts, device="cpu").repeat_interleave(lengths)
        self.register_buffer("owners", owners, persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """What the expert of each sample's timestep predicts; arguments and result as for `DiT`.

        How many samples each expert gets must be known on the host, so a GPU is waited for once a
        forward. In training the experts without a sample take part with gradients of zero: then all workers
        of a data-parallel group have the same parameters to average, and one process does as they do.

        Raises:
            ValueError: as `DiT`.
            IndexError: on a timestep outside [0, T), on the CPU.
        """
        first = self.experts[0]
        assert isinstance(first, DiT)
        first.check_inputs(x, t, y)
        if t.stride(0) == 0:  # one timestep for all, as when sampling
            owner = int(self.owners.index_select(0, t[:1]))
            counts = [len(t) * (i == owner) for i in range(len(self.experts))]
            output: Tensor = self.experts[owner](x, t, y)
        else:
            owners = self.owners.index_select(0, t)
            order = owners.argsort(stable=True)
            counts = owners.bincount(minlength=len(self.experts)).tolist()
            shares = zip(self.experts, order.split(counts), strict=True)
            parts = [expert(x[rows], t[rows], y[rows]) for expert, rows in shares if len(rows)]
            output = torch.cat(parts)[order.argsort()]
        if self.training and torch.is_grad_enabled():
            output = output + 0.0 * self._sum_of_idle(counts)
        return output

    def _sum_of_idle(self, counts: list[int]) -> Tensor | float:
        """The sum of all weights of the experts without a sample."""
        idle = (expert for expert, count in zip(self.experts, counts, strict=True) if not count)
        sums = [weight.sum() for expert in idle for weight in expert.parameters()]
        return torch.stack(sums).sum() if sums else 0.0
