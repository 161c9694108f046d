"""How many workers a trial starts with: all that it is to have, or fewer where machines have been lost."""

import time

import ray
from ray._private.state import state as cluster_state

from dtr_ray.config import TrialConfig, override
from dtr_ray.config.sweep import ResourcesConfig
from dtr_ray.service.cluster import Node, workers_on

# What held the resources before may take a while to give them back.
_WAIT_S = 30.0
_POLL_S = 1.0


def possible_counts(resources: ResourcesConfig, batch_size: int) -> list[int]:
    """The numbers of workers that a trial may run with, the largest first: they share its batch evenly."""
    most, least = resources.workers_per_trial, resources.least_workers
    return [most, *(n for n in range(most - 1, least - 1, -1) if batch_size % n == 0)]


def choose_workers(
    resources: ResourcesConfig, batch_size: int, held: int = 0, wait_s: float = _WAIT_S
) -> int:
    """The number of workers to start with now.

    Args:
        resources: of the trial.
        batch_size: images of a training step, over all workers.
        held: workers that the trial has now and would give back.
        wait_s: how long to wait for the full number before a smaller one is taken.

    Where there is no room for the smallest number it waits for as long as it takes; but a cluster that adds
    machines when asked is asked for the full number.
    """
    counts, until = possible_counts(resources, batch_size), time.monotonic() + wait_s
    while len(counts) > 1:
        free = room(resources) + held
        fitting = next((count for count in counts if count <= free), None)
        if fitting == counts[0]:
            break
        if time.monotonic() > until:
            if fitting is not None:
                return fitting
            if resources.autoscaling:
                break
        time.sleep(_POLL_S)
    return counts[0]


def room(resources: ResourcesConfig) -> int:
    """How many more workers the cluster has room for now; machines that are to go have none."""
    leaving = cluster_state.get_draining_nodes()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - leaving.keys()
    free = cluster_state.available_resources_per_node()
    machines = [Node(one.get("CPU", 0.0), one.get("GPU", 0.0)) for node, one in free.items() if node in alive]
    return sum(workers_on(machine, resources) for machine in machines)


def for_workers(trial: TrialConfig, num_workers: int, full: int) -> TrialConfig:
    """The trial on `num_workers` of its `full` number: larger shares go through the model in more parts."""
    share = trial.training.batch_size // num_workers
    parts = min(trial.training.accumulation_steps * -(-full // num_workers), share)
    return TrialConfig.from_dict(override(trial.to_dict(), {"training.accumulation_steps": parts}))
