"""The diffusion transformer with task routing. B batch, N tokens, C channels, P patch size, T timesteps.

DiT: Peebles & Xie, "Scalable Diffusion Models with Transformers". Routing: Park et al., "Denoising Task
Routing for Diffusion Models" (DTR), section 4.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dtr_ray.models.layers import (
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbedding,
    Route,
    TimestepEmbedder,
    grid_positions,
)

_ROUTING_BUFFER = "_unit_mapping"


class DiT(nn.Module):
    """A DiT, with a routing mask or without.

    The state dict has the key names of the official DiT checkpoints. On load, `pos_embed` is optional and
    the routing buffers of DTR checkpoints are ignored: the mask is given here, and never saved. New weights
    come from torch's global generator: seed it before building.

    Attributes:
        null_label: the label that stands for no class, `num_classes`; None without label dropout.
        num_timesteps: T of the mask; None without one.
        out_channels: `in_channels`, or twice as many with `learn_sigma` (noise first, then variance).
    """

    mask: Tensor | None
    pos_embed: Tensor

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
        mask: Tensor | None = None,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
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
            mask: bool (T, C), which channels serve which timestep; None, or all true, is no routing.
            mlp_ratio: width of the MLPs over C.
            class_dropout_prob: above 0 the label table has a row for the null label.

        Raises:
            ValueError: where sizes do not fit each other or the mask.
        """
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size is {input_size}: it must be a multiple of patch_size {patch_size}")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size is {hidden_size}: it must be a multiple of num_heads {num_heads}")
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob is {class_dropout_prob}: it must be in [0, 1)")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.null_label = num_classes if class_dropout_prob > 0 else None

        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, has_null=self.null_label is not None)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

        self.register_buffer("pos_embed", grid_positions(input_size // patch_size, hidden_size))
        self.num_timesteps = None if mask is None else _num_rows(mask, hidden_size)
        # Without this, beta = 1 would cost the masking's work, and differ from no routing in rounding.
        routed = mask is not None and not bool(mask.all())
        self.register_buffer("mask", mask if routed else None, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj
        # As the linear layer that a patch's projection is.
        nn.init.xavier_uniform_(patches.weight.data.flatten(1))
        assert patches.bias is not None
        nn.init.zeros_(patches.bias)
        for weight in (
            self.y_embedder.embedding_table.weight,
            self.t_embedder.mlp.get_parameter("0.weight"),
            self.t_embedder.mlp.get_parameter("2.weight"),
        ):
            nn.init.normal_(weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.get_parameter("adaLN_modulation.1.weight"))
        nn.init.zeros_(self.final_layer.get_parameter("adaLN_modulation.1.weight"))
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The predicted noise, followed by the variance's interpolation with `learn_sigma`.

        Args:
            x: float (B, in_channels, input_size, input_size).
            t: int64 (B,), training timesteps in [0, T).
            y: int64 (B,), labels in [0, num_classes), or `null_label`. Dropping labels in training is the
                caller's: see `layers.drop_labels`.

        Returns:
            (B, out_channels, input_size, input_size), of x's dtype.

        Raises:
            ValueError: on other shapes, or timesteps and labels that are not integers.
        """
        self._check_inputs(x, t, y)
        tokens: Tensor = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        route = self._route(t, tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, condition, route)
        return self._to_image(self.final_layer(tokens, condition)).to(x.dtype)

    def _route(self, t: Tensor, dtype: torch.dtype) -> Route | None:
        if self.mask is None:
            return None
        # Unlike mask[t], this refuses negative timesteps.
        on = self.mask.index_select(0, t).unsqueeze(1).to(dtype)
        return Route(on=on, off=1 - on)

    def _to_image(self, patches: Tensor) -> Tensor:
        side, size = self.input_size // self.patch_size, self.patch_size
        grid = patches.view(-1, side, side, size, size, self.out_channels)
        image = grid.permute(0, 5, 1, 3, 2, 4)  # (B, channels, rows, P, columns, P)
        return image.reshape(-1, self.out_channels, self.input_size, self.input_size)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        expected = (self.in_channels, self.input_size, self.input_size)
        if x.ndim != 4 or x.shape[1:] != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}: it must be (B, {', '.join(map(str, expected))})")
        for name, values in (("t", t), ("y", y)):
            if values.shape != x.shape[:1]:
                raise ValueError(
                    f"{name} has shape {tuple(values.shape)}: it must be ({x.shape[0]},), x's batch"
                )
            if values.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"{name} is of {values.dtype}: it must be int64")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Called by load_state_dict on its own copy of the dict, before it looks into the children.
        for key in [key for key in state_dict if key.startswith(prefix) and is_routing_buffer(key)]:
            del state_dict[key]
        state_dict.setdefault(f"{prefix}pos_embed", self.pos_embed)
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_routing_buffer(key: str) -> bool:
    """Whether a checkpoint's key is one of DTR's routing buffers, which hold the mask and no weights."""
    return key.endswith(_ROUTING_BUFFER)


def _num_rows(mask: Tensor, hidden_size: int) -> int:
    """T of a mask, its type and shape checked."""
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != hidden_size or mask.shape[0] < 1:
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}: "
            f"it must be torch.bool of shape (T, {hidden_size})"
        )
    return mask.shape[0]
