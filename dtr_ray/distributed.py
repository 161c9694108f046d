"""Group: the data-parallel workers of one trial, or a single process that needs no torch.distributed."""

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Group:
    """Workers that train one model together; `Group()` is one process alone.

    All methods that communicate are to be called by all workers, in the same order.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> "Group":
        """The group that torch.distributed was set up with, or a single process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this worker writes files and reports."""
        return self.rank == 0

    def slice(self, batch: Tensor) -> Tensor:
        """This worker's share of a whole batch (B, ...): a contiguous part of B / world_size rows.

        Raises:
            ValueError: B is not a multiple of the number of workers.
        """
        size, rest = divmod(len(batch), self.world_size)
        if rest:
            raise ValueError(f"a batch of {len(batch)} cannot be shared evenly by {self.world_size} workers")
        return batch[self.rank * size : (self.rank + 1) * size]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds up `tensor` over the workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """Averages `tensor` over the workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is true on any worker."""
        if self.world_size == 1:
            return flag
        seen = torch.tensor(float(flag), device=device)
        dist.all_reduce(seen)
        return seen.item() > 0

    def wait(self, device: torch.device) -> None:
        """Waits until all workers are here."""
        self.any(False, device)

    def gather_interleaved(self, rows: Tensor, total: int) -> Tensor:
        """All workers' rows (n, ...) in the order 0 to total - 1; worker r holds rows r::world_size."""
        if self.world_size == 1:
            return rows
        longest = -(-total // self.world_size)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)[:total]

    def from_main(self, value: Value) -> Value:
        """The main worker's (picklable) value, on every worker; the others' own are not looked at."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
