"""The ADM U-Net with task routing. B batch, C channels, T timesteps.

ADM: Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis". Routing: Park et al., "Denoising Task
Routing for Diffusion Models" (DTR), section 4, appendix A.1 and pseudo-code 2.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtr_ray.models.adm_layers import (
    NUM_GROUPS,
    AttentionBlock,
    FloatGroupNorm,
    ResBlock,
    Routes,
    Stage,
    doubled,
    halved,
    zeroed,
)
from dtr_ray.models.channel_mask import ChannelMask
from dtr_ray.models.layers import check_images, check_integers, timestep_waves
from dtr_ray.models.router import Router
from dtr_ray.models.trunk import is_routing_buffer


class ADM(nn.Module):
    """An ADM U-Net, with routing masks or without.

    With adaptive group norm, residual blocks that halve and double the height, and heads of a fixed width.
    The state dict has the key names and the order of values of the official checkpoints: `ADM-64` with 1,000
    classes and `class_dropout_prob` 0 takes the released `64x64_diffusion.pt`. Routing buffers in a
    checkpoint are ignored. New weights come from torch's global generator: seed it before building.

    Routing: in every residual and every attention block the output of the first group norm is multiplied by
    the mask (DTR, appendix A.1: "right after the group normalization layer"; its pseudo-code 2 does so after
    the SiLU, which is the same, as SiLU(0) = 0). So the norm's statistics are those of all channels; a
    channel that is off gives 0 to the block's convolution or attention; and its values pass the block by on
    the skip path, which is not masked (DTR, eq. (3)). A residual block's second norm lies within the block,
    and is not masked (pseudo-code 2), nor is the last norm of the model, which is in no block. Each width
    that a block takes in has a mask of its own; in the decoder it is that of the concatenated skip, too.

    Attributes:
        null_label: the label that stands for no class, `num_classes`; None without label dropout or classes.
        num_timesteps: T of the masks; None without them.
        out_channels: `in_channels`, or twice as many with `learn_sigma` (noise first, then variance).
    """

    def __init__(
        self,
        input_size: int = 64,
        in_channels: int = 3,
        hidden_size: int = 192,
        channel_multipliers: Sequence[int] = (1, 2, 3, 4),
        num_res_blocks: int = 3,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        num_head_channels: int = 64,
        dropout: float = 0.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        mask: Router | Mapping[int, Tensor] | None = None,
    ) -> None:
        """Builds the model with the official initial weights: torch's own, and 0 where a path ends.

        Args:
            input_size: height and width of the input, to be halved once for each multiplier but the first.
            in_channels: channels of the input.
            hidden_size: channels that the multipliers multiply, a multiple of 32; the condition has four
                times as many.
            channel_multipliers: channels over `hidden_size` at full, half, quarter, ... height.
            num_res_blocks: residual blocks at each height on the way down; there is one more on the way up.
            attention_resolutions: heights with attention after each of these blocks; others than the model's
                are passed over. The middle, at the lowest height, always has attention.
            num_head_channels: channels of an attention head.
            dropout: share of values dropped before each residual block's last convolution, in [0, 1); the
                only randomness of a forward, from torch's global generator, and in training alone.
            num_classes: classes; 1 is unconditional, without a label table.
            class_dropout_prob: above 0 the label table has a row for the null label.
            learn_sigma: predict the variance too.
            mask: what makes the masks; or one for each width, bool (T, width); or None. All true is no
                routing.

        Raises:
            ValueError: where sizes do not fit each other or the masks.
        """
        super().__init__()
        widths = [hidden_size * multiplier for multiplier in channel_multipliers]
        attends = [input_size >> level in attention_resolutions for level in range(len(widths))]
        _check_sizes(input_size, hidden_size, widths, attends, num_head_channels)
        for name, share in (("dropout", dropout), ("class_dropout_prob", class_dropout_prob)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} is {share}: it must be in [0, 1)")
        self.input_size = input_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        conditional = num_classes > 1
        self.null_label = num_classes if conditional and class_dropout_prob > 0 else None

        num_labels = num_classes + (self.null_label is not None)
        num_condition = 4 * hidden_size
        self.time_embed = nn.Sequential(
            nn.Linear(hidden_size, num_condition), nn.SiLU(), nn.Linear(num_condition, num_condition)
        )
        self.label_emb = nn.Embedding(num_labels, num_condition) if conditional else None

        def block(num_in: int, num_out: int, resample: Callable[[Tensor], Tensor] | None = None) -> ResBlock:
            return ResBlock(num_in, num_out, num_condition, dropout, resample)

        def stage(num_in: int, level: int) -> Stage:
            parts = Stage([block(num_in, widths[level])])
            if attends[level]:
                parts.append(AttentionBlock(widths[level], num_head_channels))
            return parts

        last = len(widths) - 1
        channels = widths[0]
        skips = [channels]
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(in_channels, channels, 3, padding=1)])])
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(stage(channels, level))
                channels = width
                skips.append(channels)
            if level < last:
                self.input_blocks.append(Stage([block(channels, channels, halved)]))
                skips.append(channels)
        middle = AttentionBlock(channels, num_head_channels)
        self.middle_block = Stage([block(channels, channels), middle, block(channels, channels)])
        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            for number in range(num_res_blocks + 1):
                parts = stage(channels + skips.pop(), level)
                channels = widths[level]
                if level > 0 and number == num_res_blocks:
                    parts.append(block(channels, channels, doubled))
                self.output_blocks.append(parts)
        self.out = nn.Sequential(
            FloatGroupNorm(channels),
            nn.SiLU(),
            zeroed(nn.Conv2d(channels, self.out_channels, 3, padding=1)),
        )
        self.masks = _masks(mask, self._routed_widths())
        self.num_timesteps = next(iter(self.masks.values())).num_timesteps

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The predicted noise, followed by the variance's interpolation with `learn_sigma`.

        Args:
            x: float (B, in_channels, input_size, input_size).
            t: int64 (B,), training timesteps in [0, T).
            y: int64 (B,), labels in [0, num_classes), or `null_label`; without classes they change nothing.
                Dropping labels in training is the caller's: see `layers.drop_labels`.

        Returns:
            (B, out_channels, input_size, input_size), of x's dtype.

        Raises:
            ValueError: on other shapes, or timesteps and labels that are not integers.
        """
        check_images(x, self.in_channels, self.input_size)
        check_integers("t", t, len(x))
        check_integers("y", y, len(x))
        waves = timestep_waves(t, self.hidden_size).to(self.time_embed.get_parameter("0.weight").dtype)
        condition: Tensor = self.time_embed(waves)
        if self.label_emb is not None:
            condition = condition + self.label_emb(y)
        first, *stages = self.input_blocks
        h: Tensor = first(x, condition, {})
        routes = self._routes(t, h.dtype)
        skips = [h]
        for stage in stages:
            h = stage(h, condition, routes)
            skips.append(h)
        h = self.middle_block(h, condition, routes)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), condition, routes)
        out: Tensor = self.out(h)
        return out.to(x.dtype)

    def _routes(self, t: Tensor, dtype: torch.dtype) -> Routes:
        rows = {int(width): mask(t, dtype) for width, mask in self.masks.items()}
        return {width: on[:, :, None, None] for width, on in rows.items() if on is not None}

    def _routed_widths(self) -> list[int]:
        blocks = (part for part in self.modules() if isinstance(part, ResBlock | AttentionBlock))
        return sorted({part.num_channels for part in blocks})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Called by load_state_dict on its own copy of the dict, before it looks into the children.
        for key in [key for key in state_dict if key.startswith(prefix) and is_routing_buffer(key)]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


