"""A tiny trained model, and its export."""

from pathlib import Path

import pytest
from tiny_trials import digits, tiny_config

from dtr_ray.config import TrialConfig
from dtr_ray.export.folder import export_model
from dtr_ray.training import train


@pytest.fixture(scope="module")
def config() -> TrialConfig:
    """With guidance and bfloat16, which an export must not lose; long enough that labels matter."""
    return tiny_config(
        model__patch_size=2,
        training__num_steps=150,
        training__batch_size=32,
        training__precision="bf16",
        sampling__num_steps=8,
        sampling__guidance_scale=1.5,
        evaluation__every_steps=150,
        evaluation__seed=5,
        evaluation__grid_images=12,
    )


@pytest.fixture(scope="module")
def trial(config: TrialConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished trial."""
    folder = tmp_path_factory.mktemp("trial")
    list(train(config, folder, digits(config)))
    return folder


@pytest.fixture(scope="module")
def export(trial: Path) -> Path:
    return export_model(trial, trial.parent / "export", name="tiny", facts={"fd": 1.23456, "from": "a test"})
