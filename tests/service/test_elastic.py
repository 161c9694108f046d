"""A cluster loses a machine, and a trial goes on with the workers that there is room for.

What is slow takes three minutes on two cores:

    python -m pytest -m slow tests/service/test_elastic.py -n 0 -s --timeout 900
"""

from pathlib import Path
from typing import Any

import pytest
from kills import check_accounts, check_mlflow, check_steps, run_to_the_end, runs_of
from mlflow import MlflowClient
from ray_machines import Machines, process_at
from tiny_sweeps import attempts, folder_of, records, sweep_command, tiny_sweep, wait_until

from dtr_ray.config import SweepConfig
from dtr_ray.config.sweep import ResourcesConfig
from dtr_ray.service.cluster import Node, TooSmallError, num_concurrent_trials
from dtr_ray.service.elastic import for_workers, possible_counts

ELASTIC = ResourcesConfig(workers_per_trial=4, min_workers_per_trial=2)


@pytest.mark.parametrize(
    ("batch_size", "counts"), [(96, [4, 3, 2]), (64, [4, 2]), (100, [4, 2]), (12, [4, 3, 2])]
)
def test_a_trial_runs_with_any_number_of_workers_that_share_its_batch(batch_size: int, counts: list[int]):
    assert possible_counts(ELASTIC, batch_size) == counts
    assert possible_counts(ResourcesConfig(workers_per_trial=4), batch_size) == [4]


@pytest.mark.parametrize(("num_workers", "parts"), [(4, 3), (3, 6), (2, 6), (1, 12)])
def test_larger_shares_go_through_the_model_in_more_parts(num_workers: int, parts: int, tmp_path: Path):
    changes = {"trial__training__accumulation_steps": 3, "trial__training__batch_size": 96}
    trial = tiny_sweep(tmp_path, **changes).trial
    assert for_workers(trial, num_workers, 4).training.accumulation_steps == parts


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"min_workers_per_trial": 5}, "5 is more than workers_per_trial 4"),
        ({"min_workers_per_trial": 3}, "3 workers do not divide trial.training.batch_size 64"),
    ],
)
def test_a_smallest_number_that_cannot_run_is_refused(changes: dict[str, Any], rule: str, tmp_path: Path):
    resources = {f"resources__{key}": value for key, value in changes.items()}
    with pytest.raises(ValueError, match=rule):
        tiny_sweep(tmp_path, resources__workers_per_trial=4, trial__training__batch_size=64, **resources)


def test_one_trial_fits_where_its_smallest_number_of_workers_does():
    assert num_concurrent_trials(ELASTIC, [Node(8.0, 0.0), Node(3.0, 0.0)]) == 2
    assert num_concurrent_trials(ELASTIC, [Node(2.0, 0.0)]) == 1
    with pytest.raises(TooSmallError):
        num_concurrent_trials(ELASTIC, [Node(1.0, 0.0)])


def losses(config: SweepConfig) -> dict[str, dict[int, float]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder_of(config).parent / 'mlflow.db'}")
    runs = runs_of(client, config.name)[1]
    return {
        trial_id: {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train_loss")}
        for trial_id, run in runs.items()
    }


def workers(config: SweepConfig) -> dict[str, str]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder_of(config).parent / 'mlflow.db'}")
    return {name: run.data.tags["dtr_ray.workers"] for name, run in runs_of(client, config.name)[1].items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_trial_of_four_workers_goes_on_with_two_and_the_next_has_four_again(
    tmp_path: Path, shared_cache: Path
):
    changes: dict[str, Any] = {
        "search__num_trials": 2,
        "early_stopping": {"name": "none"},
        "trial__training__num_steps": 200,
        "trial__training__batch_size": 192,
        "trial__training__checkpoint_every_steps": 20,
        "trial__evaluation__every_steps": 100,
        "resources__max_concurrent": 1,
    }
    several = {"resources__workers_per_trial": 4, "resources__min_workers_per_trial": 2}
    config = tiny_sweep(tmp_path / "elastic", **changes, **several)
    machines = Machines(2, 2)
    try:
        with sweep_command(config, RAY_ADDRESS=machines.cluster.address) as command:
            node = process_at(command, config, "t0000", 50).node
            gone = next(one for one in machines.cluster.worker_nodes if one.node_id == node)
            machines.cluster.remove_node(gone, allow_graceful=False)
            wait_until(lambda: len(attempts(folder_of(config), "t0000")) == 2, 600.0)
            machines.add()
            assert command.wait(900.0) == 0, command.output
    finally:
        machines.end()
    check_accounts(config)
    check_mlflow(config)
    assert check_steps(config) <= 20
    assert [trial.retries for trial in records(folder_of(config)).values()] == [1, 0]
    assert workers(config) == {"t0000": "2", "t0001": "4"}
    undisturbed = tiny_sweep(tmp_path / "undisturbed", **changes)
    run_to_the_end(undisturbed, RAY_ADDRESS="local")
    ours, theirs = losses(config), losses(undisturbed)
    for trial_id in ours:
        assert ours[trial_id] == pytest.approx(theirs[trial_id], rel=1e-3)
