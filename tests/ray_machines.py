"""A Ray cluster of several machines, all of them here, and the processes of a sweep on it."""

import socket
import subprocess
import sys

import ray
from ray.cluster_utils import Cluster
from tiny_sweeps import SweepCommand, attempts, folder_of, wait_until

from dtr_ray.config import SweepConfig
from dtr_ray.service.processes import Process, enlisted


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Machines:
    """A Ray cluster of a head without CPUs and others, all of them here."""

    def __init__(self, num_machines: int, cpus: int) -> None:
        settings = {"include_dashboard": True, "dashboard_port": free_port()}
        head = {"num_cpus": 0, "object_store_memory": 100_000_000, **settings}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.cpus = cpus
        for _ in range(num_machines):
            self.add()
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")

    def add(self) -> None:
        self.cluster.add_node(num_cpus=self.cpus, object_store_memory=100_000_000)

    def drain(self, node: str, seconds: int) -> None:
        """As an autoscaler does when the cloud gives notice."""
        command = f"-m ray.scripts.scripts drain-node --address {self.cluster.address} --node-id {node} "
        command += "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message notice "
        command += f"--deadline-remaining-seconds {seconds}"
        subprocess.run([sys.executable, *command.split()], check=True, capture_output=True)

    def alive(self) -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def end(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


def process_at(command: SweepCommand, config: SweepConfig, trial_id: str, step: int) -> Process:
    """The process that trains the trial, once it has made the step."""
    folder = folder_of(config)

    def found() -> bool:
        assert command.process.poll() is None, command.output
        made = attempts(folder, trial_id)
        return bool(made) and (made[-1].to_step or 0) >= step

    wait_until(found, 600.0, f"{trial_id} at step {step}")
    processes = enlisted(folder.resolve() / "trials" / trial_id)
    return next(process for process in processes if process.role == "worker0")
