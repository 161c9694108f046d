"""Reading weights: official DiT, DTR and Switch-DiT checkpoints, and safetensors."""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dtr_ray.models.trunk import is_routing_buffer

_WEIGHTS_KEYS = ("ema", "model")


class _Unused:
    """Stands for an object of the settings that training scripts keep beside the weights, and forgets it."""

    def __setstate__(self, state: Any) -> None:
        pass


# The command line (DiT's script), and OmegaConf's objects (DTR's and Switch-DiT's).
_UNUSED = (
    "argparse.Namespace",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
)
_KNOWN: list[Any] = [*((_Unused, name) for name in _UNUSED), collections.defaultdict, dict, list, int]
"""What may be in a file beside tensors."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Reads a checkpoint's weights into a model, on the devices where its own are.

    Takes `.safetensors`, and torch's files with bare weights or with training's dictionary around them:
    there the averaged weights (`ema`) go before the raw ones (`model`). Nothing in a file is executed.

    Args:
        model: what the weights are for; its state dict says which keys and shapes are needed, but a
            missing `pos_embed` and the fixed tables of DTR and Switch-DiT are passed over.
        path: the file.

    Raises:
        ValueError: where there is no such file, it holds no weights, or they do not fit the model; the
            message names the first key that does not fit.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such checkpoint file")
    weights = _read(file)
    _check_fit(model.state_dict(), weights, file)
    model.load_state_dict(weights)


def _read(file: Path) -> dict[str, Tensor]:
    """The weights of a file, on the CPU."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        # Mapped, since the optimizer's state beside the weights is twice as large and not needed.
        mapped = zipfile.is_zipfile(file)
        with torch.serialization.safe_globals(_KNOWN):
            content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file}: cannot be read as weights alone: {error}") from error
    if isinstance(content, dict):
        content = next((content[key] for key in _WEIGHTS_KEYS if key in content), content)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file}: holds no weights: expected tensors by name, bare or under ema or model")
    return content


def _check_fit(needed: dict[str, Tensor], given: dict[str, Tensor], file: Path) -> None:
    for key, tensor in needed.items():
        if key not in given:
            if key.rpartition(".")[2] == "pos_embed":
                continue
            raise ValueError(f"{file}: {key} is missing; the model needs it in shape {tuple(tensor.shape)}")
        if given[key].shape != tensor.shape:
            raise ValueError(
                f"{file}: {key} has shape {tuple(given[key].shape)}; the model needs {tuple(tensor.shape)}"
            )
    for key in given:
        if key not in needed and not is_routing_buffer(key):
            raise ValueError(f"{file}: {key} is not a part of the model")
