"""A process of a trial is stopped, so that it hangs; the sweep ends it and goes on.

Takes about three minutes on two cores:

    python -m pytest -m slow tests/service/test_hanging.py -n 0 -s --timeout 600
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from kills import check_accounts, check_mlflow, check_steps, runs_of
from mlflow import MlflowClient
from tiny_sweeps import SweepCommand, attempts, folder_of, records, sweep_command, tiny_sweep, wait_until

from dtr_ray.config import SweepConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CHANGES: dict[str, Any] = {
    "search__num_trials": 3,
    "resources__max_concurrent": 2,
    "early_stopping": {"name": "none"},
    "trial__training__num_steps": 240,
    "trial__training__batch_size": 192,
    "trial__training__checkpoint_every_steps": 20,
    "trial__evaluation__every_steps": 120,
    "failures__hang_timeout_s": 6.0,
}


def stop_at(command: SweepCommand, config: SweepConfig, trial_id: str, step: int, number: int = 1) -> int:
    """Stops the process that trains the trial, its `number`th, once it has made the step; returns its id."""

    def found() -> int | None:
        assert command.process.poll() is None, command.output
        made = attempts(folder_of(config), trial_id)
        there = len(made) == number and (made[-1].to_step or 0) >= step
        return made[-1].pid if there else None

    pid = wait_until(found, 600.0, f"{trial_id} at step {step}")
    os.kill(pid, signal.SIGSTOP)
    return pid


def tags_of(config: SweepConfig, trial_id: str) -> dict[str, str]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder_of(config).parent / 'mlflow.db'}")
    return runs_of(client, config.name)[1][trial_id].data.tags


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_process_is_ended_and_its_trial_goes_on_from_its_checkpoint(
    workers: int, tmp_path: Path, shared_cache: Path
):
    changes = {"resources__workers_per_trial": workers, "resources__max_concurrent": 3 - workers}
    config = tiny_sweep(tmp_path, **CHANGES | changes)
    with sweep_command(config, RAY_ADDRESS="local") as command:
        pid = stop_at(command, config, "t0000", 50)
        assert command.wait(900.0) == 0, command.output
        assert "t0000 goes on from its newest checkpoint: no sign of life for" in command.output
    assert not Path(f"/proc/{pid}").exists()
    check_accounts(config)
    check_mlflow(config)
    assert check_steps(config) <= 20
    trials = records(folder_of(config))
    assert [trial.retries for trial in trials.values()] == [1, 0, 0]
    assert "while training, after step 5" in trials["t0000"].retry_reason
    assert len(attempts(folder_of(config), "t0000")) == 2
    tags = tags_of(config, "t0000")
    assert (tags["dtr_ray.retries"], tags["dtr_ray.status"]) == ("1", "completed")


def test_a_trial_that_hangs_again_and_again_fails_with_phase_and_step(tmp_path: Path, shared_cache: Path):
    config = tiny_sweep(tmp_path, **CHANGES, failures__retries=1)
    with sweep_command(config, RAY_ADDRESS="local") as command:
        for number, step in ((1, 50), (2, 70)):
            stop_at(command, config, "t0000", step, number)
        assert command.wait(900.0) == 0, command.output
    trials = records(folder_of(config))
    assert [trial.status for trial in trials.values()] == ["failed", "completed", "completed"]
    reason = trials["t0000"].reason
    assert reason.startswith("its process died 2 times (failures.retries): no sign of life for"), reason
    assert "while training, after step 7" in reason
    tags = tags_of(config, "t0000")
    assert (tags["dtr_ray.status"], tags["dtr_ray.reason"]) == ("failed", reason)
