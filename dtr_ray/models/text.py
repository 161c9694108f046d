"""Conditioning by text. B batch, N image tokens, L text tokens, C channels, D channels of a text token.

Park et al., "Denoising Task Routing for Diffusion Models" (DTR), appendix C and figure 8.
"""

import torch
from torch import Tensor, nn

from dtr_ray.config.data import TEXT_TOKENS
from dtr_ray.models.layers import NORM_EPS, attend


class CrossAttention(nn.Module):
    """What each image token takes from the text: (B, N, C) and (B, L, D) -> (B, N, C), to be added.

    Built as the self-attention is, with the text's tokens as keys and values; its norm has weights of its
    own, since adaLN's parameters come from the timestep and are the paper's six. The last projection starts
    at 0: then a new block is the identity, as without text.
    """

    def __init__(self, num_channels: int, num_heads: int, text_channels: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(num_channels, eps=NORM_EPS)
        self.q = nn.Linear(num_channels, num_channels)
        self.kv = nn.Linear(text_channels, 2 * num_channels)
        self.proj = nn.Linear(num_channels, num_channels)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Attention from all image tokens to all text tokens, those after the caption's end included."""
        q = self._heads(self.q(self.norm(x)))
        k, v = (self._heads(part) for part in self.kv(text).chunk(2, dim=2))
        out: Tensor = self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """(B, tokens, C) -> (B, heads, tokens, C / heads)."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


def no_caption(text_channels: int) -> Tensor:
    """Room for the tokens of the empty caption, (L, D): zeros, until training fills in the encoder's."""
    return torch.zeros(TEXT_TOKENS, text_channels)


def check_text(y: Tensor, num_samples: int, text_channels: int) -> None:
    """Raises ValueError unless y is float (num_samples, L, text_channels), with L at least 1."""
    if y.ndim != 3 or len(y) != num_samples or y.shape[1] < 1 or y.shape[2] != text_channels:
        raise ValueError(
            f"y has shape {tuple(y.shape)}: it must be ({num_samples}, L, {text_channels}), text tokens"
        )
    if not y.is_floating_point():
        raise ValueError(f"y is of {y.dtype}: text tokens are float")
