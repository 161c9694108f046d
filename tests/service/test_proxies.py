"""Proxies in a sweep: they decide early, among themselves, and are never a result."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console
from tiny_sweeps import METRIC, folder_of, read_json, tiny_sweep

from dtr_ray.config import SweepConfig
from dtr_ray.config.protocol import describe, protocol_of
from dtr_ray.search.results import write_best, write_trials
from dtr_ray.search.state import SweepState, save_config
from dtr_ray.search.study import importances
from dtr_ray.service.display import Display
from dtr_ray.service.plan import print_plan
from dtr_ray.service.summary import print_summary
from dtr_ray.service.sweep import Outcome
from dtr_ray.training import Report

PROXY = "proxy_fd_efficientnet_lite0_8"
CHANGES: dict[str, Any] = {
    "trial__evaluation__proxy": {"until_step": 20, "num_samples": 8, "num_steps": 1},
    "search__num_trials": 6,
}


@pytest.fixture
def config(tmp_path: Path) -> SweepConfig:
    return tiny_sweep(tmp_path, **CHANGES)


def opened(config: SweepConfig, folder: Path | None = None) -> SweepState:
    folder = folder or folder_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder)
    return SweepState(config, folder, "digits-8-a")


def report(config: SweepConfig, step: int, value: float, error: float = 0.0) -> Report:
    evaluation = config.trial.evaluation
    name, proxy = evaluation.metric_at(step), evaluation.is_proxy(step)
    metrics = {name: value, f"{name}_stderr": error, "train_seconds": 1.0}
    protocol = protocol_of(config.trial, "digits-8-a", proxy=proxy)
    return Report(step, metrics, f"checkpoints/{step:08d}", "g.png", protocol)


def started(state: SweepState) -> str:
    trial = state.next_trial()
    assert trial != "finished"
    return trial.trial_id


def run(config: SweepConfig, folder: Path, reopen: Callable[[], bool]) -> SweepState:
    """Trials one after the other; full figures are lower than all proxies, and order the trials otherwise."""
    state = opened(config, folder)
    while (trial := state.next_trial()) != "finished":
        assert not isinstance(trial, str)
        alpha = trial.params["routing.alpha"]
        for step in (10, 20, 30, 40):
            value = 900 - 10 * alpha - step if step <= 20 else 300 + 10 * alpha - step
            if state.report(trial.trial_id, report(config, step, value)):
                break
            if reopen():
                state = SweepState(config, folder, "digits-8-a")
                again = state.next_trial()
                assert again != "finished"
                assert again.trial_id == trial.trial_id
        state.finish(trial.trial_id, "completed")
        if reopen():
            state = SweepState(config, folder, "digits-8-a")
    return state


def test_a_sweep_with_proxies_that_is_lost_after_every_event_decides_as_one_that_is_not(
    config: SweepConfig, tmp_path: Path
) -> None:
    whole = run(config, tmp_path / "whole", lambda: False)
    broken = run(config, tmp_path / "broken", lambda: True)
    assert [vars(t) for t in whole.trials.values()] == [vars(t) for t in broken.trials.values()]
    stopped = [t for t in whole.trials.values() if t.status == "pruned" and t.last_step <= 20]
    assert stopped
    best = whole.best()
    assert best is not None
    assert best[1] > 20
    step, shares = importances(list(whole.trials.values()), config.space, config.trial.evaluation)
    assert step == 10
    assert shares


def test_the_best_is_of_a_full_figure_however_low_a_proxy_is(config: SweepConfig) -> None:
    state = opened(config)
    first, second = started(state), started(state)
    state.report(first, report(config, 10, 5.0))
    state.report(first, report(config, 20, 4.0))
    assert state.best() is None
    assert write_best(state, None) is None
    assert state.report(second, report(config, 10, 6.0)) is not None
    state.report(first, report(config, 30, 50.0, error=1.5))
    state.report(first, report(config, 40, 40.0, error=1.25))
    state.finish(first, "completed")
    assert [(trial.trial_id, step, value) for trial, step, value in state.ranked()] == [(first, 40, 40.0)]
    best = write_best(state, None)
    assert best is not None
    assert (best["metric"], best["value"], best["standard_error"]) == (METRIC, 40.0, 1.25)
    assert best["protocol"] == protocol_of(config.trial, "digits-8-a")
    assert read_json(state.folder / "best.json") == best


def test_trials_csv_has_columns_of_both(config: SweepConfig) -> None:
    state = opened(config)
    first, second = started(state), started(state)
    for step, value in ((10, 5.0), (20, 4.0), (30, 60.0), (40, 70.0)):
        state.report(first, report(config, step, value, error=step / 10))
    state.report(second, report(config, 10, 6.0))
    write_trials(state)
    with (state.folder / "trials.csv").open(newline="", encoding="utf-8") as file:
        one, other = csv.DictReader(file)
    assert (one[f"{METRIC}.best"], one[f"{METRIC}.last"]) == ("60.0", "70.0")
    assert (one[f"{METRIC}_stderr.best"], one[f"{METRIC}_stderr.last"]) == ("3.0", "4.0")
    assert (one[f"{PROXY}.best"], other[f"{PROXY}.best"]) == ("4.0", "6.0")
    assert other[f"{METRIC}.best"] == ""
    assert one["protocol"] == describe(state.protocol)
    assert other["protocol"].startswith(f"{PROXY}: 8 samples, ddim in 1 steps")


def test_a_trial_within_its_standard_errors_of_the_cutoff_goes_on(tmp_path: Path) -> None:
    state = opened(tiny_sweep(tmp_path, **CHANGES, early_stopping__sigma=2.0))
    first, second, third = (started(state) for _ in range(3))
    assert state.report(first, report(state.config, 10, 5.0)) is None
    assert state.report(second, report(state.config, 10, 6.0, error=0.6)) is None
    assert state.report(third, report(state.config, 10, 6.0, error=0.4)) is not None


def test_optuna_hears_of_proxies_by_step_and_of_full_figures_as_results(config: SweepConfig) -> None:
    """TPE puts completed trials first, then pruned ones by (-step, value): one step has one kind."""
    state = opened(config)
    first, second = started(state), started(state)
    state.report(first, report(config, 0, 999.0))
    for step, value in ((10, 5.0), (20, 4.0), (30, 60.0), (40, 70.0)):
        state.report(first, report(config, step, value))
    state.finish(first, "completed")
    state.report(second, report(config, 10, 6.0))
    state.close()
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{state.folder / 'study.db'}")
    assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert study.trials[0].value == study.best_value == 60.0
    assert study.trials[0].intermediate_values == {0: 999.0, 10: 5.0, 20: 4.0, 30: 60.0, 40: 70.0}
    assert study.trials[1].intermediate_values == {10: 6.0}


def printed(state: SweepState) -> str:
    console = Console(file=io.StringIO(), width=140)
    print_summary(Outcome(state, None, None, state.ending, 0, "sqlite:///x.db", 1.0, 1), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_sweep_without_a_full_figure_says_so(config: SweepConfig) -> None:
    state = opened(config)
    first, second = started(state), started(state)
    state.report(first, report(config, 10, 5.0))
    state.report(second, report(config, 10, 6.0))
    state.finish(first, "pruned", "the budget of 1 hours is spent")
    text = printed(state)
    assert f"no trial has reached a full {METRIC}: there is no best trial, and no best.json" in text
    assert f"2 have a {PROXY} alone, the lowest 5 (t0000): it is no result" in text
    assert "train best" not in text


def test_the_summary_tells_full_figures_with_their_errors_and_how_they_were_measured(
    config: SweepConfig,
) -> None:
    state = opened(config)
    first, second = started(state), started(state)
    state.report(first, report(config, 0, 999.0))
    state.report(first, report(config, 10, 5.0))
    state.report(second, report(config, 10, 6.0))
    state.report(first, report(config, 40, 61.0, error=1.2))
    text = printed(state)
    assert "61 ± 1.2" in text
    assert f"untrained model 999 ({PROXY})" in text
    assert f"measured    {describe(state.protocol)}" in text
    assert f"ended with a {PROXY} alone, without a {METRIC}: 1 of 2 trials" in text


def test_the_display_shows_a_proxy_in_brackets(config: SweepConfig) -> None:
    state, console = opened(config), Console(file=io.StringIO(), width=200)
    display = Display(state, console)
    state.listeners.append(display)
    first, second = started(state), started(state)
    state.report(first, report(config, 10, 500.0, error=9.0))
    for step, value in ((10, 400.0), (20, 300.0), (30, 61.0)):
        state.report(second, report(config, step, value))
    console.print(display.table())
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert f"{PROXY} 500 ± 9" in text
    assert "(500)" in text
    assert "(61)" not in text
    assert f"{PROXY}, which is never the best" in text


def test_the_plan_tells_what_proxies_are_decide_and_save(config: SweepConfig) -> None:
    console = Console(file=io.StringIO(), width=200)
    print_plan(config, folder_of(config), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert f"2 of a trial's 4 evaluations, to step 20: {PROXY} of 8 samples (ddim, 1 steps)" in text
    # Each takes 8 samples of 1 step, for 32 of 2: an eighth.
    assert (
        "44% of the sampling of a whole trial, one costs 0.12; trials are stopped by it at steps 10, 20"
        in text
    )
    assert describe(protocol_of(config.trial)) in text
