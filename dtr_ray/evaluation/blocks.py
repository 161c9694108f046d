"""Blocks: the groups in which samples pass the networks, the same whoever computes them.

Matrix products round differently for batches of different sizes, and in bfloat16 the steps of a sampler
make images of that which differ to the eye. So block b is always samples [50 b, 50 (b + 1)), drawn, decoded
and featured together: workers take whole blocks, and neither their number nor a batch size touches a figure.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dtr_ray.distributed import Group

BLOCK_IMAGES = 50
"""Samples a block: enough to fill a GPU, few enough to fit where a training batch does. A change of it moves
figures by rounding; it divides 1,000, so that every usual number of samples has whole blocks alone."""


class Blocks:
    """How the samples 0 to num_samples - 1 are shared out among workers, and how they come together again."""

    def __init__(self, num_samples: int, group: Group) -> None:
        self._num_samples = num_samples
        self._num_blocks = -(-num_samples // BLOCK_IMAGES)
        self._group = group

    def mine(self) -> list[Tensor]:
        """Numbers of the samples of each of this worker's blocks, int64 (B,), B the last block's fewer."""
        blocks = torch.arange(self._num_samples).split(BLOCK_IMAGES)
        return list(blocks[self._group.rank :: self._group.world_size])

    def gather(self, parts: Sequence[Tensor], empty: Tensor) -> Tensor:
        """All samples' rows (num_samples, ...), in order, on every worker.

        Args:
            parts: the rows (B, ...) of each of this worker's blocks, in order.
            empty: a tensor (0, ...) of the same kind, for workers without a block.
        """
        if self._group.world_size == 1:
            return torch.cat([empty, *parts])
        padded = empty.new_zeros(len(parts), BLOCK_IMAGES, *empty.shape[1:])
        for whole, part in zip(padded, parts, strict=True):
            whole[: len(part)] = part
        everything = self._group.gather_interleaved(padded, self._num_blocks)
        return everything.flatten(0, 1)[: self._num_samples]
