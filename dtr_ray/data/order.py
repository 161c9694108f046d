"""The order in which training sees the images: epochs of permutations, computed from the step alone."""

from functools import lru_cache

import torch
from torch import Tensor

from dtr_ray.randomness import keyed_generator

# Apart from the streams of the training loop, which are small numbers.
_STREAM = 0x0DE5


def batch_indices(num_images: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Indices of the images of one training step, int64 (batch_size,), in [0, num_images).

    Training reads an endless sequence of epochs, each a permutation keyed by (seed, epoch); the batch of
    0-based step s is its part [s * batch_size, (s + 1) * batch_size), so batches may straddle epochs.
    Nothing is remembered: a resumed run reads on where it was.
    """
    parts = []
    position, stop = step * batch_size, (step + 1) * batch_size
    while position < stop:
        epoch, start = divmod(position, num_images)
        part = _permutation(num_images, seed, epoch)[start : start + stop - position]
        parts.append(part)
        position += len(part)
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _permutation(num_images: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_images, generator=keyed_generator(seed, _STREAM, epoch))
