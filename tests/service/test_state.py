"""The sweep's state survives being dropped after any event, and decides as if it had not been."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from dtr_ray.config import SweepConfig
from dtr_ray.service.journal import Journal, replay
from dtr_ray.service.state import SweepState, check_resumable, save_config
from dtr_ray.service.study import importances
from dtr_ray.training.reports import Report

METRIC = "fd_efficientnet_lite0_1k"


def sweep(**changes: Any) -> SweepConfig:
    values: dict[str, Any] = {
        "name": "tiny",
        "trial": {
            "data": {"name": "digits", "resolution": 8},
            "model": {"name": "DiT", "hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 2},
            "training": {"num_steps": 400},
            "sampling": {"sampler": "ddim", "num_steps": 5},
            "evaluation": {"every_steps": 100, "num_samples": 1000, "features": "efficientnet_lite0"},
        },
        "space": {
            "routing.alpha": {"type": "quniform", "low": 0.5, "high": 8, "step": 0.5},
            "routing.beta": {"type": "uniform", "low": 0.5, "high": 1.0},
            "weighting.name": {"type": "choice", "values": ["vanilla", "min_snr", "p2"]},
            "weighting.gamma": {"type": "choice", "values": [1, 5], "when": {"weighting.name": "min_snr"}},
        },
        "search": {"num_trials": 14, "num_startup_trials": 4, "seed": 3},
        "early_stopping": {"name": "asha", "grace_steps": 100, "reduction_factor": 2},
    }
    return SweepConfig.from_dict({**values, **changes})


def distance(params: dict[str, Any], step: int) -> float:
    """A landscape with its best at alpha 4, beta 0.8."""
    penalty = abs(params["routing.alpha"] - 4) + 10 * abs(params["routing.beta"] - 0.8)
    return (5 + penalty + 2 * (params["weighting.name"] == "p2")) * 1000 / (step + 100)


def report(params: dict[str, Any], step: int, value: float | None = None) -> Report:
    value = distance(params, step) if value is None else value
    return Report(step, {METRIC: value, "train_seconds": step / 100}, f"checkpoints/{step:08d}", "g.png")


def run(config: SweepConfig, folder: Path, reopen: Callable[[int], bool] = lambda n: False) -> SweepState:
    """Runs a sweep one trial at a time; where `reopen` says so, the state is lost and read again."""
    save_config(config, folder)
    state, count = SweepState(config, folder), 0

    def event() -> None:
        nonlocal state, count
        count += 1
        if reopen(count):
            state = SweepState(config, folder)

    while True:
        event()
        trial = state.next_trial()
        if trial == "finished":
            return state
        trial_id = trial.trial_id
        for step in (100, 200, 300, 400):
            if state.report(trial_id, report(trial.params, step)):
                break
            event()
            if state.running and reopen(count):  # the trial was lost with the state, and is handed out again
                assert state.next_trial().trial_id == trial_id  # type: ignore[union-attr]
        state.finish(trial_id, "completed")


def test_a_sweep_lost_after_every_single_event_equals_one_that_was_never_lost(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(sweep(), tmp_path / "a")
    broken = run(sweep(), tmp_path / "b", reopen=lambda n: True)
    assert [vars(t) for t in whole.trials.values()] == [vars(t) for t in broken.trials.values()]
    assert any(t.status == "pruned" for t in whole.trials.values())


def test_the_search_comes_closer_than_its_random_start(tmp_path: Path) -> None:
    state = run(sweep(), tmp_path)
    best = state.best()
    assert best is not None
    assert best[0].number >= 4


def test_starting_points_come_first_and_what_they_leave_out_is_sampled(tmp_path: Path) -> None:
    points = [{"routing.alpha": 4, "routing.beta": 0.8, "weighting.name": "vanilla"}, {"routing.alpha": 1}]
    config = sweep(search={"num_trials": 3, "starting_points": points})
    trials = list(run(config, tmp_path).trials.values())
    assert trials[0].params == points[0]
    assert trials[1].params["routing.alpha"] == 1
    assert "routing.beta" in trials[1].params


def test_conditional_parameters_exist_only_where_their_condition_holds(tmp_path: Path) -> None:
    for trial in run(sweep(), tmp_path).trials.values():
        assert ("weighting.gamma" in trial.params) == (trial.params["weighting.name"] == "min_snr")


def test_the_study_is_told_pruned_at_the_training_step_and_failed_as_failed(tmp_path: Path) -> None:
    config = sweep(search={"num_trials": 3})
    state = SweepState(config, tmp_path)
    first, second, third = (state.next_trial() for _ in range(3))
    assert first != "finished" and second != "finished" and third != "finished"
    state.report(first.trial_id, report(first.params, 100, 1.0))
    assert state.report(second.trial_id, report(second.params, 100, 2.0)) is not None
    state.finish(third.trial_id, "failed", "TrainingDivergedError: the loss is nan at step 50")
    state.report(first.trial_id, report(first.params, 400, 0.5))
    state.finish(first.trial_id, "completed")
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path / 'study.db'}")
    trials = study.trials
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert trials[0].value == 0.5
    assert trials[1].intermediate_values == {100: 2.0}
    assert trials[2].user_attrs["reason"].startswith("TrainingDivergedError")


def test_a_trial_asked_for_but_never_journaled_is_asked_for_again(tmp_path: Path) -> None:
    """The process may die between Optuna's answer and the journal."""
    config = sweep(search={"num_trials": 2})
    state = SweepState(config, tmp_path)
    lost = state._study.suggest(0, "t0000")
    again = SweepState(config, tmp_path)
    trial = again.next_trial()
    assert trial != "finished"
    assert trial.params == lost
    assert len(again.trials) == 1


