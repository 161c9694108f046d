"""Every family of models, saved, opened and exported; and released weights brought in."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import tiny_config

from dtr_ray.config import TrialConfig
from dtr_ray.export.folder import export_model
from dtr_ray.export.model import EXPORTED, DTRModel
from dtr_ray.export.pipeline import DTRPipeline
from dtr_ray.export.released import import_checkpoint
from dtr_ray.export.trained import build_pipeline, open_model
from dtr_ray.models import FAMILIES, build_model
from dtr_ray.models.channel_mask import set_step
from dtr_ray.training import TrainingState
from dtr_ray.training.state import checkpoint_folder

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"model__hidden_size": 32, "model__depth": 2, "model__num_heads": 2}
SIZES |= {"model__patch_size": 4}
MODELS: dict[str, dict[str, Any]] = {
    "DiT": SIZES,
    "Switch-DiT": SIZES | {"routing__name": "none"},
    "Multi-DiT": SIZES | {"model__num_experts": 2},
    "ADM": {
        "model__hidden_size": 32,
        "model__channel_multipliers": [1, 2],
        "model__num_res_blocks": 1,
        "model__attention_resolutions": [4],
        "model__num_head_channels": 32,
    },
}


def config_of(family: str, **changes: Any) -> TrialConfig:
    return tiny_config(**({"model__name": family} | MODELS[family] | changes))


def saved(config: TrialConfig, folder: Path, step: int = 3) -> TrainingState:
    """A trial's folder with one checkpoint of that step, of random weights."""
    state = TrainingState.build(config, CPU)
    state.step = step
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in state.ema.parameters():
            weight.normal_(std=0.05)
    state.save(checkpoint_folder(folder, step), config)
    set_step(state.ema, step)
    return state


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 300, 600, 900, 999]), torch.arange(6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_exports_and_draws_the_same(family: str, tmp_path: Path):
    config = config_of(family)
    expected = saved(config, tmp_path / "trial").ema(*inputs())
    opened = open_model(tmp_path / "trial")
    export = open_model(export_model(tmp_path / "trial", tmp_path / "export"))
    for trained in (opened, export):
        assert type(trained.model) is EXPORTED[family]
        assert not trained.model.training
        assert torch.equal(trained.model(*inputs()), expected)
    pictures = [
        pipeline(num_images=3, output_type="pt").images
        for pipeline in (
            build_pipeline(opened),
            build_pipeline(export),
            DTRPipeline.from_pretrained(tmp_path / "export"),
        )
    ]
    assert pictures[0].std() > 0
    for other in pictures[1:]:
        torch.testing.assert_close(other, pictures[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_keep_the_names_and_values_of_the_plain_model(family: str):
    config = config_of(family)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        plain = build_model(config.resolved_model, config.routing).state_dict()
        torch.manual_seed(4)
        exported = DTRModel.from_trial(config).state_dict()
    assert plain.keys() == exported.keys()
    assert all(torch.equal(plain[key], exported[key]) for key in plain)


def test_a_routing_that_changes_in_training_is_exported_as_the_checkpoint_had_it(tmp_path: Path):
    roaming = {"routing__name": "max_roaming", "routing__beta": 0.5, "routing__every_steps": 1}
    config = config_of("DiT", **roaming)
    expected = saved(config, tmp_path / "trial", step=9).ema(*inputs())
    export_model(tmp_path / "trial", tmp_path / "export")
    assert torch.equal(open_model(tmp_path / "trial").model(*inputs()), expected)
    assert torch.equal(open_model(tmp_path / "export").model(*inputs()), expected)
    unmoved = DTRModel.from_trial(config)
    unmoved.load_state_dict(open_model(tmp_path / "export").model.state_dict())
    assert not torch.equal(unmoved.eval()(*inputs()), expected)


@pytest.mark.parametrize("family", ["DiT", "Switch-DiT"])
def test_released_weights_are_sampled_from_and_exported(family: str, tmp_path: Path):
    config = config_of(family)
    model = build_model(config.resolved_model, config.routing)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.05)
    content = {"ema": model.state_dict() | {"full_time": torch.arange(1000)}, "args": argparse.Namespace(a=1)}
    torch.save(content, tmp_path / "0100000.pt")
    folder = import_checkpoint(tmp_path / "0100000.pt", config, tmp_path / "released")
    trained = open_model(folder)
    assert trained.config == config
    assert torch.equal(trained.model(*inputs()), model.eval()(*inputs()))
    assert open_model(export_model(folder, tmp_path / "export")).config == config
    with pytest.raises(ValueError, match="is there already"):
        import_checkpoint(tmp_path / "0100000.pt", config, folder)
    other = config_of(family, model__hidden_size=64)
    with pytest.raises(ValueError, match=r"has shape \(\d+.*; the model needs"):
        import_checkpoint(tmp_path / "0100000.pt", other, tmp_path / "other")
    assert not (tmp_path / "other").exists()
