"""Random generators keyed by what they are for, so that no run depends on what was drawn before."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def keyed_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator fixed by integers, such as (seed, stream, step).

    Different keys give unrelated streams; the same key gives the same numbers, so a resumed run
    repeats the uninterrupted one without any random state being stored. torch's CPU generator uses 32
    bits of the 63 of its seed: among 100,000 keys, one pair or so shares a stream by chance.
    """
    # Not numpy's SeedSequence, for which (1, 2) and (1, 2, 0) are one key.
    text = ",".join(str(int(part)) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def keyed_draws(*key: int, device: torch.device) -> Iterator[None]:
    """In it torch's global generators start as integers say; after it they are as they were before.

    For what takes no generator, such as dropout.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(keyed_generator(*key).initial_seed())
        yield
