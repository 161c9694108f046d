"""A run that is told to leave its machine."""

from pathlib import Path

import pytest
import torch
from tiny_trials import Recorder, digits, distances, final_state, tensors_of, tiny_config

from dtr_ray.training import train
from dtr_ray.training.leaving import LeftError

CHANGES = {
    "training__checkpoint_every_steps": 100,
    "training__log_every_steps": 3,
    "evaluation__every_steps": 4,
}


class Leaves(Recorder):
    """Is told to leave once it is in this phase at this step."""

    def __init__(self, step: int, phase: str) -> None:
        super().__init__()
        self._when, self._told = (step, phase), False

    def progress(self, step: int, phase: str) -> None:
        super().progress(step, phase)
        self._told |= (step, phase) == self._when

    def __call__(self) -> bool:
        return self._told


@pytest.mark.parametrize("phase", ["training", "evaluating"])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_it_repeats_no_step_and_equals_one_that_was_never_told(step: int, phase: str, tmp_path: Path):
    config = tiny_config(**CHANGES)
    data, whole, told = digits(config), Recorder(), Leaves(step, phase)
    expected = list(train(config, tmp_path / "whole", data, observer=whole))
    leaving = train(config, tmp_path / "left", data, observer=told, must_leave=told)
    if phase == "evaluating" and step != 4:
        assert distances(list(leaving)) == distances(expected)
        return
    with pytest.raises(LeftError, match=f"step {step}"):
        list(leaving)
    assert told.steps == list(range(1, step + 1))
    assert final_state(config, tmp_path / "left").step == step
    rest = Recorder()
    reports = list(train(config, tmp_path / "left", data, observer=rest))
    assert rest.steps == list(range(step + 1, 7))
    assert distances(reports) == distances(expected)
    assert told.losses | rest.losses == whole.losses
    one, other = (tensors_of(final_state(config, tmp_path / name)) for name in ("whole", "left"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
