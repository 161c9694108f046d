"""Models whose masks change in training: they are opened and exported with those they were trained to."""

from pathlib import Path

import pytest
import torch
from tiny_trials import digits, tiny_config

from dtr_ray.distributed import Group
from dtr_ray.evaluation.evaluate import Evaluator
from dtr_ray.export.folder import export_model
from dtr_ray.export.pipeline import DTRPipeline
from dtr_ray.export.trained import build_pipeline, open_model
from dtr_ray.models.router import Router
from dtr_ray.training import train
from dtr_ray.training.state import TrainingState, checkpoint_folder

ROUTINGS = {
    "roaming": {"routing__name": "max_roaming", "routing__every_steps": 2, "routing__beta": 0.5},
    "scheduled": {
        "routing__name": "scheduled",
        "routing__over": "training",
        "routing__last_beta": 0.5,
        "routing__last_step": 10,
        "routing__every_steps": 1,
    },
}


@pytest.mark.parametrize("family", ["DiT", "Multi-DiT"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_an_export_samples_with_the_masks_of_its_step(name: str, family: str, tmp_path: Path):
    sizes = {"model__hidden_size": 32, "model__depth": 1, "model__num_heads": 2, "model__patch_size": 4}
    config = tiny_config(model__name=family, **sizes, **ROUTINGS[name])
    trial, export = tmp_path / "trial", tmp_path / "export"
    list(train(config, trial, digits(config)))
    export_model(trial, export)
    expected = Router(config.routing, 1000).mask(32, step=6)
    assert expected is not None
    for folder in (trial, export, checkpoint_folder(trial, 6)):
        buffers = dict(open_model(folder).model.named_buffers())
        masks = [mask for key, mask in buffers.items() if key.endswith("masks.mask")]
        assert len(masks) == (4 if family == "Multi-DiT" else 1)
        assert all(torch.equal(mask, expected) for mask in masks)

    # What training's own average draws, the export draws too.
    state = TrainingState.build(config, torch.device("cpu"))
    state.load(checkpoint_folder(trial, 6), config)
    data = digits(config)
    drawn = Evaluator(config, data, Group(), torch.device("cpu")).draw(state.ema, torch.arange(6))
    for pipeline in (DTRPipeline.from_pretrained(export), build_pipeline(open_model(export))):
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(num_images=6, output_type="pt").images
        torch.testing.assert_close(images, data.to_pixels(drawn) / 255, atol=1e-5, rtol=0)
