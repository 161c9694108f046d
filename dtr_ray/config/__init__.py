"""Typed, frozen, validated configuration; every other layer may import it, it imports none."""

from dtr_ray.config.base import Config, flatten, override
from dtr_ray.config.data import DataConfig
from dtr_ray.config.evaluation import EvaluationConfig
from dtr_ray.config.model import ModelConfig
from dtr_ray.config.prepare import PrepareConfig
from dtr_ray.config.routing import RoutingConfig
from dtr_ray.config.space import Space
from dtr_ray.config.sweep import SweepConfig
from dtr_ray.config.trial import (
    DiffusionConfig,
    SamplingConfig,
    TrainingConfig,
    TrialConfig,
)
from dtr_ray.config.weighting import WeightingConfig

__all__ = [
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "ModelConfig",
    "PrepareConfig",
    "RoutingConfig",
    "SamplingConfig",
    "Space",
    "SweepConfig",
    "TrainingConfig",
    "TrialConfig",
    "WeightingConfig",
    "flatten",
    "override",
]
