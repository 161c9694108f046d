"""The parts of a diffusion transformer. B batch, N tokens, C channels, P patch size, T timesteps.

Peebles & Xie, "Scalable Diffusion Models with Transformers" (DiT), section 3.2. Submodules carry the
names of the official checkpoints' keys.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class Route(NamedTuple):
    """The mask's rows of a batch, as floats that broadcast over the tokens."""

    on: Tensor
    """(B, 1, C): 1 where a channel goes through the block."""
    off: Tensor
    """(B, 1, C): 1 - on; these channels pass the block by."""


def grid_positions(grid_size: int, num_channels: int) -> Tensor:
    """Fixed sine and cosine positions of a square grid's tokens.

    Args:
        grid_size: tokens along one side; tokens run row by row.
        num_channels: C, a multiple of 4: one half for the column, one for the row, each sines then cosines.

    Returns:
        float32 (1, grid_size ** 2, C).

    Raises:
        ValueError: where C is not a multiple of 4.
    """
    if num_channels % 4:
        raise ValueError(f"hidden_size is {num_channels}: sine and cosine positions need a multiple of 4")
    quarter = num_channels // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = waves.repeat(grid_size, 1), waves.repeat_interleave(grid_size, dim=0)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)


def timestep_waves(t: Tensor, num_channels: int) -> Tensor:
    """Timesteps (B,) as cosines then sines, of frequencies from 1 down towards 1/10,000.

    Returns:
        float32 (B, num_channels); `num_channels` is even.
    """
    half = num_channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def drop_labels(y: Tensor, drop: Tensor, null_label: int | None) -> Tensor:
    """Labels for training with classifier-free guidance: the null label where `drop` is true.

    Args:
        y: int64 (B,), labels in [0, num_classes).
        drop: bool (B,), drawn by the caller.
        null_label: the model's `null_label`.

    Returns:
        int64 (B,).

    Raises:
        ValueError: where the model has no null label.
    """
    if null_label is None:
        raise ValueError("the model has no null label: labels are dropped with class_dropout_prob above 0")
    return torch.where(drop, null_label, y)


def check_images(x: Tensor, num_channels: int, size: int) -> None:
    """Raises ValueError unless x is (B, num_channels, size, size)."""
    if x.ndim != 4 or x.shape[1:] != (num_channels, size, size):
        raise ValueError(f"x has shape {tuple(x.shape)}: it must be (B, {num_channels}, {size}, {size})")


def check_integers(name: str, values: Tensor, num_samples: int) -> None:
    """Raises ValueError unless timesteps or labels are integers (num_samples,)."""
    if values.shape != (num_samples,):
        raise ValueError(f"{name} has shape {tuple(values.shape)}: it must be ({num_samples},), x's batch")
    if values.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} is of {values.dtype}: it must be int64")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens x (B, N, C) times 1 + scale, plus shift; both (B, C)."""
    return torch.addcmul(shift.unsqueeze(1), x, scale.unsqueeze(1) + 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries to keys, (B, heads, tokens, C / heads) each; v has the keys' tokens."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # Up to 1,024 tokens torch's fused CPU kernel is slower in bfloat16, its backward 2 to 7 times.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        weights: Tensor = scores.softmax(dim=3, dtype=torch.float32).to(v.dtype)
        return weights @ v
    heads: Tensor = F.scaled_dot_product_attention(q, k, v)
    return heads


class PatchEmbedding(nn.Module):
    """Patches of an image to tokens: (B, in_channels, H, W) -> (B, H * W / P ** 2, C)."""

    def __init__(self, patch_size: int, in_channels: int, num_channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, num_channels, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens row by row."""
        patches: Tensor = self.proj(x)
        return patches.flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) to (B, C)."""

    def __init__(self, num_channels: int, num_waves: int = 256) -> None:
        super().__init__()
        self.num_waves = num_waves
        self.mlp = nn.Sequential(
            nn.Linear(num_waves, num_channels), nn.SiLU(), nn.Linear(num_channels, num_channels)
        )

    def forward(self, t: Tensor) -> Tensor:
        """The embedding of each timestep."""
        waves = timestep_waves(t, self.num_waves).to(next(self.mlp.parameters()).dtype)
        embedding: Tensor = self.mlp(waves)
        return embedding


class LabelEmbedder(nn.Module):
    """Labels (B,) to (B, C); the null label's row comes last, where there is one."""

    def __init__(self, num_classes: int, num_channels: int, has_null: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + has_null, num_channels)

    def forward(self, y: Tensor) -> Tensor:
        """The embedding of each label."""
        embedding: Tensor = self.embedding_table(y)
        return embedding


class Attention(nn.Module):
    """Self-attention between tokens: (B, N, C) -> (B, N, C)."""

    def __init__(self, num_channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(num_channels, 3 * num_channels)
        self.proj = nn.Linear(num_channels, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over all tokens, by the device's fused kernel where that is the faster way."""
        num_samples, num_tokens, num_channels = x.shape
        qkv: Tensor = self.qkv(x)
        split = qkv.view(num_samples, num_tokens, 3, self.num_heads, num_channels // self.num_heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers on each token: (B, N, C) -> (B, N, C)."""

    def __init__(self, num_channels: int, num_inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_channels, num_inner)
        self.fc2 = nn.Linear(num_inner, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        """GELU (tanh form) between the layers."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero; DiT, section 3.2).

    With `cross_attn`, a module of (tokens, text), what it gives is added in between (DTR, figure 8).
    """

    def __init__(
        self, num_channels: int, num_heads: int, mlp_ratio: float, cross_attn: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(num_channels, elementwise_affine=False, eps=NORM_EPS)
        self.attn = Attention(num_channels, num_heads)
        self.cross_attn = cross_attn
        self.norm2 = nn.LayerNorm(num_channels, elementwise_affine=False, eps=NORM_EPS)
        self.mlp = Mlp(num_channels, int(num_channels * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(num_channels, 6 * num_channels))

    def forward(
        self, x: Tensor, condition: Tensor, route: Route | None = None, text: Tensor | None = None
    ) -> Tensor:
        """One block, over the channels that the route has on; without a route, over all.

        Args:
            x: tokens (B, N, C).
            condition: (B, C).
            route: the masked copy x * on goes through all residual sub-blocks, whose additions are
                not masked again; x * off is added after them (DTR, section 4.1).
            text: (B, L, D), for a block with cross-attention.

        Returns:
            (B, N, C).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        h = x if route is None else x * route.on
        h = torch.addcmul(h, gate1.unsqueeze(1), self.attn(modulate(self.norm1(h), shift1, scale1)))
        if self.cross_attn is not None:
            h = h + self.cross_attn(h, text)
        h = torch.addcmul(h, gate2.unsqueeze(1), self.mlp(modulate(self.norm2(h), shift2, scale2)))
        return h if route is None else torch.addcmul(h, x, route.off)


class FinalLayer(nn.Module):
    """Tokens to patches: (B, N, C) -> (B, N, P ** 2 * out_channels)."""

    def __init__(self, num_channels: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(num_channels, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(num_channels, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(num_channels, 2 * num_channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The last norm, modulated by the condition (B, C), and the projection."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out
