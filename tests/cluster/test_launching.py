"""`ray up cluster/local.yaml` for real: two machines, a sweep, `ray down`. As root, alone, in minutes:

pytest tests/cluster/test_launching.py tests/cluster/test_slurm.py -m slow -n 0 -s --timeout 1200
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.machines import USER, Lan, Machine
from cluster.sweeps import PARTS, SWEEP, finished_trials, hosts_of_trials, wait_until

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Laptop:
    """Where the launcher is typed: repository, token, and cluster/local.yaml with its places filled in."""

    def __init__(self, network: Lan) -> None:
        self.network = network
        self.machine = network.machines["laptop"]
        text = (ROOT / "cluster/local.yaml").read_text(encoding="utf-8")
        config: dict[str, Any] = yaml.safe_load(text)
        config["provider"] |= {"head_ip": network.addresses["one"], "worker_ips": [network.addresses["two"]]}
        config["auth"] = {"ssh_user": USER, "ssh_private_key": "~/.ssh/id_ed25519"}
        (network.scratch / "local.yaml").write_text(yaml.safe_dump(config))
        token = next(line for line in text.splitlines() if "openssl rand" in line)
        self.machine.run(token.lstrip("# "))

    def type(self, line: str, *, timeout: float = 300) -> str:
        return self.machine.run(f"cd {ROOT} && {line}", timeout=timeout)


@pytest.fixture
def laptop(start_lan: Callable[[Sequence[str]], Lan]) -> Laptop:
    network = start_lan(["laptop", "one", "two"])
    for name in ("one", "two"):
        # The environment of these tests stands in for the one that the set-up would install for minutes.
        network.machines[name].run(f"mkdir -p ~/dtr-ray && ln -s {sys.prefix} ~/dtr-ray/.venv")
    return Laptop(network)


def test_ray_up_sweeps_over_two_machines_and_ray_down_leaves_nothing_running(laptop: Laptop):
    one, two = laptop.network.machines["one"], laptop.network.machines["two"]
    start = time.monotonic()
    said = laptop.type("ray up --yes --no-config-cache /mnt/lan/local.yaml")
    assert "ray down" in said
    up = time.monotonic() - start
    joined = up + wait_until(lambda: two.processes("raylet/raylet") == 1, "a worker", 180)

    check_token(one, two)
    start = time.monotonic()
    wait_until(lambda: "4.0 CPU" in shell(one, "ray status"), "4 CPU, 2 of each machine")
    said = laptop.type(
        f"ray exec /mnt/lan/local.yaml 'cd ~/dtr-ray/project && python -m dtr_ray.sweep {SWEEP}'", timeout=600
    )
    swept = time.monotonic() - start
    assert "best" in said, said
    hosts = hosts_of_trials(laptop.network.shared / "runs")
    assert finished_trials(laptop.network.shared / "runs") == 4
    assert set(hosts.values()) == {"one", "two"}, hosts

    start = time.monotonic()
    laptop.type("ray down --yes /mnt/lan/local.yaml")
    wait_until(lambda: not any(one.processes(part) for part in PARTS), "the head's Ray ends")
    # The launcher does not reach the workers: their Ray ends when it has missed its head for a minute.
    wait_until(lambda: not two.processes("raylet/raylet"), "the worker's Ray ends", 180)
    print(
        f"\nray up {up:.0f} s, both machines after {joined:.0f} s, sweep of {len(hosts)} trials {swept:.0f} s"
    )
    print(f"{hosts}, all processes gone {time.monotonic() - start:.0f} s after ray down was typed")


def shell(machine: Machine, line: str) -> str:
    """A line as `ray exec` would run it."""
    return machine.run(f"source ~/.bashrc; {line}", check=False)


def check_token(one: Machine, two: Machine) -> None:
    """The token is on both machines, readable to its owner alone, and Ray refuses who has none."""
    for machine in (one, two):
        assert machine.run("stat -c %a dtr-ray/token/auth_token").strip() == "600"
    assert one.run("cat dtr-ray/token/auth_token") == two.run("cat dtr-ray/token/auth_token")
    refused = two.run("RAY_AUTH_MODE=disabled ray status --address 10.77.0.2:6379", check=False)
    assert "InvalidAuthToken" in refused, refused
    page = "import urllib.request as r; r.urlopen('http://10.77.0.2:8265/api/jobs/')"
    assert "401" in two.run(f'python -c "{page}"', check=False)
