"""`--set KEY=VALUE` before validation."""

import warnings
from pathlib import Path

import pytest
from bad_yaml import GOOD

from dtr_ray.config import SweepConfig
from dtr_ray.config.errors import ConfigError, ConfigWarning
from dtr_ray.config.read import read_sweep, read_trial


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def read_quietly(path: Path, *sets: str) -> SweepConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        return read_sweep(path, sets)


def error(path: Path, *sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_quietly(path, *sets)
    return str(caught.value)


def test_keys_begin_at_the_trial_or_at_the_sweep(good: Path) -> None:
    sweep = read_sweep(good, ["training.lr=2e-3", "trial.training.batch_size=16", "search.num_trials=7"])
    assert (sweep.trial.training.lr, sweep.trial.training.batch_size) == (2e-3, 16)
    assert sweep.search.num_trials == 7


def test_a_trials_file_takes_the_same_keys(tmp_path: Path) -> None:
    path = tmp_path / "trial.yaml"
    path.write_text("model: {name: DiT-S/4}\n")
    assert read_trial(path, ["routing.alpha=2", "training.seed=5"]).routing.to_dict()["alpha"] == 2


def test_values_are_yaml(good: Path) -> None:
    sweep = read_sweep(
        good, ["search.starting_points=[{routing.alpha: 2}]", "tracking.uri='8'", "budget.max_hours="]
    )
    assert sweep.search.starting_points == [{"routing.alpha": 2}]
    assert (sweep.tracking.uri, sweep.budget.max_hours) == ("8", None)


def test_keys_of_the_space_and_of_the_best_are_reached(good: Path) -> None:
    sweep = read_sweep(good, ["space.routing.alpha.high=6", "best.training.num_steps=300"])
    assert sweep.space["routing.alpha"].to_dict()["high"] == 6
    assert sweep.best == {"training.num_steps": 300}


def test_a_new_name_drops_the_values_of_the_old_one(good: Path) -> None:
    sweep = read_sweep(good, ["early_stopping.name=none"])
    assert sweep.early_stopping.to_dict() == {"name": "none"}
    sweep = read_sweep(good, ["early_stopping.grace_steps=70", "early_stopping.name=median"])
    assert sweep.early_stopping.to_dict()["grace_steps"] == 70


def test_a_searched_parameter_that_is_set_is_fixed_and_told(good: Path) -> None:
    with pytest.warns(ConfigWarning, match="routing.alpha is set: it is not searched"):
        sweep = read_sweep(good, ["routing.alpha=3"])
    assert "routing.alpha" not in sweep.space
    assert sweep.trial.routing.to_dict()["alpha"] == 3
    assert sweep.search.starting_points == [{"weighting.name": "vanilla"}]


def test_fixing_a_condition_keeps_what_exists_under_it_and_drops_the_rest(good: Path) -> None:
    sweep = read_quietly(good, "weighting.name=p2")
    assert list(sweep.space) == ["routing.alpha", "routing.beta", "weighting.gamma@p2"]
    assert sweep.space["weighting.gamma@p2"].when == {}


def test_fixing_a_name_drops_searched_parameters_that_it_does_not_know(good: Path) -> None:
    sweep = read_quietly(good, "routing.name=none")
    assert not any(key.startswith("routing.") for key in sweep.space)


def test_nothing_left_to_search_is_an_error(good: Path) -> None:
    message = error(good, "routing.name=none", "weighting.name=vanilla")
    assert message == "--set weighting.name=vanilla: leaves no parameter to search"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("routing.alhpa=4", "unknown key; did you mean routing.alpha?"),
        ("num_trials=4", "unknown key; did you mean search.num_trials?"),
        ("serach.num_trials=4", "unknown key; did you mean search.num_trials?"),
        ("trial.routing.alhpa=4", "unknown key; did you mean trial.routing.alpha?"),
        ("best.training.num_step=4", "unknown key; did you mean best.training.num_steps?"),
        ("space.routing.alhpa.low=4", "unknown key; did you mean space.routing.alpha?"),
        ("space.routing.alpha.hihg=4", "unknown key; did you mean high?"),
        ("routing=none", "routing is a whole section; set one of its values: routing.name"),
        ("alpha", "expected KEY=VALUE"),
        ("=4", "expected KEY=VALUE"),
        ("training.lr=fast", "expected a number, got the text 'fast'"),
        ("training.lr=.nan", "not a finite number"),
        ("training.lr=[1", "not valid YAML"),
        ("routing.beta=0", "must be above 0, got 0"),
        ("routing.name=dtrr", "'dtrr' is not one of none, dtr, random"),
        ("training.num_steps=10", "trial.evaluation.every_steps: 50 is more than training.num_steps 10"),
        ("data.path=nowhere", "trial.data.path: is for name: folder or prepared"),
    ],
)
def test_errors_name_the_text_that_was_typed(good: Path, text: str, words: str) -> None:
    message = error(good, text).splitlines()[0]
    assert message.startswith(f"--set {text}: ")
    assert words in message or words.removeprefix("trial.data.path: ") in message


def test_each_wrong_text_has_its_line(good: Path) -> None:
    assert len(error(good, "a=1", "b=2", "routing.alpha").splitlines()) == 3


def test_a_key_of_a_variant_that_is_not_chosen_names_those_that_have_it(tmp_path: Path) -> None:
    path = tmp_path / "trial.yaml"
    path.write_text("model: {name: DiT-S/4}\n")
    with pytest.raises(ConfigError, match="under name: vanilla, only under min_snr and p2"):
        read_trial(path, ["weighting.gamma=5"])
