"""Masks that change while a model trains: which step has which, and that nothing about them is lost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import (
    KillAt,
    KilledError,
    Recorder,
    digits,
    distances,
    final_state,
    in_workers,
    tensors_of,
    tiny_config,
    train_with_roaming_masks,
)

from dtr_ray.config import TrialConfig
from dtr_ray.distributed import Group
from dtr_ray.models.router import Router
from dtr_ray.training import latest_checkpoint, train
from dtr_ray.training.state import TrainingState, checkpoint_folder

CPU = torch.device("cpu")
ROUTINGS: dict[str, dict[str, Any]] = {
    "roaming, each step": {"routing__name": "max_roaming", "routing__every_steps": 1},
    "roaming, every 3": {"routing__name": "max_roaming", "routing__every_steps": 3, "routing__beta": 0.5},
    "scheduled": {
        "routing__name": "scheduled",
        "routing__over": "training",
        "routing__last_beta": 0.5,
        "routing__last_step": 5,
        "routing__every_steps": 2,
    },
}


@pytest.fixture(params=ROUTINGS)
def config(request: pytest.FixtureRequest) -> TrialConfig:
    changes = {"training__checkpoint_every_steps": 1, "training__log_every_steps": 1}
    return tiny_config(**changes, evaluation__every_steps=4, **ROUTINGS[request.param])


def mask_at(config: TrialConfig, step: int) -> torch.Tensor:
    mask = Router(config.routing, config.diffusion.num_timesteps).mask(32, step)
    assert mask is not None
    return mask


def masks_of(state: TrainingState) -> list[torch.Tensor]:
    return [model.get_buffer("masks.mask") for model in (state.model, state.ema)]


def test_model_and_average_are_always_routed_by_the_steps_done(
    config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    build = TrainingState.build.__func__

    def keep(cls: type[TrainingState], *args: Any) -> TrainingState:
        seen.append(build(cls, *args))
        return seen[-1]

    monkeypatch.setattr(TrainingState, "build", classmethod(keep))

    class Looker(Recorder):
        def progress(self, step: int, phase: str) -> None:
            assert all(torch.equal(mask, mask_at(config, step)) for mask in masks_of(seen[0]))
            super().progress(step, phase)

    observer = Looker()
    list(train(config, tmp_path, digits(config), observer=observer))
    assert observer.steps == [1, 2, 3, 4, 5, 6]
    assert not torch.equal(mask_at(config, 0), mask_at(config, 6))


def test_a_run_killed_after_every_step_equals_the_uninterrupted_one(config: TrialConfig, tmp_path: Path):
    heard = Recorder()
    expected = list(train(config, tmp_path / "whole", digits(config), observer=heard))
    losses: dict[int, float] = {}
    for step in range(1, 7):
        observer = KillAt(step)
        with pytest.raises(KilledError):
            list(train(config, tmp_path / "killed", digits(config), observer=observer))
        losses |= observer.losses
    last = Recorder()
    reports = list(train(config, tmp_path / "killed", digits(config), observer=last))
    assert losses | last.losses == heard.losses
    assert distances(reports) == distances(expected)
    whole, killed = (final_state(config, tmp_path / name) for name in ("whole", "killed"))
    tensors, others = tensors_of(whole), tensors_of(killed)
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


def test_the_masks_of_the_step_make_the_losses(config: TrialConfig, tmp_path: Path):
    """Or else a resume with the wrong masks would go unnoticed."""
    constant = TrialConfig.from_dict(
        config.to_dict() | {"routing": config.routing.to_dict() | {"every_steps": 1000, "last_step": 1000}}
        if config.routing.name == "scheduled"
        else config.to_dict() | {"routing": config.routing.to_dict() | {"every_steps": 1000}}
    )
    heard = [Recorder(), Recorder()]
    for variant, observer, name in zip((config, constant), heard, ("a", "b"), strict=True):
        list(train(variant, tmp_path / name, digits(config), observer=observer))
    assert heard[0].losses[1] == heard[1].losses[1]
    assert heard[0].losses[6] != heard[1].losses[6]


def test_a_checkpoint_gives_back_the_masks_of_its_step(config: TrialConfig, tmp_path: Path):
    state = TrainingState.build(config, CPU)
    for step in (4, 1):
        state.step = step
        state.save(checkpoint_folder(tmp_path, step), config)
    other = TrainingState.build(config, CPU)
    for step in (4, 1):
        other.load(checkpoint_folder(tmp_path, step), config)
        assert all(torch.equal(mask, mask_at(config, step)) for mask in masks_of(other))


def test_a_longer_run_goes_on_with_the_masks_of_another_trial_s_last_step(tmp_path: Path):
    changes = {"evaluation__every_steps": 3, **ROUTINGS["roaming, each step"]}
    short, long = (tiny_config(training__num_steps=n, **changes) for n in (3, 6))
    list(train(short, tmp_path / "short", digits()))
    expected = list(train(long, tmp_path / "whole", digits()))
    reports = list(train(long, tmp_path / "long", digits(), start_from=latest_checkpoint(tmp_path / "short")))
    assert distances(reports) == distances(expected)


def test_two_workers_roam_as_one_process_does(tmp_path: Path):
    losses, mask = train_with_roaming_masks(Group(), tmp_path / "one")
    (found, main_mask), (nothing, other_mask) = in_workers(train_with_roaming_masks, 2, tmp_path / "two")
    assert found == pytest.approx(losses, rel=1e-5)
    assert nothing == {}
    assert torch.equal(main_mask, mask)
    assert torch.equal(other_mask, mask)
