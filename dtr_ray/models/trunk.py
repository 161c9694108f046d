"""What diffusion transformers have in common: all but routing. B batch, N tokens, C channels, P patch size.

Peebles & Xie, "Scalable Diffusion Models with Transformers" (DiT).
"""

from typing import Any

from torch import Tensor, nn

from dtr_ray.models.layers import (
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbedding,
    TimestepEmbedder,
    check_images,
    check_integers,
    grid_positions,
)
from dtr_ray.models.text import CrossAttention, check_text, no_caption


class Trunk(nn.Module):
    """Embedders, blocks and final layer of a DiT; a subclass lets the tokens through the blocks.

    The state dict has the key names of the official DiT checkpoints. On load, `pos_embed` is optional, and
    what DTR's and Switch-DiT's checkpoints hold beside weights is ignored. New weights come from torch's
    global generator: seed it before building.
    """

    pos_embed: Tensor
    null_tokens: Tensor | None

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        learn_sigma: bool,
        mlp_ratio: float,
        class_dropout_prob: float,
        text_channels: int | None = None,
    ) -> None:
        """Builds the parts with the paper's initial weights; arguments and errors are those of `DiT`."""
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
        self.text_channels = text_channels
        droppable = class_dropout_prob > 0
        self.null_label = num_classes if droppable and text_channels is None else None

        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = None if text_channels else LabelEmbedder(num_classes, hidden_size, droppable)
        self.blocks = nn.ModuleList(
            DiTBlock(
                hidden_size,
                num_heads,
                mlp_ratio,
                CrossAttention(hidden_size, num_heads, text_channels) if text_channels else None,
            )
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

        self.register_buffer("pos_embed", grid_positions(input_size // patch_size, hidden_size))
        self.register_buffer(
            "null_tokens", no_caption(text_channels) if text_channels and droppable else None
        )
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
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp.get_parameter("0.weight"), std=0.02)
        nn.init.normal_(self.t_embedder.mlp.get_parameter("2.weight"), std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.get_parameter("adaLN_modulation.1.weight"))
            if self.text_channels is not None:
                nn.init.zeros_(block.get_parameter("cross_attn.proj.weight"))
        nn.init.zeros_(self.final_layer.get_parameter("adaLN_modulation.1.weight"))
        nn.init.zeros_(self.final_layer.linear.weight)

    def _to_image(self, patches: Tensor) -> Tensor:
        side, size = self.input_size // self.patch_size, self.patch_size
        grid = patches.view(-1, side, side, size, size, self.out_channels)
        image = grid.permute(0, 5, 1, 3, 2, 4)  # (B, channels, rows, P, columns, P)
        return image.reshape(-1, self.out_channels, self.input_size, self.input_size)

    def check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        """Raises ValueError unless shapes and types are those that `DiT.forward` takes."""
        check_images(x, self.in_channels, self.input_size)
        check_integers("t", t, len(x))
        if self.text_channels is None:
            check_integers("y", y, len(x))
        else:
            check_text(y, len(x), self.text_channels)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Called by load_state_dict on its own copy of the dict, before it looks into the children.
        for key in [key for key in state_dict if key.startswith(prefix) and is_routing_buffer(key)]:
            del state_dict[key]
        state_dict.setdefault(f"{prefix}pos_embed", self.pos_embed)
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_routing_buffer(key: str) -> bool:
    """Whether a checkpoint's key is a fixed table: DTR's masks, Switch-DiT's prior or its timesteps."""
    return key.endswith("_unit_mapping") or key.rpartition(".")[2] == "full_time"
