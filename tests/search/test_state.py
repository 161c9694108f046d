"""The sweep's state survives being dropped after any event, and decides as if it had not been."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from dtr_ray.config import SweepConfig
from dtr_ray.search.journal import Journal, read_events, replay
from dtr_ray.search.resuming import check_resumable
from dtr_ray.search.state import SweepState, save_config
from dtr_ray.search.study import importances
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
    assert first != "finished"
    assert second != "finished"
    assert third != "finished"
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


def test_a_trial_suggested_but_never_journaled_is_suggested_again(tmp_path: Path) -> None:
    """The process may die between Optuna's answer and the journal."""
    config = sweep(search={"num_trials": 6, "num_startup_trials": 2})
    state = SweepState(config, tmp_path)
    for _ in range(4):
        trial = state.next_trial()
        assert trial != "finished"
        state.report(trial.trial_id, report(trial.params, 400))
        state.finish(trial.trial_id, "completed")
    lost = state._suggester.suggest(4, state.trials)
    again = SweepState(config, tmp_path).next_trial()
    assert again != "finished"
    assert again.params == lost


def test_a_study_that_lost_its_trials_is_told_them_again(tmp_path: Path) -> None:
    config = sweep(search={"num_trials": 5})
    whole = run(config, tmp_path)
    before = whole._mirror.study.trials
    (tmp_path / "study.db").unlink()
    after = SweepState(config, tmp_path)._mirror.study.trials
    keys = ("number", "state", "params", "values", "intermediate_values", "user_attrs")
    assert [[getattr(t, key) for key in keys] for t in after] == [
        [getattr(t, key) for key in keys] for t in before
    ]


def test_two_sweeps_of_one_name_do_not_share_a_study(tmp_path: Path) -> None:
    config = sweep(storage={"study": f"sqlite:///{tmp_path / 'shared.db'}"})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    SweepState(config, tmp_path / "a")
    with pytest.raises(ValueError, match="another sweep's"):
        SweepState(config, tmp_path / "b")


def test_a_study_that_cannot_be_opened_is_the_users_error_without_the_password(tmp_path: Path) -> None:
    config = sweep(storage={"study": "sqlite://me:secret@/nowhere/at/all.db"})
    with pytest.raises(ValueError, match="cannot be opened") as error:
        SweepState(config, tmp_path)
    assert "secret" not in str(error.value)


def test_two_ranges_of_one_parameter_are_searched_under_their_conditions(tmp_path: Path) -> None:
    space = {
        "weighting.name": {"type": "choice", "values": ["min_snr", "p2"]},
        "weighting.gamma": {"type": "choice", "values": [1, 5], "when": {"weighting.name": "min_snr"}},
        "weighting.gamma@p2": {"type": "uniform", "low": 0.5, "high": 0.9, "when": {"weighting.name": "p2"}},
    }
    config = sweep(
        space=space, search={"num_trials": 8, "num_startup_trials": 4}, early_stopping={"name": "none"}
    )
    state = SweepState(config, tmp_path)
    for _ in range(8):
        trial = state.next_trial()
        assert trial != "finished"
        gamma = trial.params["weighting.gamma"]
        assert gamma in (1, 5) if trial.params["weighting.name"] == "min_snr" else 0.5 <= gamma <= 0.9
        state.report(trial.trial_id, report(trial.params, 400, gamma))
        state.finish(trial.trial_id, "completed")
    assert len({t.params["weighting.name"] for t in state.trials.values()}) == 2
    keys = {key for t in state._mirror.study.trials for key in t.params}
    assert keys == set(space)


def test_a_sweep_that_gave_up_can_be_resumed_and_forgives_what_had_failed(tmp_path: Path) -> None:
    config = sweep(failures={"max_failed_trials": 1})
    state = SweepState(config, tmp_path)
    for _ in range(2):
        trial = state.next_trial()
        assert trial != "finished"
        state.finish(trial.trial_id, "failed", "the disk is full")
    assert state.ending is not None
    again = SweepState(config, tmp_path)
    for limit in (None, "2 trials failed"):
        trial = again.next_trial()
        assert trial != "finished"
        again.finish(trial.trial_id, "failed", "the disk is full")
        assert (again.ending or "").startswith(limit or "")
        assert (again.ending is None) == (limit is None)


