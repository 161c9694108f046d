"""TrialConfig: everything that one training run depends on, as a tree of frozen objects.

Numbers follow the DTR paper's protocol (its appendix C) where it gives one.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dtr_ray.config.base import Config, Positive, PositiveFloat, Probability
from dtr_ray.config.data import DataConfig
from dtr_ray.config.errors import RuleError
from dtr_ray.config.evaluation import EvaluationConfig
from dtr_ray.config.files import read_config
from dtr_ray.config.model import ModelConfig
from dtr_ray.config.routing import DTRRouting, RoutingConfig
from dtr_ray.config.rules import trial_problems
from dtr_ray.config.weighting import VanillaWeighting, WeightingConfig
from dtr_ray.disk import write_durably


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
    accumulation_steps: Positive = 1
    """Parts in which each worker's share of a batch goes through the model, to save memory."""
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
    guidance_channels: Literal["all", "first_three"] = "all"
    """`first_three`: guide only those, as the official DiT sampling does (for its released weights)."""
    clip_denoised: bool = False
    """Clip the predicted image to [-1, 1]: for pixels, never for latents."""


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
    def resolved_model(self) -> ModelConfig:
        """The model with the sizes that follow from the data and the diffusion."""
        channels, size, _ = self.data.sample_shape
        classes = self.data.classes
        return self.model.model_copy(
            update={
                "input_size": size,
                "in_channels": channels,
                "num_classes": classes,
                "text_channels": self.data.text_channels if self.data.text_encoder is not None else None,
                "class_dropout_prob": self.model.class_dropout_prob if self.data.is_conditional else 0.0,
                "learn_sigma": self.diffusion.variance == "learned_range",
            }
        )

    @property
    def checkpoint_every_steps(self) -> int:
        """Steps between checkpoints, the default resolved."""
        return self.training.checkpoint_every_steps or self.evaluation.every_steps

    def save(self, path: Path) -> None:
        """Writes the resolved configuration as JSON."""
        write_durably(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote; raises ConfigError, which names the file, where it is something else."""
        return read_config(path, cls)
