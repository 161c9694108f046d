"""Settings that have no effect are told."""

import pytest
from bad_yaml import GOOD

from dtr_ray.config import SweepConfig, TrialConfig
from dtr_ray.config.ignored import config_warnings, trial_warnings
from dtr_ray.config.tree import parse_value


def warned(old: str = "", new: str = "") -> list[str]:
    assert old in GOOD
    return config_warnings(
        SweepConfig.from_dict(parse_value(GOOD.replace(old, new) if old else GOOD, "good"))
    )


def test_a_setting_that_has_its_effect_is_not_told() -> None:
    # Four trials are fewer than TPE's eight startup trials.
    assert warned("num_trials: 4", "num_trials: 9") == []
    assert trial_warnings(TrialConfig()) == []


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        (
            "    every_steps",
            "    feature_weights: a\n    every_steps",
            "trial.evaluation.feature_weights",
            "ignored",
        ),
        ("resolution: 16", "latent_scale: 1.0", "trial.data.latent_scale", "without data.vae"),
        (
            "ema_warmup: true",
            "ema_warmup: true\n    ema_decay: 0",
            "trial.training.ema_warmup",
            "ema_decay is 0",
        ),
        ("    depth: 2", "    learn_sigma: false\n    depth: 2", "trial.model.learn_sigma", "learned_range"),
        (
            "sampler: tpe",
            "sampler: random\n  num_startup_trials: 3",
            "search.num_startup_trials",
            "sampler random",
        ),
        ("sampler: tpe", "sampler: tpe", "search.sampler", "never used"),
        (
            "_points:\n",
            "_points:\n" + "    - routing.alpha: 2\n" * 4,
            "search.starting_points",
            "are 5, but only 4",
        ),
        ("grace_steps: 50", "grace_steps: 100", "early_stopping", "last step"),
        ("grace_steps: 50", "grace_steps: 70", "early_stopping.grace_steps", "step 100"),
        (
            "workers_per_trial: 1",
            "gpus_per_worker: 0.5\n  max_concurrent: 1",
            "resources.gpus_per_worker",
            "shares",
        ),
        (
            "space:",
            "space:\n  model.name: {type: choice, values: [DiT-S/4]}",
            "trial.model",
            "loses model.hidden_size",
        ),
    ],
)
def test_a_setting_without_effect_is_told_by_key(old: str, new: str, key: str, words: str) -> None:
    assert any(line.startswith(f"{key} ") and words in line for line in warned(old, new))
