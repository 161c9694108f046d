"""A small trained model, as a trial leaves it."""

from pathlib import Path

import pytest
from tiny_trials import digits, tiny_config

from dtr_ray.training import train


@pytest.fixture(scope="session")
def trained(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trial of 60 steps over 50 timesteps."""
    folder = tmp_path_factory.mktemp("trained") / "trial"
    changes = {"training__num_steps": 60, "evaluation__every_steps": 60, "diffusion__num_timesteps": 50}
    config = tiny_config(**changes)
    list(train(config, folder, digits(config)))
    return folder
