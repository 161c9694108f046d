"""What a model costs: its parameters, and the operations of one forward.

GFLOPs here are the papers': a multiply-add counts **once**. Most counters, torch's FlopCounterMode among
them, count it twice. The figures of DiT (Peebles & Xie; S, B, L and XL at patch 2) and of DTR (table 7) are
met to their last digit by

- the multiply-adds of all linear layers, convolutions and both products of attention,
- one operation for each value that a layer norm (or group norm) normalises, and
- for routing, three for each value of a block's tokens: the products with the mask and with its complement,
  and their sum.

Activations, softmax, adaLN's shifts and scales, biases and residual sums are in none of those tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dtr_ray.config import ModelConfig, RoutingConfig, TrialConfig
from dtr_ray.config.data import TEXT_TOKENS
from dtr_ray.config.explain import problems
from dtr_ray.config.presets import PRESETS
from dtr_ray.config.read import change_trial, read_sweep, read_trial
from dtr_ray.config.routing import DTRRouting, NoRouting
from dtr_ray.config.tree import read_tree
from dtr_ray.export.trained import find_model
from dtr_ray.models import FAMILIES, model_arguments
from dtr_ray.training.state import CONFIG_FILE

_INPUTS = {"DiT": (4, 32), "Switch-DiT": (4, 32), "Multi-DiT": (4, 32), "ADM": (3, 64)}
"""Channels, and height and width, where a configuration leaves them to the data: those of the papers."""


@dataclass(frozen=True)
class Cost:
    """Parameters of a model, and operations of its forward at batch size 1."""

    parameters: int
    multiply_adds: int
    """Of linear layers, convolutions and attention, each counted once."""
    normalised: int
    """Values that pass a layer or group norm."""
    routing: int
    """Products and sums that the mask adds, each counted once."""

    @property
    def gflops(self) -> float:
        """What the papers call GFLOPs: all of it, in 10^9."""
        return (self.multiply_adds + self.normalised + self.routing) / 1e9


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters: fixed positions and routing masks are none."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def gflops(
    model: ModelConfig | dict[str, Any] | str, routing: RoutingConfig | dict[str, Any] | None = None
) -> float:
    """`model_cost(...).gflops`: GFLOPs of one forward, where a multiply-add counts once."""
    return model_cost(model, routing).gflops


def model_cost(
    model: ModelConfig | dict[str, Any] | str,
    routing: RoutingConfig | dict[str, Any] | None = None,
    num_timesteps: int = 1000,
) -> Cost:
    """Cost of a model in evaluation mode, of tensors without memory: nothing is computed.

    Args:
        model: its configuration, or its name. Where it leaves them open the input is 4 x 32 x 32 (latents of
            256 px; for an ADM 3 x 64 x 64) and there are 1,000 classes.
        routing: its routing; None is none.
        num_timesteps: T.

    Raises:
        ValueError: as `build_model`.
    """
    config = _resolved(model)
    whole = _build(config, routing, num_timesteps)
    # Of whole DiTs for intervals, one runs for each timestep.
    part = config
    if config.family == "Multi-DiT":
        part = config.model_copy(update={"name": config.name.removeprefix("Multi-"), "num_experts": None})
    plain = _count(_build(part, None, num_timesteps), part)
    routed = _count(_build(part, routing, num_timesteps), part)
    assert plain.multiply_adds == routed.multiply_adds
    extra = routed.elementwise - plain.elementwise
    return Cost(count_parameters(whole), routed.multiply_adds, routed.normalised, extra)


def costs_of(name: str, sets: Sequence[str] = ()) -> list[tuple[str, str, Cost]]:
    """(model, routing, cost) of what a command names: without routing, and with it.

    Args:
        name: a model's name, at the papers' input and with DTR; or a YAML of a trial or a sweep (its fixed
            part), or a trial's folder, with the sizes and the routing that are there.
        sets: `KEY=VALUE` texts for a YAML or a folder.

    Raises:
        ValueError: it is none of these, or `sets` with a mere name.
    """
    path = Path(name)
    if name in PRESETS or not (path.exists() or path.suffix in (".yaml", ".yml", ".json")):
        if sets:
            raise ValueError(f"--set is for a YAML or a folder, not for the name {name}")
        try:
            model, num_timesteps = _resolved(name), 1000
        except ValidationError as error:
            rules = "; ".join(problem.rule for problem in problems(error, ModelConfig))
            raise ValueError(rules) from error
        routing: RoutingConfig = NoRouting() if model.family == "Switch-DiT" else DTRRouting()
    else:
        trial = _read(path, sets)
        model, routing, num_timesteps = trial.resolved_model, trial.routing, trial.diffusion.num_timesteps
    choices = list({choice.name: choice for choice in (NoRouting(), routing)}.values())
    return [(model.name, choice.name, model_cost(model, choice, num_timesteps)) for choice in choices]


def _read(path: Path, sets: Sequence[str]) -> TrialConfig:
    if path.is_dir():
        folder = find_model(path)
        return change_trial(TrialConfig.load(folder / CONFIG_FILE), sets, str(folder))
    if {"trial", "space"} <= read_tree(path).values.keys():
        return read_sweep(path, sets, check_paths=False).trial
    return read_trial(path, sets, check_paths=False)


def _resolved(model: ModelConfig | dict[str, Any] | str) -> ModelConfig:
    if isinstance(model, str):
        model = {"name": model}
    config = ModelConfig.from_dict(model) if isinstance(model, dict) else model
    channels, size = _INPUTS[config.family]
    defaults = {"in_channels": channels, "input_size": size, "num_classes": 1000}
    missing = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    return config.model_copy(update=missing)


def _build(
    config: ModelConfig, routing: RoutingConfig | dict[str, Any] | None, num_timesteps: int
) -> nn.Module:
    # Masks are made outside: they are numbers, of which the meta device has none.
    arguments = model_arguments(config, routing, num_timesteps)
    with torch.device("meta"):
        model = FAMILIES[config.family](**arguments)
    return model.eval()


class _ElementwiseCounter(TorchDispatchMode):
    """Counts what FlopCounterMode does not see: products and sums value by value, and normalised values."""

    _operations: dict[Any, int] = {
        torch.ops.aten.mul: 1,
        torch.ops.aten.mul_: 1,
        torch.ops.aten.add: 1,
        torch.ops.aten.add_: 1,
        torch.ops.aten.sub: 1,
        torch.ops.aten.rsub: 1,
        torch.ops.aten.addcmul: 2,
        torch.ops.aten.where: 1,
    }
    _norms = (torch.ops.aten.native_layer_norm, torch.ops.aten.native_group_norm)

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elementwise = 0
        self.normalised = 0
        self.multiply_adds = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        if operation in self._operations:
            self.elementwise += self._operations[operation] * result.numel()
        elif operation in self._norms:
            self.normalised += result[0].numel()
        return result


def _count(model: nn.Module, config: ModelConfig) -> _ElementwiseCounter:
    """Counts a forward of batch size 1."""
    counter, flops = _ElementwiseCounter(), FlopCounterMode(display=False)
    # Not on the meta device itself, which has no autocast. Fused attention kernels hide what they multiply.
    with torch.no_grad(), FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        tensors: dict[str, Tensor] = {
            name: nn.Parameter(torch.empty(value.shape), requires_grad=False)
            for name, value in model.named_parameters()
        }
        for name, value in model.named_buffers():
            tensors[name] = torch.empty(value.shape, dtype=value.dtype)
        size = config.input_size or 0
        x = torch.zeros(1, config.in_channels or 0, size, size)
        t = y = torch.zeros(1, dtype=torch.int64)
        if config.text_channels is not None:
            y = torch.zeros(1, TEXT_TOKENS, config.text_channels)
        with counter, flops:
            functional_call(model, tensors, (x, t, y))
    # It counts the product and the sum of a multiply-add.
    counter.multiply_adds = flops.get_total_flops() // 2
    return counter
