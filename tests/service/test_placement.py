"""Both ways to place a trial: in its own Tune process, and over Ray Train workers; neither ever hangs."""

import os
import signal
import threading
from pathlib import Path

import pytest
from tiny_sweeps import METRIC, Finished, attempts, folder_of, records, tiny_sweep, wait_until
from tiny_trials import digits

from dtr_ray.service.sweep import run_sweep
from dtr_ray.training import train


def test_two_slots_and_early_stopped_trials_in_their_own_processes_come_to_an_end(finished_sweep: Finished):
    trials = finished_sweep.outcome.state.trials.values()
    assert finished_sweep.outcome.num_concurrent == 2
    assert finished_sweep.outcome.error is None
    statuses = [trial.status for trial in trials]
    assert len(statuses) == 6
    assert set(statuses) == {"completed", "pruned"}
    for trial in trials:
        assert (trial.status == "completed") == (trial.last_step == 40)
        assert all(step <= trial.last_step for step in trial.reports)
        assert "rung" in trial.reason or trial.status == "completed"


def test_trials_side_by_side_report_what_the_plain_loop_reports(finished_sweep: Finished, tmp_path: Path):
    for trial in list(finished_sweep.outcome.state.trials.values())[:2]:
        config = finished_sweep.config.trial_config(trial.params)
        untrained = trial.number == 0
        reports = train(config, tmp_path / trial.trial_id, digits(config), evaluate_untrained=untrained)
        values = {report.step: report.metrics[METRIC] for report in reports}
        assert {step: metrics[METRIC] for step, metrics in trial.reports.items()}.items() <= values.items()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_trials_of_two_workers_follow_one_another_on_two_slots_though_one_is_stopped_and_one_loses_a_worker(
    ray_cluster: str, tmp_path: Path
):
    """The case that hung for an hour when trials were killed from outside: see `distributed_trial`."""
    worse = {"routing.alpha": 8, "routing.beta": 0.3, "weighting.name": "ant_uw"}
    better = {"routing.alpha": 4, "routing.beta": 0.9, "weighting.name": "vanilla"}
    config = tiny_sweep(
        tmp_path,
        resources__workers_per_trial=2,
        trial__training__num_steps=20,
        search__num_trials=3,
        search__starting_points=[better, worse, better],
    )
    folder = folder_of(config)
    killer = threading.Thread(target=kill_a_worker, args=(folder, "t0002"), daemon=True)
    killer.start()
    outcome = run_sweep(config, folder)
    killer.join(1.0)
    assert outcome.num_concurrent == 1
    assert outcome.error is None
    assert [(t.status, t.last_step) for t in records(folder).values()] == [
        ("completed", 20),
        ("pruned", 10),
        ("completed", 20),
    ]
    first, second = attempts(folder, "t0002")
    assert first.to_step is not None
    assert second.from_step is not None
    assert 0 <= first.to_step - second.from_step <= config.trial.checkpoint_every_steps
    trials = records(folder)
    assert trials["t0000"].reports[20][METRIC] == trials["t0002"].reports[20][METRIC]


def kill_a_worker(folder: Path, trial_id: str) -> None:
    """SIGKILLs the process that trains a trial, once it has made a step."""

    def trains() -> int | None:
        found = attempts(folder, trial_id)
        return found[0].pid if found and found[0].to_step else None

    os.kill(wait_until(trains, 200.0, f"{trial_id} trains"), signal.SIGKILL)
