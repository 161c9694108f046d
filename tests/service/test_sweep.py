"""Trials that fail in every way, and a sweep that goes on, gives up, or ends when nothing moves."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from kills import runs_of
from mlflow import MlflowClient
from tiny_sweeps import (
    METRIC,
    ROOT,
    SweepCommand,
    attempts,
    folder_of,
    read_json,
    records,
    sweep_command,
    tiny_sweep,
    wait_until,
)
from tiny_trials import digits

from dtr_ray.search.journal import read_events
from dtr_ray.search.state import SweepState, save_config
from dtr_ray.service.attempts import AttemptLog
from dtr_ray.service.sweep import run_sweep
from dtr_ray.service.watchdog import watchdog
from dtr_ray.training import train

GOOD = {"routing.alpha": 4, "routing.beta": 0.9, "weighting.name": "vanilla", "training.lr": 3e-3}
BAD_LR = GOOD | {"training.lr": 1e30}
SPACE = {
    "routing.alpha": {"type": "quniform", "low": 0.5, "high": 8.0, "step": 0.5},
    "routing.beta": {"type": "uniform", "low": 0.3, "high": 1.0},
    "weighting.name": {"type": "choice", "values": ["vanilla", "min_snr", "ant_uw"]},
    "training.lr": {"type": "choice", "values": [3e-3, 1e30]},
}


def kill(folder: Path, trial_id: str, signum: int, times: int = 1) -> threading.Thread:
    """Sends a signal to each of the first processes of a trial when it has made 12 steps or more."""

    def wait_and_kill() -> None:
        for number in range(times):
            found = wait_until(
                lambda n=number: [a for a in attempts(folder, trial_id)[n:] if (a.to_step or 0) >= 12], 100.0
            )
            os.kill(found[0].pid, signum)

    thread = threading.Thread(target=wait_and_kill, daemon=True)
    thread.start()
    return thread


def test_every_kind_of_failure_is_recorded_with_its_reason_and_a_killed_process_is_started_again(
    ray_cluster: str, tmp_path: Path
):
    points = [GOOD, BAD_LR, *(GOOD | {"routing.alpha": alpha} for alpha in (2, 7, 1))]
    config = tiny_sweep(
        tmp_path,
        space=SPACE,
        search__num_trials=5,
        search__starting_points=points,
        early_stopping={"name": "none"},
        failures__retries=1,
        # Slow enough to be killed in the midst of it.
        trial__training__batch_size=96,
    )
    folder = folder_of(config)
    in_the_way = folder / "trials" / "t0002" / "grids"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("no folder can be made here")
    kill(folder, "t0003", signal.SIGKILL)
    kill(folder, "t0004", signal.SIGKILL, times=2)
    outcome = run_sweep(config, folder)
    trials = records(folder)
    assert outcome.error is None
    assert [t.status for t in trials.values()] == ["completed", "failed", "failed", "completed", "failed"]
    assert trials["t0001"].reason.startswith("TrainingDivergedError: the loss is nan at step 2")
    assert trials["t0002"].reason.startswith("FileExistsError")
    assert "Traceback" in (folder / "trials" / "t0002" / "error.txt").read_text()
    assert trials["t0004"].reason.startswith("its process died 2 times (failures.retries): ")
    assert len(attempts(folder, "t0004")) == 2
    assert outcome.best is not None
    assert outcome.best["trial_id"] in ("t0000", "t0003")

    first, second = attempts(folder, "t0003")
    assert first.pid != second.pid
    assert first.to_step is not None
    assert second.from_step is not None
    assert 0 <= first.to_step - second.from_step <= config.trial.checkpoint_every_steps
    undisturbed = config.trial_config(trials["t0003"].params)
    reports = train(undisturbed, tmp_path / "undisturbed", digits(undisturbed))
    values = {report.step: report.metrics[METRIC] for report in reports}
    assert {step: metrics[METRIC] for step, metrics in trials["t0003"].reports.items()} == values


def test_too_many_failures_end_the_sweep_with_one_message_and_it_can_be_resumed(
    ray_cluster: str, tmp_path: Path
):
    config = tiny_sweep(
        tmp_path,
        space=SPACE,
        search__num_trials=3,
        search__starting_points=[BAD_LR, BAD_LR, GOOD],
        failures__max_failed_trials=1,
    )
    folder = folder_of(config)
    outcome = run_sweep(config, folder)
    assert outcome.error is not None
    assert outcome.error.startswith(
        "2 trials failed, more than failures.max_failed_trials 1: TrainingDiverged"
    )
    assert [t.status for t in records(folder).values()][:2] == ["failed", "failed"]
    resumed = run_sweep(config, folder, resume=True)
    assert resumed.error is None
    statuses = [t.status for t in records(folder).values()]
    assert statuses == ["failed", "failed", "completed"]
    started = [e["id"] for e in read_events(folder / "journal.jsonl") if e["event"] == "trial"]
    assert started == ["t0000", "t0001", "t0002"]


def test_a_spent_budget_stops_the_running_trials_and_is_no_error(ray_cluster: str, tmp_path: Path):
    config = tiny_sweep(tmp_path, budget__max_device_hours=1e-6, early_stopping={"name": "none"})
    folder = folder_of(config)
    outcome = run_sweep(config, folder)
    assert outcome.error is None
    assert outcome.ending == "the budget of 1e-06 device-hours is spent"
    trials = records(folder).values()
    assert 1 <= len(trials) <= 2
    assert {t.status for t in trials} == {"pruned"}
    assert outcome.best is not None or not any(t.last_step for t in trials)
    parent, children = runs_of(MlflowClient(tracking_uri=outcome.tracking_uri), "tiny")
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["dtr_ray.reason"] == outcome.ending
    assert {run.info.status for run in children.values()} == {"KILLED"}


def test_the_watchdog_names_the_trial_that_stands_still(tmp_path: Path):
    config = tiny_sweep(tmp_path, failures__stall_timeout_s=1.0)
    folder = folder_of(config)
    folder.mkdir()
    state = SweepState(config, folder)
    state.next_trial()
    trial = folder / "trials" / "t0000"
    trial.mkdir(parents=True)
    with watchdog(state, {}):
        attempt = AttemptLog(trial)
        for step in range(1, 7):  # alive for longer than the time-out
            attempt.made(step)
            time.sleep(0.3)
        assert state.ending is None
        wait_until(lambda: state.ending, 5.0, "the watchdog's verdict")
    attempt.close()
    assert state.ending is not None
    assert re.search("t0000 last seen training at step [56]", state.ending)
    assert "failures.stall_timeout_s is 1)" in state.ending


def test_a_sweep_that_cannot_end_by_itself_is_ended_with_exit_code_1(tmp_path: Path):
    config = tiny_sweep(tmp_path, failures__stall_timeout_s=0.2)
    folder = folder_of(config)
    folder.mkdir()
    save_config(config, folder)
    code = f"""
