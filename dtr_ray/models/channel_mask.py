"""ChannelMask: a routing mask as a part of a model. B batch, C channels, T timesteps, L blocks."""

import torch
from torch import Tensor, nn

from dtr_ray.models.router import Router


class ChannelMask(nn.Module):
    """The mask of one channel width; a model has one for each of its widths, and asks it once a forward.

    It has no parameters and is no part of the state dict. A mask that is learnt can take its place in a
    model: a module with the same forward, whose values are trained.

    Attributes:
        mask: bool (T, C), or (L, T, C) where each block has its own; None without routing.
        num_timesteps: T; None where no mask was given.
    """

    mask: Tensor | None

    def __init__(
        self, mask: Router | Tensor | None, num_channels: int, num_blocks: int | None = None
    ) -> None:
        """Makes the mask of training step 0.

        Args:
            mask: what makes the masks; or the mask for good, bool (T, C) or (L, T, C); or None.
            num_channels: C.
            num_blocks: L, for models whose blocks all have C channels; others need masks (T, C).

        Raises:
            ValueError: the mask is of another type or shape, or its maker cannot serve this model.
        """
        super().__init__()
        self._router = mask if isinstance(mask, Router) else None
        self._num_blocks = num_blocks
        self._made_at = 0
        values = mask.mask(num_channels, 0, num_blocks) if isinstance(mask, Router) else mask
        self.num_timesteps = None if values is None else _num_timesteps(values, num_channels, num_blocks)
        if values is not None and not self._changes and bool(values.all()):
            # Or else beta = 1 would cost the masking's work.
            values = None
        self.register_buffer("mask", values, persistent=False)

    @property
    def _changes(self) -> bool:
        return self._router is not None and self._router.changes

    def set_step(self, step: int) -> None:
        """Takes the mask in force after `step` training steps, in place: compiled graphs see it too."""
        if self._router is None or self.mask is None or self._router.made_at(step) == self._made_at:
            return
        values = self._router.mask(self.mask.shape[-1], step, self._num_blocks)
        assert values is not None
        self.mask.copy_(values)
        self._made_at = self._router.made_at(step)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The rows of a batch's timesteps.

        Args:
            t: integers (B,), in [0, T).
            dtype: float, of the result.

        Returns:
            (B, C), 1 where a channel is on, else 0; (L, B, C) where each block has its own mask; None
            without routing.
        """
        if self.mask is None:
            return None
        # Unlike mask[t], this refuses negative timesteps.
        return self.mask.index_select(self.mask.ndim - 2, t).to(dtype)


def set_step(model: nn.Module, step: int) -> None:
    """Gives a model the masks in force after `step` training steps; nothing to do for most routings."""
    for module in model.modules():
        if isinstance(module, ChannelMask):
            module.set_step(step)


def _num_timesteps(mask: Tensor, num_channels: int, num_blocks: int | None) -> int:
    """T of a mask, its type and shape checked."""
    by_block = mask.ndim == 3 and mask.shape[0] == num_blocks
    right = mask.dtype == torch.bool and (mask.ndim == 2 or by_block)
    if not right or mask.shape[-1] != num_channels or mask.shape[-2] < 1:
        other = "" if num_blocks is None else f" or ({num_blocks}, T, {num_channels})"
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}: "
            f"it must be torch.bool of shape (T, {num_channels}){other}"
        )
    return mask.shape[-2]