def test_a_line_torn_by_a_crash_never_happened(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("trial", id="t0000", number=0, params={"a": 1})
    journal.close()
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"event": "end", "id": "t00')
    trials = replay(Journal(tmp_path / "journal.jsonl").events)
    assert trials["t0000"].status == "running"
    assert (tmp_path / "journal.jsonl").read_text().endswith("}\n")


def test_a_report_given_twice_counts_once(tmp_path: Path) -> None:
    state = SweepState(sweep(), tmp_path)
    trial = state.next_trial()
    assert trial != "finished"
    state.report(trial.trial_id, report(trial.params, 100))
    events = len(state._journal.events)
    state.report(trial.trial_id, report(trial.params, 100))
    assert len(state._journal.events) == events


def test_too_many_failures_end_the_sweep_with_their_reasons(tmp_path: Path) -> None:
    state = SweepState(sweep(failures={"max_failed_trials": 1}), tmp_path)
    for _ in range(2):
        trial = state.next_trial()
        assert trial != "finished"
        state.finish(trial.trial_id, "failed", "out of memory")
    assert state.ending is not None
    assert "2 trials have failed" in state.ending and "out of memory" in state.ending
    assert state.next_trial() == "finished"


def test_another_search_is_not_resumed_but_more_trials_are(tmp_path: Path) -> None:
    save_config(sweep(), tmp_path)
    check_resumable(sweep(search={"num_trials": 50, "num_startup_trials": 4, "seed": 3}), tmp_path)
    space = {"routing.beta": {"type": "uniform", "low": 0.1, "high": 1.0}}
    with pytest.raises(ValueError, match="space differs"):
        check_resumable(sweep(space=space), tmp_path)


def test_the_untrained_model_is_a_figure_but_never_the_best(tmp_path: Path) -> None:
    state = SweepState(sweep(), tmp_path)
    trial = state.next_trial()
    assert trial != "finished"
    assert state.report(trial.trial_id, report(trial.params, 0, 0.001)) is None
    state.report(trial.trial_id, report(trial.params, 100, 5.0))
    assert state.untrained_value == 0.001
    best = state.best()
    assert best is not None and best[2] == 5.0


def test_importances_find_the_parameter_that_matters(tmp_path: Path) -> None:
    config = sweep(search={"num_trials": 14, "sampler": "random"}, early_stopping={"name": "none"})
    state = run(config, tmp_path)
    step, shares = importances(list(state.trials.values()), config.space, METRIC)
    assert step == 100
    assert max(shares, key=lambda name: shares[name]) == "routing.alpha"
