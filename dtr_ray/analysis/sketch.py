"""Count-sketch: a long vector in few numbers, such that the angles between vectors stay nearly the same.

P length of the vectors, D length of the sketches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dtr_ray.randomness import keyed_generator

# Apart from the streams of training.
_STREAM = 0x5CE7C4


class Sketch:
    """Adds the P numbers of a vector, each with a random sign, into D places chosen at random.

    Charikar et al., "Finding Frequent Items in Data Streams". For vectors whose weight is spread over many
    of their numbers, the cosine of two sketches differs from their cosine c with a standard error of about
    (1 - c^2) / sqrt(D). Where P <= D the vector itself is the sketch, and nothing is lost.
    """

    def __init__(self, num_values: int, size: int, *key: int, device: torch.device | str = "cpu") -> None:
        """The places and signs of a key, the same on every machine.

        Args:
            num_values: P, at least 1. Takes 4 P bytes on the device where P > D.
            size: D, at least 1.
            key: integers, such as (seed, batch); other keys give other places.
            device: of the vectors.
        """
        self.size = min(num_values, size)
        self._slots: Tensor | None = None
        if num_values > size:
            generator = keyed_generator(*key, _STREAM)
            # A place in the upper half is one of the lower half with a minus sign.
            slots = torch.randint(2 * size, (num_values,), generator=generator, dtype=torch.int32)
            self._slots = slots.to(device)

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """The sketch of a vector given in parts: tensors of any shape, P numbers in all; float32 (D,)."""
        if self._slots is None:
            return torch.cat([part.flatten().float() for part in parts])
        sums = torch.zeros(2 * self.size, device=self._slots.device)
        start = 0
        for part in parts:
            stop = start + part.numel()
            sums.index_add_(0, self._slots[start:stop], part.flatten().float())
            start = stop
        assert start == len(self._slots), (start, len(self._slots))
        return sums[: self.size] - sums[self.size :]
