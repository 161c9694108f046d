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
        ("resolution: 16", "text_channels: 32", "trial.data.text_channels", "without data.text_encoder"),
        (
            "sampler: ddim",
            "guidance_channels: first_three",
            "trial.sampling.guidance_channels",
            "of 1 channels these are all",
        ),
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


@pytest.mark.parametrize(
    ("routing", "told"),
    [
        ({"name": "scheduled"}, []),
        (
            {"name": "scheduled", "last_step": 7, "every_steps": 3},
            ["routing.last_step is ignored", "routing.every_steps is ignored"],
        ),
        ({"name": "scheduled", "over": "training", "every_steps": 60}, ["the masks never change"]),
        ({"name": "scheduled", "over": "training", "every_steps": 60, "last_step": 40}, []),
        ({"name": "scheduled", "over": "training", "every_steps": 10}, []),
        ({"name": "max_roaming"}, ["routing.every_steps is 100: in 50 steps the masks never change"]),
        ({"name": "max_roaming", "every_steps": 49}, []),
    ],
)
def test_masks_that_do_not_change_as_they_are_told_to(routing: dict[str, object], told: list[str]) -> None:
    short = {"training": {"num_steps": 50}, "evaluation": {"every_steps": 50}}
    found = trial_warnings(TrialConfig.from_dict({"routing": routing, **short}))
    assert len(found) == len(told)
    assert all(words in sentence for words, sentence in zip(told, found, strict=True))
