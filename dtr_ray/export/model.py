"""DTRModel: the models as diffusers components, a class for each family."""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dtr_ray.config import TrialConfig
from dtr_ray.models import FAMILIES, model_arguments
from dtr_ray.models.channel_mask import set_step


class DTRModel(nn.Module):
    """A model that diffusers saves and loads; its weights keep the key names of the official checkpoints.

    What `EXPORTED` holds are its subclasses, each of a family's class and of those of diffusers.
    """

    device: torch.device
    dtype: torch.dtype
    num_classes: int
    in_channels: int
    input_size: int

    @register_to_config
    def __init__(
        self, model: dict[str, Any], routing: dict[str, Any], num_timesteps: int, step: int = 0
    ) -> None:
        """Builds the model as `build_model` does, from plain values, as it is after `step` training steps."""
        super().__init__(**model_arguments(model, routing, num_timesteps))
        set_step(self, step)

    @staticmethod
    def from_trial(trial: TrialConfig, step: int = 0) -> "DTRModel":
        """The model of a trial, with new weights, and the masks in force after `step` training steps."""
        sizes = trial.resolved_model.to_dict()
        # The decorator that keeps the arguments hides their types.
        model: DTRModel = EXPORTED[trial.model.family](
            sizes, trial.routing.to_dict(), trial.diffusion.num_timesteps, step
        )
        return model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        """As the family's own; takes x and text of any float type, whatever that of the weights is."""
        dtype = next(self.parameters()).dtype
        return super().forward(x.to(dtype), t, y.to(dtype) if y.is_floating_point() else y)


def _exported(family: str, network: type[nn.Module]) -> type[DTRModel]:
    name = "DTR" + family.replace("-", "")
    bases = (DTRModel, network, ModelMixin, ConfigMixin)
    return type(name, bases, {"__module__": __name__, "__doc__": f"A {family} as a diffusers component."})


EXPORTED = {family: _exported(family, network) for family, network in FAMILIES.items()}
"""The exported class of each family: `DTRDiT`, `DTRSwitchDiT`, ..."""

# diffusers finds a component's class by its name, in its module.
globals().update({kind.__name__: kind for kind in EXPORTED.values()})
