"""Sizes of the named models (Peebles & Xie, "Scalable Diffusion Models with Transformers", table 1)."""

from typing import NamedTuple


class Sizes(NamedTuple):
    """What a model's name stands for."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int


PRESETS = {
    "DiT-S/2": Sizes(hidden_size=384, depth=12, num_heads=6, patch_size=2),
    "DiT-S/4": Sizes(hidden_size=384, depth=12, num_heads=6, patch_size=4),
    "DiT-S/8": Sizes(hidden_size=384, depth=12, num_heads=6, patch_size=8),
    "DiT-B/2": Sizes(hidden_size=768, depth=12, num_heads=12, patch_size=2),
    "DiT-B/4": Sizes(hidden_size=768, depth=12, num_heads=12, patch_size=4),
    "DiT-B/8": Sizes(hidden_size=768, depth=12, num_heads=12, patch_size=8),
    "DiT-L/2": Sizes(hidden_size=1024, depth=24, num_heads=16, patch_size=2),
    "DiT-L/4": Sizes(hidden_size=1024, depth=24, num_heads=16, patch_size=4),
    "DiT-L/8": Sizes(hidden_size=1024, depth=24, num_heads=16, patch_size=8),
    "DiT-XL/2": Sizes(hidden_size=1152, depth=28, num_heads=16, patch_size=2),
    "DiT-XL/4": Sizes(hidden_size=1152, depth=28, num_heads=16, patch_size=4),
    "DiT-XL/8": Sizes(hidden_size=1152, depth=28, num_heads=16, patch_size=8),
}
"""One row a model; a ModelConfig's own sizes go before the preset's."""
