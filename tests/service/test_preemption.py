"""A machine of the cluster is to go: the trials on it write a checkpoint, and go on elsewhere at once.

Takes about two minutes on two cores:

    python -m pytest -m slow tests/service/test_preemption.py -n 0 -s --timeout 600
"""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kills import check_accounts, check_mlflow, check_steps
from ray_machines import Machines, process_at
from tiny_sweeps import attempts, folder_of, records, sweep_command, tiny_sweep, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CHANGES: dict[str, Any] = {
    "search__num_trials": 2,
    "early_stopping": {"name": "none"},
    "failures__retries": 0,
    "trial__training__num_steps": 300,
    "trial__training__batch_size": 192,
    "trial__training__checkpoint_every_steps": 100,
    "trial__evaluation__every_steps": 150,
}


@pytest.fixture
def machines(shared_cache: Path) -> Iterator[Machines]:
    found = Machines(2, 2)
    yield found
    found.end()


@pytest.mark.parametrize("workers", [1, 2])
def test_trials_leave_a_machine_that_is_to_go_and_repeat_no_step(
    workers: int, machines: Machines, tmp_path: Path
):
    changes = {"resources__workers_per_trial": workers, "resources__max_concurrent": 1}
    config = tiny_sweep(tmp_path, **CHANGES | changes)
    with sweep_command(config, RAY_ADDRESS=machines.cluster.address) as command:
        machines.drain(process_at(command, config, "t0000", 30).node, 60)
        wait_until(lambda: len(attempts(folder_of(config), "t0000")) == 2, 600.0)
        assert command.wait(900.0) == 0, command.output
        assert "goes on from its newest checkpoint: left its machine after step" in command.output
    check_accounts(config)
    check_mlflow(config)
    assert check_steps(config) == 0
    trials = records(folder_of(config))
    assert [(trial.retries, trial.moves) for trial in trials.values()] == [(0, 1), (0, 0)]


def test_a_machine_that_goes_sooner_than_its_trials_leave_it_is_no_failure_of_theirs(
    machines: Machines, tmp_path: Path
):
    config = tiny_sweep(tmp_path, **CHANGES, resources__max_concurrent=1)
    with sweep_command(config, RAY_ADDRESS=machines.cluster.address) as command:
        process = process_at(command, config, "t0000", 30)
        # It cannot write its checkpoint any more.
        command.signal(signal.SIGSTOP, [process.pid])
        machines.drain(process.node, 5)
        gone = next(one for one in machines.cluster.worker_nodes if one.node_id == process.node)
        machines.cluster.remove_node(gone, allow_graceful=False)
        command.signal(signal.SIGKILL, [process.pid])
        assert command.wait(900.0) == 0, command.output
    check_accounts(config)
    assert check_steps(config) <= 100
    trials = records(folder_of(config))
    assert [(trial.retries, trial.moves) for trial in trials.values()] == [(0, 1), (0, 0)]