import time
from pathlib import Path
from dtr_ray.config import SweepConfig
from dtr_ray.search.state import SweepState
from dtr_ray.service.watchdog import watchdog

config = SweepConfig.model_validate_json(Path({str(folder / "sweep.json")!r}).read_text())
with watchdog(SweepState(config, Path({str(folder)!r})), {{}}, grace_s=0.2):
    time.sleep(60)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert result.returncode == 1
    assert "error: no trial has made a step for" in result.stderr
    assert "--resume goes on with it" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_trial_that_hangs_ends_the_sweep_with_its_reason_and_exit_code_1(tmp_path: Path):
    """SIGSTOP: the process is there, and does nothing more."""
    config = tiny_sweep(tmp_path, failures__stall_timeout_s=20.0, trial__training__batch_size=96)
    folder = folder_of(config)
    kill(folder, "t0001", signal.SIGSTOP)
    with sweep_command(config) as command:
        assert command.wait(200.0) == 1
        assert "the sweep ended early: no trial has made a step for" in command.output
        assert "t0001 last seen" in command.output
        command.wait_gone(30.0)
    resume_to_the_end(SweepCommand(config, "--resume"))
    assert all(t.status in ("completed", "pruned") for t in records(folder).values())
    assert read_json(folder / "best.json")["value"] > 0


def resume_to_the_end(command: SweepCommand) -> None:
    try:
        assert command.wait(100.0) == 0, command.output
    finally:
        command.end()
