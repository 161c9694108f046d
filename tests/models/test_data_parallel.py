"""Models of which a batch does not use all parts, under data-parallel training."""

from pathlib import Path

import pytest
import torch
from routed_models import MODELS, NUM_TIMESTEPS, batch, filled, train_in_group
from tiny_trials import in_workers

from dtr_ray.distributed import Group


def test_two_workers_train_as_one_process_does(tmp_path: Path):
    alone = train_in_group(Group(), tmp_path)
    first, second = in_workers(train_in_group, 2, tmp_path)
    for name, weights in alone.items():
        for key, weight in weights.items():
            assert torch.equal(first[name][key], second[name][key])
            torch.testing.assert_close(first[name][key], weight, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_has_a_gradient_whatever_the_batch(name: str):
    model = filled(name)
    for t in (torch.tensor([3]), torch.tensor([39]).expand(8), torch.arange(8)):
        x, _, y = (part[: len(t)] for part in batch(0))
        output = model(x, t, y)
        sum(part.square().mean() for part in (output if isinstance(output, tuple) else (output,))).backward()
        assert [key for key, weight in model.named_parameters() if weight.grad is None] == []
        model.zero_grad()
    assert model.num_timesteps == NUM_TIMESTEPS
