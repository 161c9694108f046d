"""How many trials fit a cluster, and what is said where not one does."""

import time
from pathlib import Path

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from tiny_sweeps import folder_of, sweep_command, tiny_sweep

from dtr_ray.config.sweep import ResourcesConfig
from dtr_ray.service import cluster
from dtr_ray.service.cluster import Node, TooSmallError, num_concurrent_trials
from dtr_ray.service.sweep import run_sweep

machines = st.lists(
    st.builds(Node, st.integers(0, 64).map(float), st.integers(0, 8).map(float)), min_size=1, max_size=6
)
shares = st.sampled_from([0.1, 0.125, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5, 0.75])
one_worker = st.builds(
    ResourcesConfig, cpus_per_worker=st.integers(1, 16), gpus_per_worker=st.one_of(st.just(0.0), shares)
)
whole_gpus = st.builds(
    ResourcesConfig,
    cpus_per_worker=st.integers(1, 16),
    gpus_per_worker=st.integers(0, 4).map(float),
    workers_per_trial=st.integers(1, 8),
)


def fit(resources: ResourcesConfig, nodes: list[Node]) -> int:
    try:
        return num_concurrent_trials(resources, nodes)
    except TooSmallError:
        return 0


def place(resources: ResourcesConfig, nodes: list[Node]) -> int:
    """Places worker after worker on the first machine and GPU with room; trials that were placed whole."""
    workers = 0
    for node in nodes:
        cpus, gpus = node.cpus, [1.0] * int(node.gpus)
        while cpus >= resources.cpus_per_worker:
            need = resources.gpus_per_worker
            room = [n for n, left in enumerate(gpus) if left >= min(need, 1.0) - 1e-9]
            count = max(1, round(need)) if need else 0
            if len(room) < count:
                break
            for n in room[:count]:
                gpus[n] -= min(need, 1.0)
            cpus -= resources.cpus_per_worker
            workers += 1
    return workers // resources.workers_per_trial


@given(st.one_of(one_worker, whole_gpus), machines)
def test_as_many_trials_run_at_once_as_can_be_placed_worker_by_worker(
    resources: ResourcesConfig, nodes: list[Node]
):
    assert fit(resources, nodes) == place(resources, nodes)


@given(st.one_of(one_worker, whole_gpus), machines, machines)
def test_another_machine_never_lets_fewer_trials_run(
    resources: ResourcesConfig, nodes: list[Node], more: list[Node]
):
    assert fit(resources, nodes + more) >= fit(resources, nodes)
    assert fit(resources, nodes + more) >= fit(resources, nodes) + fit(resources, more)


@given(st.one_of(one_worker, whole_gpus), machines, st.integers(1, 5))
def test_max_concurrent_is_a_ceiling(resources: ResourcesConfig, nodes: list[Node], most: int):
    limited = ResourcesConfig.from_dict(resources.to_dict() | {"max_concurrent": most})
    assert fit(limited, nodes) == min(most, fit(resources, nodes))


@pytest.mark.parametrize(
    ("gpus_per_worker", "trials"), [(0.5, 4), (0.4, 4), (0.3, 6), (0.75, 2), (0.1, 20), (1.0, 2), (2.0, 1)]
)
def test_a_share_of_a_gpu_is_of_one_gpu(gpus_per_worker: float, trials: int):
    """0.4 of a GPU fits twice into each of two, and what is left of both makes no fifth."""
    assert fit(ResourcesConfig(gpus_per_worker=gpus_per_worker), [Node(32.0, 2.0)]) == trials


def test_a_head_without_cpus_runs_no_trial():
    resources = ResourcesConfig(workers_per_trial=4, gpus_per_worker=1.0)
    assert fit(resources, [Node(0.0, 0.0), Node(96.0, 8.0), Node(96.0, 2.0)]) == 2


def test_a_cluster_that_grows_runs_what_it_is_said_to_hold():
    resources = ResourcesConfig(autoscaling=True, max_concurrent=8, gpus_per_worker=1.0)
    assert num_concurrent_trials(resources, [Node(2.0, 0.0)]) == 8


def test_a_trial_that_does_not_fit_is_refused_with_what_it_needs_and_what_there_is():
    resources = ResourcesConfig(workers_per_trial=2, cpus_per_worker=4, gpus_per_worker=1.0)
    with pytest.raises(TooSmallError) as error:
        num_concurrent_trials(resources, [Node(8.0, 1.0), Node(16.0, 0.0), Node(16.0, 0.0)])
    text = str(error.value)
    assert "one trial needs 2 workers of 4 CPU and 1 GPU" in text
    assert "1 x (8 CPU, 1 GPU), 2 x (16 CPU, 0 GPU)" in text
    assert "\n" not in text


@pytest.mark.parametrize("here", [True, False])
def test_a_sweep_whose_trials_do_not_fit_says_so_at_once_and_exits_with_2(
    ray_cluster: str, tmp_path: Path, here: bool
):
    config = tiny_sweep(tmp_path, resources__workers_per_trial=3, resources__cpus_per_worker=100)
    with sweep_command(config, RAY_ADDRESS="local" if here else ray_cluster) as command:
        assert command.wait(60.0) == 2
        errors = [line for line in command.output.splitlines() if line]
        assert len(errors) == 1, command.output
        assert errors[0].startswith(
            "error: one trial needs 3 workers of 100 CPU, but the cluster has room for 0"
        )
        command.wait_gone(20.0)
    assert not folder_of(config).exists()


def test_a_cluster_that_does_not_answer_is_the_users_error(tmp_path: Path):
    config = tiny_sweep(tmp_path)
    with sweep_command(config, RAY_ADDRESS="127.0.0.1:1") as command:
        assert command.wait(90.0) == 2, command.output
        assert "error: the Ray cluster at 127.0.0.1:1 does not answer" in command.output
        assert "Traceback" not in command.output


def test_two_drivers_cannot_run_one_sweep(ray_cluster: str, tmp_path: Path):
    config = tiny_sweep(tmp_path)
    folder = folder_of(config)
    folder.mkdir()
    from filelock import FileLock

    with FileLock(folder / ".lock"), pytest.raises(ValueError, match="another process runs the sweep"):
        run_sweep(config, folder)


def test_the_nodes_of_the_shared_cluster_are_seen(ray_cluster: str):
    cluster.connect(dashboard=False)
    assert cluster.nodes() == [Node(2.0, 0.0)]
    started = time.monotonic()
    cluster.connect(dashboard=True)  # joined already
    assert time.monotonic() - started < 1.0
    assert ray.is_initialized()
