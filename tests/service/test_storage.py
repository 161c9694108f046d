"""The plan says how much disk a sweep takes, and the sweep takes no more."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_sweeps import tiny_sweep
from tiny_trials import size_of, tiny_config

from dtr_ray.service.plan import print_plan
from dtr_ray.service.storage import checkpoint_bytes, storage_of
from dtr_ray.training.state import TrainingState


@pytest.mark.parametrize("weighting", ["vanilla", "ant_uw"])
def test_a_checkpoint_is_as_large_as_told(tmp_path: Path, weighting: str):
    config = tiny_config(weighting__name=weighting)
    state = TrainingState.build(config, torch.device("cpu"))
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.save(tmp_path / "00000001", config)
    real = size_of(tmp_path / "00000001")
    assert state.num_bytes <= real <= state.num_bytes + 100_000
    assert real <= checkpoint_bytes(config) <= real + 200_000


def test_the_largest_model_of_the_search_counts(tmp_path: Path):
    small = tiny_sweep(tmp_path)
    space = small.to_dict()["space"]
    wide = tiny_sweep(tmp_path, space=space | {"model.depth": {"type": "choice", "values": [1, 12]}})
    assert storage_of(wide, 1).checkpoint > 3 * storage_of(small, 1).checkpoint


def test_two_checkpoints_a_trial_stay_and_those_that_run_have_a_third(tmp_path: Path):
    config = tiny_sweep(tmp_path, search__num_trials=10)
    assert storage_of(config, 4).num_checkpoints == 24
    assert storage_of(config, 40).num_checkpoints == 30
    assert storage_of(config, 0).num_checkpoints == 21


def test_the_plan_tells_it_in_gb_and_what_is_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    print_plan(tiny_sweep(tmp_path), tmp_path / "tiny", Console(width=400))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("storage")]
    assert f"GB at most in {tmp_path / 'tiny'}: " in line
    assert "2 a trial, the best and the last, and one more while it trains" in line
