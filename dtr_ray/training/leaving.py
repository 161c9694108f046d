"""Leaving: a run whose machine is to go writes a checkpoint at its next step, and ends to go on elsewhere."""

from collections.abc import Callable

import torch

from dtr_ray.distributed import Group

MustLeave = Callable[[], bool]
"""Says whether this worker is to leave; asked at every step, so it must be cheap."""

# To ask all workers makes the host wait for its GPU.
_ASK_EVERY_STEPS = {"cuda": 10}


class LeftError(RuntimeError):
    """The run has left its machine, as it was told to; another process goes on from its checkpoint."""


def stays() -> bool:
    """The answer of a worker that never leaves."""
    return False


def all_leave(must_leave: MustLeave, step: int, group: Group, device: torch.device) -> bool:
    """Whether any worker is to leave after this step, which is the same on all of them."""
    if group.world_size > 1 and step % _ASK_EVERY_STEPS.get(device.type, 1):
        return False
    return group.any(must_leave(), device)
