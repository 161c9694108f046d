"""The parts of the ADM U-Net. B batch, C channels, H height and width, N = H * H positions, E channels of
the condition.

Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis" (ADM), section 3. Submodules carry the
names of the official checkpoints' keys.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_ray.models.layers import attend

NUM_GROUPS = 32

Routes = dict[int, Tensor]
"""(B, C, 1, 1) for each width C: 1 where a channel is on, else 0; empty without routing."""

M = TypeVar("M", bound=nn.Module)


class FloatGroupNorm(nn.GroupNorm):
    """Group norm of 32 groups, in float32 at least, whatever the input's type."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(NUM_GROUPS, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (B, C, H, H) over the channels of a group and all positions; keeps x's type."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.group_norm(x.to(wide), self.num_groups, weight, bias, self.eps).to(x.dtype)


class ResBlock(nn.Module):
    """Two convolutions beside a skip path; the condition scales and shifts the second norm (AdaGN)."""

    def __init__(
        self,
        num_channels: int,
        out_channels: int,
        condition_channels: int,
        dropout: float,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """A block whose last convolution starts at 0; `resample` changes the height on both paths."""
        super().__init__()
        self.num_channels = num_channels
        self.resample = resample
        self.in_layers = nn.Sequential(
            FloatGroupNorm(num_channels), nn.SiLU(), nn.Conv2d(num_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(condition_channels, 2 * out_channels))
        self.out_layers = nn.Sequential(
            FloatGroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = num_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(num_channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor, routes: Routes) -> Tensor:
        """Adds to x what the convolutions make of the channels that are on.

        Args:
            x: (B, num_channels, H, H).
            condition: (B, E).
            routes: that of num_channels masks the first norm's output; the skip path has all channels.

        Returns:
            (B, out_channels, H', H'), where H' is H, or half or twice as much.
        """
        norm, activation, conv = self.in_layers
        h = activation(masked(norm(x), routes))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        scale, shift = self.emb_layers(condition)[:, :, None, None].chunk(2, dim=1)
        norm, *others = self.out_layers
        h = torch.addcmul(shift, norm(h), scale + 1)
        for layer in others:
            h = layer(h)
        out: Tensor = self.skip_connection(x) + h
        return out


class AttentionBlock(nn.Module):
    """Self-attention between all positions, beside a skip path.

    The projection gives queries, keys, values, and within each one head after the other: the order of the
    released 64 px model (`use_new_attention_order` in the official code).
    """

    def __init__(self, num_channels: int, num_head_channels: int) -> None:
        """A block whose last projection starts at 0."""
        super().__init__()
        self.num_channels = num_channels
        self.num_heads = num_channels // num_head_channels
        self.norm = FloatGroupNorm(num_channels)
        self.qkv = nn.Conv1d(num_channels, 3 * num_channels, 1)
        self.proj_out = zeroed(nn.Conv1d(num_channels, num_channels, 1))

    def forward(self, x: Tensor, condition: Tensor, routes: Routes) -> Tensor:
        """Adds to x (B, C, H, H) what attention makes of the channels that are on; ignores the condition."""
        tokens = masked(self.norm(x), routes).flatten(2).transpose(1, 2)  # (B, N, C)
        qkv = _each(self.qkv, tokens).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, C / heads) each
        out = _each(self.proj_out, attend(q, k, v).transpose(1, 2).flatten(2))
        return x + out.transpose(1, 2).reshape(x.shape)


class Stage(nn.ModuleList):
    """Blocks one after the other, with a plain convolution among them or not."""

    def forward(self, x: Tensor, condition: Tensor, routes: Routes) -> Tensor:
        """All of them, on (B, C, H, H)."""
        for part in self:
            x = part(x) if isinstance(part, nn.Conv2d) else part(x, condition, routes)
        return x


def masked(x: Tensor, routes: Routes) -> Tensor:
    """Normalised x (B, C, H, H), with 0 in the channels that are off."""
    on = routes.get(x.shape[1])
    return x if on is None else x * on


def halved(x: Tensor) -> Tensor:
    """(B, C, H, H) at half the height and width: means of 2 x 2."""
    return F.avg_pool2d(x, 2)


def doubled(x: Tensor) -> Tensor:
    """(B, C, H, H) at twice the height and width: each value four times."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def zeroed(module: M) -> M:
    """The module, with all its parameters 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _each(conv: nn.Conv1d, tokens: Tensor) -> Tensor:
    """A convolution of kernel 1, on (B, N, C) as the linear layer that it is."""
    return F.linear(tokens, conv.weight.squeeze(2), conv.bias)
