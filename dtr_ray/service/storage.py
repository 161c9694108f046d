"""How much disk a sweep takes at most, worked out before it starts.

Checkpoints are nearly all of it: two of each trial stay (the best and the last), and each trial that runs has
a third (see `dtr_ray.training.retention`).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dtr_ray.config import SweepConfig, TrialConfig
from dtr_ray.config.space import Choice
from dtr_ray.models import build_model
from dtr_ray.training.retention import LASTING, MOST

# A tensor's own, in files of weights and of moments: its name, its shape, and where it begins.
_TENSOR_BYTES = 4096
_MAX_MODELS = 16
# Upper bounds of what is written as text, of the study, and of the picture of a mask.
_BYTES_PER_RECORD = 1000
_BYTES_PER_EVALUATION = 8000
_BYTES_PER_TRIAL = 250_000
_BYTES_PER_SWEEP = 5_000_000


@dataclass(frozen=True)
class Storage:
    """Bytes that a sweep's folder holds at most."""

    checkpoint: int
    """Of one, with the largest model of the search."""
    num_checkpoints: int
    """At most, of all trials together."""
    rest: int
    """Samples, records, reports, journal and study."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoint * self.num_checkpoints + self.rest


def storage_of(config: SweepConfig, num_concurrent: int) -> Storage:
    """For all trials of a sweep, so many of them at a time."""
    trial, num_trials = config.trial, config.search.num_trials
    running = min(num_trials, max(num_concurrent, config.resources.max_concurrent or 1))
    num_evaluations = -(-trial.training.num_steps // trial.evaluation.every_steps) + 1
    num_records = trial.training.num_steps // trial.training.log_every_steps + 1
    rest = num_records * _BYTES_PER_RECORD + num_evaluations * (_BYTES_PER_EVALUATION + _grid_bytes(trial))
    return Storage(
        checkpoint=max(map(checkpoint_bytes, _trials(config))),
        num_checkpoints=LASTING * num_trials + (MOST - LASTING) * running,
        rest=num_trials * (rest + _BYTES_PER_TRIAL) + _BYTES_PER_SWEEP,
    )


def checkpoint_bytes(trial: TrialConfig) -> int:
    """Size of a checkpoint at most: weights, their average, and AdamW's two moments."""
    model = _model(trial)
    states = [value for value in model.state_dict().values() if isinstance(value, torch.Tensor)]
    weights = sum(value.numel() * value.element_size() for value in states)
    moments = sum(2 * 4 * parameter.numel() for parameter in model.parameters())
    return 2 * weights + moments + (len(states) + 16) * _TENSOR_BYTES


def _model(trial: TrialConfig) -> nn.Module:
    with torch.device("meta"):
        return build_model(trial.resolved_model, None, trial.diffusion.num_timesteps)


def _trials(config: SweepConfig) -> Iterator[TrialConfig]:
    """The base trial, and those with other models that the space allows, the largest of their ranges."""
    yield config.trial
    values = {
        key: parameter.values if isinstance(parameter, Choice) else [parameter.high]
        for key, parameter in config.space.items()
        if key.startswith("model.") and "@" not in key
    }
    if not values:
        return
    for chosen in itertools.islice(itertools.product(*values.values()), _MAX_MODELS):
        try:
            yield config.trial_config(dict(zip(values, chosen, strict=True)))
        except ValueError:
            # Parameters that go together under a condition only.
            continue


def _grid_bytes(trial: TrialConfig) -> int:
    """A PNG of noise, in three colours, at the scale that it is drawn in."""
    side = trial.data.resolution
    scaled = (side + 1) * max(1, 64 // side) + 1
    return 3 * trial.evaluation.grid_images * scaled**2 * 11 // 10