def test_seconds_add_up_over_reports_that_are_repeated_after_a_crash(tmp_path: Path) -> None:
    state = SweepState(sweep(), tmp_path)
    trial = state.next_trial()
    assert trial != "finished"
    state.report(trial.trial_id, report(trial.params, 100), 5.0)
    state.report(trial.trial_id, report(trial.params, 100), 3.0)  # by a second process
    state.report(trial.trial_id, report(trial.params, 200), 4.0)
    again = SweepState(sweep(), tmp_path)
    again.finish(trial.trial_id, "completed", seconds=1.0)
    assert again.trials[trial.trial_id].wall_s == 13.0
    assert again.device_hours == pytest.approx(13.0 / 3600)


def test_a_spent_budget_ends_the_sweep_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    state = SweepState(sweep(budget={"max_device_hours": 1.0}), tmp_path)
    trial = state.next_trial()
    assert trial != "finished"
    state.report(trial.trial_id, report(trial.params, 100), 3601.0)
    state.check_budget()
    assert state.budget_spent
    assert state.ending == "the budget of 1 device-hours is spent"
    assert state.next_trial() == "finished"
    again = SweepState(sweep(budget={"max_device_hours": 2.0}), tmp_path).next_trial()
    assert again != "finished"
    assert again.trial_id == trial.trial_id


def test_a_line_torn_by_a_crash_never_happened(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("trial", id="t0000", number=0, params={"a": 1})
    journal.close()
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"event": "end", "id": "t00')
    trials = replay(Journal(tmp_path / "journal.jsonl").events)
    assert trials["t0000"].status == "running"
    assert (tmp_path / "journal.jsonl").read_text().endswith("}\n")


def test_a_last_line_of_which_a_power_off_has_left_zeros_never_happened(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("start")
    journal.close()
    whole = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(whole + b"\0" * 40 + b'"stop": null}\n')
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("stop")
    journal.close()
    assert [event["event"] for event in read_events(tmp_path / "journal.jsonl")] == ["start", "stop"]


def test_a_report_given_twice_counts_once(tmp_path: Path) -> None:
    state = SweepState(sweep(), tmp_path)
    trial = state.next_trial()
    assert trial != "finished"
    state.report(trial.trial_id, report(trial.params, 100))
    events = read_events(tmp_path / "journal.jsonl")
    state.report(trial.trial_id, report(trial.params, 100))
    assert read_events(tmp_path / "journal.jsonl") == events


def test_too_many_failures_end_the_sweep_with_their_reasons(tmp_path: Path) -> None:
    state = SweepState(sweep(failures={"max_failed_trials": 1}), tmp_path)
    for _ in range(2):
        trial = state.next_trial()
        assert trial != "finished"
        state.finish(trial.trial_id, "failed", "out of memory")
    assert state.ending is not None
    assert "2 trials failed" in state.ending
    assert "out of memory" in state.ending
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
    assert best is not None
    assert best[2] == 5.0


def test_importances_find_the_parameter_that_matters(tmp_path: Path) -> None:
    config = sweep(search={"num_trials": 14, "sampler": "random"}, early_stopping={"name": "none"})
    state = run(config, tmp_path)
    step, shares = importances(list(state.trials.values()), config.space, state.evaluation)
    assert step == 100
    assert max(shares, key=lambda name: shares[name]) == "routing.alpha"


def test_a_database_that_goes_away_is_warned_of_once_stops_nothing_and_is_told_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = SweepState(sweep(), tmp_path)
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("ALTER TABLE trials RENAME TO away")
    for _ in range(2):
        trial = state.next_trial()
        assert trial != "finished"
        state.report(trial.trial_id, report(trial.params, 400))
        state.finish(trial.trial_id, "completed")
    assert [r.message[:26] for r in caplog.records] == ["the Optuna study lags behi"]
    assert [t.status for t in state.trials.values()] == ["completed", "completed"]
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("ALTER TABLE away RENAME TO trials")
    state.close()
    assert [t.state for t in state._mirror.study.trials] == [TrialState.COMPLETE] * 2