def _masks(mask: Router | Mapping[int, Tensor] | None, widths: list[int]) -> nn.ModuleDict:
    """A mask for each width, under its number."""
    if isinstance(mask, Mapping):
        if sorted(mask) != widths:
            raise ValueError(f"mask has the widths {sorted(mask)}: it must have the model's, {widths}")
        rows = sorted({len(values) for values in mask.values()})
        if len(rows) > 1:
            raise ValueError(f"mask has {' and '.join(map(str, rows))} rows: it must have T for each width")
        return nn.ModuleDict({str(width): ChannelMask(mask[width], width) for width in widths})
    return nn.ModuleDict({str(width): ChannelMask(mask, width) for width in widths})


def _check_sizes(
    input_size: int, hidden_size: int, widths: list[int], attends: list[bool], num_head_channels: int
) -> None:
    if not widths:
        raise ValueError(
            "channel_multipliers is empty: it must have one for each height, of full height first"
        )
    halvings = len(widths) - 1
    if input_size % 2**halvings:
        raise ValueError(f"input_size is {input_size}: {halvings} halvings need a multiple of {2**halvings}")
    if hidden_size % NUM_GROUPS:
        raise ValueError(f"hidden_size is {hidden_size}: the group norms need a multiple of {NUM_GROUPS}")
    for width in [w for w, attends_here in zip(widths, attends, strict=True) if attends_here] + widths[-1:]:
        if width % num_head_channels:
            raise ValueError(
                f"num_head_channels is {num_head_channels}: "
                f"it must divide the {width} channels of an attention block"
            )
