"""Sizes of the named models.

DiT: Peebles & Xie, "Scalable Diffusion Models with Transformers", table 1. ADM: Dhariwal & Nichol, "Diffusion
Models Beat GANs", 64 px. The tiny ones (T) are ours, for laptops and tests.
"""

from typing import NamedTuple


class Sizes(NamedTuple):
    """What a diffusion transformer's name stands for."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int


class UNetSizes(NamedTuple):
    """What an ADM U-Net's name stands for."""

    hidden_size: int
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...]
    """Of `hidden_size`, at each resolution: full, half, quarter, ..."""
    num_res_blocks: int
    """At each resolution on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...]
    """Heights in pixels at which there is attention."""
    num_head_channels: int


_TRANSFORMERS = {
    "T": (128, 4, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}

TRANSFORMER_FAMILIES = ("DiT", "Switch-DiT", "Multi-DiT")
"""A plain one; one with sparse experts in each block; one whole DiT for each interval of timesteps."""

PRESETS: dict[str, Sizes | UNetSizes] = {
    f"{family}-{size}/{patch}": Sizes(*sizes, patch_size=patch)
    for family in TRANSFORMER_FAMILIES
    for size, sizes in _TRANSFORMERS.items()
    for patch in (2, 4, 8)
} | {
    "ADM-T": UNetSizes(32, (1, 2), 1, (8,), 32),
    "ADM-64": UNetSizes(192, (1, 2, 3, 4), 3, (32, 16, 8), 64),
}
"""One row a model; a ModelConfig's own sizes go before the preset's."""

SIZES: dict[str, tuple[str, ...]] = dict.fromkeys(TRANSFORMER_FAMILIES, Sizes._fields) | {
    "ADM": UNetSizes._fields
}
"""The sizes that each family needs where they are given one by one."""


def family(name: str) -> str:
    """`DiT`, `Switch-DiT`, `Multi-DiT` or `ADM`: what a preset, or the family's own name, belongs to."""
    return next(known for known in sorted(SIZES, key=len, reverse=True) if name.startswith(known))
