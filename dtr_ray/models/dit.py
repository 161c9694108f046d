"""The diffusion transformer with task routing. B batch, N tokens, C channels, P patch size, T timesteps.

DiT: Peebles & Xie, "Scalable Diffusion Models with Transformers". Routing: Park et al., "Denoising Task
Routing for Diffusion Models" (DTR), section 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dtr_ray.models.channel_mask import ChannelMask
from dtr_ray.models.layers import Route
from dtr_ray.models.router import Router
from dtr_ray.models.trunk import Trunk


class DiT(Trunk):
    """A DiT, with a routing mask or without.

    The state dict has the key names of the official DiT checkpoints. On load, `pos_embed` is optional and
    the routing buffers of DTR checkpoints are ignored: the mask is given here, and never saved. New weights
    come from torch's global generator: seed it before building.

    Attributes:
        null_label: the label that stands for no class, `num_classes`; None without label dropout, or with
            text.
        null_tokens: (L, text_channels), the tokens that stand for no caption; None likewise, or without text.
        num_timesteps: T of the mask; None without one.
        out_channels: `in_channels`, or twice as many with `learn_sigma` (noise first, then variance).
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        mask: Router | Tensor | None = None,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        text_channels: int | None = None,
    ) -> None:
        """Builds the model with the paper's initial weights: each block is the identity, the output 0.

        Args:
            input_size: height and width of the input, a multiple of `patch_size`.
            patch_size: P, height and width of a token's patch.
            in_channels: channels of the input.
            hidden_size: C, a multiple of 4 and of `num_heads`.
            depth: number of blocks.
            num_heads: attention heads.
            num_classes: classes; 1 is unconditional.
            learn_sigma: predict the variance too.
            mask: bool (T, C), which channels serve which timestep, or (depth, T, C) for each block on its
                own; or a router that makes it. None, or all true, is no routing.
            mlp_ratio: width of the MLPs over C.
            class_dropout_prob: above 0 the label table has a row for the null label, or with text the model
                keeps `null_tokens`: zeros, until training fills in the tokens of the empty caption.
            text_channels: channels of the text tokens that condition the model in place of classes (DTR,
                appendix C): cross-attention in each block, and no label table; None for classes.

        Raises:
            ValueError: where sizes do not fit each other or the mask.
        """
        super().__init__(
            input_size,
            patch_size,
            in_channels,
            hidden_size,
            depth,
            num_heads,
            num_classes,
            learn_sigma,
            mlp_ratio,
            class_dropout_prob,
            text_channels,
        )
        self.masks = ChannelMask(mask, hidden_size, depth)
        self.num_timesteps = self.masks.num_timesteps

    @property
    def mask(self) -> Tensor | None:
        """What routes at present: bool (T, C), or (depth, T, C) where each block has its own mask."""
        return self.masks.mask

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The predicted noise, followed by the variance's interpolation with `learn_sigma`.

        Args:
            x: float (B, in_channels, input_size, input_size).
            t: int64 (B,), training timesteps in [0, T).
            y: int64 (B,), labels in [0, num_classes), or `null_label`. With text: float (B, L,
                text_channels), tokens. Dropping either in training is the caller's: see `layers.drop_labels`.

        Returns:
            (B, out_channels, input_size, input_size), of x's dtype.

        Raises:
            ValueError: on other shapes, timesteps and labels that are not integers, or tokens that are.
        """
        self.check_inputs(x, t, y)
        tokens: Tensor = self.x_embedder(x) + self.pos_embed
        # Text has no single vector that adaLN could take (DTR, appendix C).
        condition = self.t_embedder(t) if self.y_embedder is None else self.t_embedder(t) + self.y_embedder(y)
        text = y if self.y_embedder is None else None
        routes = self._routes(t, tokens.dtype)
        for block, route in zip(self.blocks, routes, strict=True):
            tokens = block(tokens, condition, route, text)
        return self._to_image(self.final_layer(tokens, condition)).to(x.dtype)

    def _routes(self, t: Tensor, dtype: torch.dtype) -> Sequence[Route | None]:
        """The route through each block."""
        on = self.masks(t, dtype)
        if on is None:
            return [None] * len(self.blocks)
        on = on.unsqueeze(-2)
        off = 1 - on
        if on.ndim == 3:
            return [Route(on, off)] * len(self.blocks)
        return [Route(*pair) for pair in zip(on, off, strict=True)]
