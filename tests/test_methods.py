"""Every method with each that it goes with: trains on real digits, and samples; the rest is refused."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_clip import CHANNELS, write_clip
from tiny_trials import batches_of, tiny_config

from dtr_ray.config import TrialConfig
from dtr_ray.config.fields import sections
from dtr_ray.diffusion.drawing import draw
from dtr_ray.diffusion.loss import diffusion_losses
from dtr_ray.diffusion.noise import noise_schedule
from dtr_ray.distributed import Group
from dtr_ray.training.batches import Batch
from dtr_ray.training.state import TrainingState
from dtr_ray.training.step import build_step

CPU = torch.device("cpu")
DOCS = Path(__file__).parents[1] / "docs" / "methods.md"
ROUTINGS = list(sections(TrialConfig)["routing"])
WEIGHTINGS = list(sections(TrialConfig)["weighting"])
SIZES = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
CAPTIONS = "DiT with captions"
MODELS: dict[str, dict[str, Any]] = {
    "DiT": SIZES,
    CAPTIONS: SIZES,
    "Switch-DiT": SIZES,
    "Multi-DiT": SIZES | {"num_experts": 2},
    "ADM": {
        "hidden_size": 32,
        "channel_multipliers": [1, 1],
        "num_res_blocks": 1,
        "attention_resolutions": [4],
        "num_head_channels": 32,
    },
}


def config_of(model: str, routing: str, weighting: str, **more: Any) -> TrialConfig:
    changes: dict[str, Any] = {f"model__{key}": value for key, value in MODELS[model].items()}
    changes["model__name"] = "DiT" if model == CAPTIONS else model
    if model == CAPTIONS:
        changes |= {"data__text_encoder": "clip", "data__text_channels": CHANNELS}
    if routing in ("scheduled", "max_roaming"):
        changes |= {"routing__every_steps": 10}
    if routing == "scheduled" and model == "ADM":
        changes |= {"routing__over": "training", "routing__last_step": 40}
    if weighting.startswith("ant_"):
        changes |= {"weighting__num_clusters": 3}
    return tiny_config(
        **changes,
        routing__name=routing,
        weighting__name=weighting,
        training__batch_size=24,
        training__gradient_clip=1.0,
        **more,
    )


def is_allowed(model: str, routing: str) -> bool:
    try:
        config_of(model, routing, "vanilla")
    except ValidationError:
        return False
    return True


ALLOWED = [
    (model, routing, weighting)
    for model, routing, weighting in itertools.product(MODELS, ROUTINGS, WEIGHTINGS)
    if is_allowed(model, routing)
]
# Each routing and each weighting with each model; all three together take minutes.
QUICK = [
    (model, routing, weighting)
    for model, routing, weighting in ALLOWED
    if weighting == "vanilla" or routing == ("none" if model == "Switch-DiT" else "dtr")
]


@pytest.fixture(autouse=True)
def clip_is_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`text_encoder: clip` is a folder of the current one."""
    folder = tmp_path_factory.getbasetemp() / "encoders"
    if not (folder / "clip").exists():
        write_clip(folder / "clip", num_hidden_layers=1)
    monkeypatch.chdir(folder)


def fixed_loss(state: TrainingState, config: TrialConfig, batch: Batch) -> float:
    """The mean error of the predicted noise on one batch, whatever is weighed how."""
    schedule = noise_schedule(config.diffusion.schedule, config.diffusion.num_timesteps)
    state.model.eval()
    with torch.no_grad():
        found = diffusion_losses(
            state.model, schedule, batch.x, batch.t, batch.noise, {"y": batch.conditions}
        )["mse"]
    state.model.train()
    return float(found.mean())


def train_and_sample(config: TrialConfig) -> None:
    torch.manual_seed(0)
    state = TrainingState.build(config, CPU)
    batches = batches_of(config, state)
    held_out = batches.at(100_000)
    before = fixed_loss(state, config, held_out)
    step = build_step(config, state, Group())
    state.model.train()
    # A U-Net's step takes ten times as long as a transformer's, and a third as many are needed.
    for _ in range(20 if config.model.family == "ADM" else 60):
        step(batches.at(state.step))
        state.step += 1
        state.route()
    after = fixed_loss(state, config, held_out)
    assert after < 0.8 * before
    sample = draw(
        state.ema.eval(),
        noise_schedule(config.diffusion.schedule, config.diffusion.num_timesteps),
        config.sampling,
        config.data.sample_shape,
        seed=0,
        indices=torch.arange(3),
        labels=held_out.conditions[:3],
        device=CPU,
    )
    assert sample.shape == (3, *config.data.sample_shape)
    assert sample.isfinite().all()
    assert len(sample.unique(dim=0)) == 3


@pytest.mark.parametrize(("model", "routing", "weighting"), QUICK)
def test_every_model_trains_and_samples_with_each_routing_and_each_weighting(
    model: str, routing: str, weighting: str
) -> None:
    train_and_sample(config_of(model, routing, weighting))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "routing", "weighting"), [case for case in ALLOWED if case not in QUICK])
def test_everything_that_goes_together_trains_and_samples(model: str, routing: str, weighting: str) -> None:
    train_and_sample(config_of(model, routing, weighting))


@pytest.mark.parametrize(("model", "routing"), [(m, r) for m in MODELS if m != CAPTIONS for r in ROUTINGS])
def test_the_docs_tell_what_goes_together(model: str, routing: str) -> None:
    table = DOCS.read_text(encoding="utf-8").split("## What goes together")[1].split("##")[0]
    lines = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
    column = next(i for i, cell in enumerate(lines[0]) if f"`{routing}`" in cell)
    row = next(line for line in lines if line[0].strip() == model)
    assert (row[column].strip().startswith("no")) == (not is_allowed(model, routing))


@pytest.mark.parametrize(
    ("model", "routing"), [pair for pair in itertools.product(MODELS, ROUTINGS) if not is_allowed(*pair)]
)
def test_what_does_not_go_together_is_refused_by_both_names(model: str, routing: str) -> None:
    with pytest.raises(ValidationError, match=f"{re.escape(routing)} does not go with {model}"):
        config_of(model, routing, "vanilla")
