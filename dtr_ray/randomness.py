"""Random generators keyed by what they are for, so that no run depends on what was drawn before."""

import numpy as np
import torch


def keyed_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator fixed by non-negative integers, such as (seed, stream, step).

    Different keys give independent streams; the same key gives the same numbers, so a resumed run
    repeats the uninterrupted one without any random state being stored.
    """
    seed = int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(seed >> 1)
