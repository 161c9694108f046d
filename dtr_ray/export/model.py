"""DTRTransformer: the model as a diffusers component."""

from typing import Any, Self

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from dtr_ray.config import TrialConfig
from dtr_ray.models import model_arguments
from dtr_ray.models.dit import DiT


class DTRTransformer(DiT, ModelMixin, ConfigMixin):
    """A DiT that diffusers saves and loads; its weights keep the key names of the official checkpoints."""

    @register_to_config
    def __init__(self, model: dict[str, Any], routing: dict[str, Any], num_timesteps: int) -> None:
        """Builds the model as `build_model` does, from plain values."""
        super().__init__(**model_arguments(model, routing, num_timesteps))

    @classmethod
    def from_trial(cls, trial: TrialConfig) -> Self:
        """The model of a trial, with new weights."""
        sizes = trial.resolved_model.to_dict()
        # The decorator that keeps the arguments hides their types.
        model: Self = cls(sizes, trial.routing.to_dict(), trial.diffusion.num_timesteps)
        return model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """As `DiT.forward`; takes x of any float type, whatever that of the weights is."""
        return super().forward(x.to(next(self.parameters()).dtype), t, y)
