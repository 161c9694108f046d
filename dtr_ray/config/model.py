"""ModelConfig: which network is trained, by name or by its sizes."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from dtr_ray.config.base import Config, Positive, PositiveFloat, Probability
from dtr_ray.config.errors import broken, near_miss
from dtr_ray.config.presets import PRESETS, SIZES, TRANSFORMER_FAMILIES, family

_OWNERS: dict[str, tuple[str, ...]] = {
    "depth": TRANSFORMER_FAMILIES,
    "num_heads": TRANSFORMER_FAMILIES,
    "patch_size": TRANSFORMER_FAMILIES,
    "mlp_ratio": TRANSFORMER_FAMILIES,
    "num_experts": ("Switch-DiT", "Multi-DiT"),
    "top_k": ("Switch-DiT",),
    "prior_weight": ("Switch-DiT",),
    "text_channels": ("DiT",),
    "channel_multipliers": ("ADM",),
    "num_res_blocks": ("ADM",),
    "attention_resolutions": ("ADM",),
    "num_head_channels": ("ADM",),
    "dropout": ("ADM",),
}
"""The families that know a key, for the keys that not all know."""

_DEFAULTS: dict[str, dict[str, float]] = {
    "DiT": {"mlp_ratio": 4.0},
    "Switch-DiT": {"mlp_ratio": 4.0, "num_experts": 3, "top_k": 2, "prior_weight": 1.0},
    "Multi-DiT": {"mlp_ratio": 4.0, "num_experts": 4},
    "ADM": {"dropout": 0.0},
}


class ModelConfig(Config):
    """A network by preset name, or a family with explicit sizes; `None`: the preset's or the data's."""

    name: str = "DiT"
    """`DiT-T/2` ... `DiT-XL/8`, the same with `Switch-` or `Multi-` before, `ADM-64`, `ADM-T`; or `DiT`,
    `Switch-DiT`, `Multi-DiT`, `ADM` with explicit sizes."""
    hidden_size: Positive | None = None
    """Channels of a token; in an ADM U-Net, of the full resolution."""
    depth: Positive | None = None
    num_heads: Positive | None = None
    patch_size: Positive | None = None
    mlp_ratio: PositiveFloat | None = None
    """Width of a transformer's MLPs over `hidden_size`: 4."""
    num_experts: Positive | None = None
    """Switch-DiT: sparse experts in each block (3). Multi-DiT: whole DiTs, one an interval of T (4)."""
    top_k: Positive | None = None
    """Switch-DiT: experts that each timestep uses in a block (2)."""
    prior_weight: Annotated[float, Field(ge=0)] | None = None
    """Switch-DiT: weight of the diffusion prior loss (1), the paper's w_JSD."""
    channel_multipliers: list[Positive] | None = None
    """ADM: channels over `hidden_size` at full, half, quarter, ... resolution."""
    num_res_blocks: Positive | None = None
    """ADM: residual blocks at each resolution."""
    attention_resolutions: list[Positive] | None = None
    """ADM: heights in pixels at which there is attention."""
    num_head_channels: Positive | None = None
    """ADM: channels of an attention head."""
    dropout: Probability | None = None
    """ADM: share of a residual block's values dropped in training (0)."""
    class_dropout_prob: Probability = 0.1
    """Share of labels (or captions) dropped in training, for classifier-free guidance."""
    input_size: Positive | None = None
    """Height and width of the model's input; from the data."""
    in_channels: Positive | None = None
    """Channels of the model's input; from the data."""
    num_classes: Positive | None = None
    """Number of classes, 1 for unconditional; from the data."""
    text_channels: Positive | None = None
    """DiT: channels of the text tokens that condition it, in place of classes; from the data."""
    learn_sigma: bool = True
    """Predict the variance too (twice the output channels); from `diffusion.variance` in a trial."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name not in SIZES and self.name not in PRESETS:
            guess = near_miss(self.name, (*SIZES, *PRESETS))
            hint = f"did you mean {guess}?" if guess else "such as DiT-S/2, Switch-DiT-S/2, ADM-64"
            raise broken("name", f"{self.name!r} is no model; {hint}")
        for key, owners in _OWNERS.items():
            if getattr(self, key) is not None and self.family not in owners:
                raise broken(key, f"is for {' and '.join(owners)}, but name is {self.name}", "name")
        missing = [key for key in SIZES.get(self.name, ()) if getattr(self, key) is None]
        if missing:
            raise broken("name", f"{self.name} with explicit sizes needs {', '.join(missing)} as well")
        experts, top_k = self.value("num_experts"), self.value("top_k")
        if top_k is not None and experts is not None and top_k > experts:
            raise broken("top_k", f"{top_k} is more than the {experts} experts", "num_experts", "name")
        return self

    @property
    def family(self) -> str:
        """`DiT`, `Switch-DiT`, `Multi-DiT` or `ADM`."""
        return family(self.name)

    def value(self, key: str) -> Any:
        """A size of this model: its own, the preset's, or the family's default; None where it has none."""
        own = getattr(self, key)
        preset = getattr(PRESETS.get(self.name), key, None)
        return next((v for v in (own, preset, _DEFAULTS[self.family].get(key)) if v is not None), None)
