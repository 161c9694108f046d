"""Small models that route by the timestep, trained by one process or by several: what both must agree on."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtr_ray.distributed import Group
from dtr_ray.models import build_model

SIZES = {"hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 4, "input_size": 8, "num_classes": 5}
MODELS: dict[str, dict[str, Any]] = {
    "Switch-DiT": SIZES | {"name": "Switch-DiT", "num_experts": 3, "top_k": 1},
    "Multi-DiT": SIZES | {"name": "Multi-DiT", "num_experts": 4},
}
NUM_TIMESTEPS = 40


def filled(name: str) -> nn.Module:
    """A model whose weights, the zeros of its start included, are random."""
    model = build_model(MODELS[name], {"name": "none"}, NUM_TIMESTEPS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eight samples; the timesteps of either half lie in one interval, and no worker sees all."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, 8, 8, generator=generator)
    t = torch.tensor([0, 1, 5, 9, 10, 13, 17, 19]) + 20 * step
    return x, t, torch.randint(5, (8,), generator=generator)


def train_in_group(group: Group, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Each model's weights after two steps of AdamW, the batches shared by the workers."""
    found = {}
    for name in MODELS:
        model = filled(name)
        run = DistributedDataParallel(model, broadcast_buffers=False) if group.world_size > 1 else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for step in range(2):
            output = run(*(group.slice(part) for part in batch(step)))
            output, prior_loss = output if isinstance(output, tuple) else (output, 0.0)
            (output.square().mean() + prior_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[name] = {key: weight.detach() for key, weight in model.named_parameters()}
    return found
