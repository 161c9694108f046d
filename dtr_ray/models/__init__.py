"""Models: diffusion transformers and U-Nets, and the masks that route their channels."""

from typing import Any

from pydantic import TypeAdapter
from torch import nn

from dtr_ray.config import ModelConfig, RoutingConfig
from dtr_ray.config.presets import PRESETS
from dtr_ray.models.adm import ADM
from dtr_ray.models.channel_mask import set_step
from dtr_ray.models.checkpoints import load_weights
from dtr_ray.models.dit import DiT
from dtr_ray.models.layers import drop_labels
from dtr_ray.models.multi_dit import MultiDiT
from dtr_ray.models.router import Router
from dtr_ray.models.switch_dit import SwitchDiT

__all__ = ["PRESETS", "DiT", "build_model", "drop_labels", "load_weights", "model_arguments", "set_step"]

_ROUTING: TypeAdapter[RoutingConfig] = TypeAdapter(RoutingConfig)

FAMILIES: dict[str, type[nn.Module]] = {
    "DiT": DiT,
    "Switch-DiT": SwitchDiT,
    "Multi-DiT": MultiDiT,
    "ADM": ADM,
}
"""The class of each family of models; its arguments are the values of a ModelConfig that it knows."""


def build_model(
    config: ModelConfig | dict[str, Any],
    routing: RoutingConfig | dict[str, Any] | None = None,
    num_timesteps: int = 1000,
) -> nn.Module:
    """Builds a model from its configuration, with new weights from torch's global generator.

    Args:
        config: a ModelConfig, or its plain values. Its own sizes go before those of its preset; input
            size, channels and classes that it leaves out are the class's defaults (DiT: 32, 4, 1000; ADM: 64,
            3, 1000).
        routing: a routing configuration, its plain values, or None for no routing.
        num_timesteps: T, rows of the masks, which are those of training step 0: see `set_step`.

    Raises:
        ValueError: on unknown names and keys, values out of range, and sizes that do not fit each other.
    """
    model = ModelConfig.from_dict(config) if isinstance(config, dict) else config
    return FAMILIES[model.family](**model_arguments(model, routing, num_timesteps))


def model_arguments(
    config: ModelConfig | dict[str, Any],
    routing: RoutingConfig | dict[str, Any] | None = None,
    num_timesteps: int = 1000,
) -> dict[str, Any]:
    """What `build_model` builds the model with, by name; arguments and errors as there."""
    model = ModelConfig.from_dict(config) if isinstance(config, dict) else config
    given = model.model_dump(exclude={"name"})
    arguments = {key: model.value(key) for key in given if model.value(key) is not None}
    if model.family in ("Switch-DiT", "Multi-DiT"):
        arguments["num_timesteps"] = num_timesteps
    if routing is not None:
        choice = _ROUTING.validate_python(routing)
        if choice.name != "none":
            if model.family == "Switch-DiT":
                raise ValueError(f"routing is {choice.name}: {model.name} routes by its experts alone")
            arguments["mask"] = Router(choice, num_timesteps)
    return arguments
