"""A sweep in an object store over machines that share no folder, while machines and the store go away.

As root, alone, in minutes: pytest tests/cluster/test_storage.py -m slow -n 0 -s --timeout 3600
"""

import itertools
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.machines import Lan, Machine
from s3 import BUCKET, KEYS
from tiny_sweeps import tiny_sweep, wait_until

from dtr_ray.service.attempts import Attempt

ROOT = Path(__file__).parents[2]
STORE = "http://10.77.0.1:5000"
INTERVAL, STEPS, TRIALS = 20, 200, 3
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# What the store has of the sweep, once a second, as the newest attempts tell it.
WATCH = """
import json, os, sys, time
from dtr_ray.storage.index import newest, read_index
from dtr_ray.storage.store import Store
store = Store(sys.argv[1])
while True:
    found = {}
    for trial, entry in newest(store.entries("index")).items():
        index = read_index(store, entry.name)
        attempts = [json.loads(line) for line in index.texts.get("attempts.jsonl", "").splitlines()]
        found[trial] = {"attempts": attempts, "steps": list(index.checkpoints()), "attempt": index.attempt}
    with open("/mnt/lan/seen.tmp", "w") as file:
        json.dump(found, file)
    os.replace("/mnt/lan/seen.tmp", "/mnt/lan/seen.json")
    time.sleep(0.5)
"""


class Site:
    """Machines with the code, and a store on the first of them."""

    def __init__(self, network: Lan) -> None:
        self.network = network
        shutil.copytree(ROOT / "dtr_ray", network.scratch / "code" / "dtr_ray")
        (network.scratch / "watch.py").write_text(WATCH)
        settings = {**KEYS, "AWS_ENDPOINT_URL": STORE, "PYTHONPATH": "/mnt/lan/code", "OMP_NUM_THREADS": "1"}
        settings["RAY_health_check_failure_threshold"] = "2"
        self.environment = " ".join(f"{name}={value}" for name, value in settings.items())
        self.processes: list[subprocess.Popen[bytes]] = []
        self.url = f"s3://{BUCKET}/runs"

    def start(self, machine: str, line: str, log: str) -> subprocess.Popen[bytes]:
        """Something that goes on in a machine."""
        command = self.network.machines[machine].command(
            f"echo $$ > ~/{log.partition('.')[0]}.pid; exec env {self.environment} {line}"
        )
        with (self.network.scratch / log).open("ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    def run(self, machine: str, line: str, **options: Any) -> str:
        return self.network.machines[machine].run(f"export {self.environment}; {line}", **options)

    def store(self) -> Machine:
        return self.network.machines["laptop"]

    def seen(self) -> dict[str, Any]:
        path = self.network.scratch / "seen.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def text(self, log: str) -> str:
        return (self.network.scratch / log).read_text(errors="replace")


@pytest.fixture
def site(start_lan: Callable[[Sequence[str]], Lan]) -> Iterator[Site]:
    site = Site(start_lan(["laptop", "one", "two", "three"]))
    site.start("laptop", f"{sys.executable} -m moto.server -H 10.77.0.1 -p 5000", "store.log")
    create = f"import urllib.request as r; r.urlopen(r.Request('{STORE}/{BUCKET}', method='PUT'))"
    line = f'until {sys.executable} -c "{create}" 2> /dev/null; do sleep 0.3; done'
    site.run("laptop", line, timeout=60)
    values = tiny_sweep(
        Path("unused"),
        search__num_trials=TRIALS,
        early_stopping={"name": "none"},
        trial__training__num_steps=STEPS,
        trial__training__checkpoint_every_steps=INTERVAL,
        trial__evaluation__every_steps=100,
    ).to_dict()
    values["storage"]["output"] = site.url
    (site.network.scratch / "sweep.yaml").write_text(yaml.safe_dump(values))
    yield site
    for process in site.processes:
        # The host's side of one that was stopped has stopped with it.
        process.kill()
        process.wait()


def ray(site: Site, machine: str, options: str) -> None:
    address = site.network.addresses[machine]
    line = f"ray start --node-ip-address={address} --object-store-memory=80000000 {options}"
    site.run(machine, f"{line} --disable-usage-stats", timeout=600)


def running_on(site: Site, host: str, least: int) -> str | None:
    """A trial that trains on a machine now, with a checkpoint of at least that step in the store."""
    for trial, found in site.seen().items():
        last = found["attempts"][-1] if found["attempts"] else {}
        newest = max(found["steps"], default=0)
        if last.get("host") == host and least <= newest < STEPS - 2 * INTERVAL:
            return str(trial)
    return None


def test_a_sweep_outlives_a_node_the_store_and_the_head_without_a_shared_folder(site: Site):
    start = time.monotonic()
    ray(site, "one", "--head --port=6379 --num-cpus=0 --include-dashboard=false")
    for name in ("two", "three"):
        ray(site, name, "--address=10.77.0.2:6379 --num-cpus=1")
    sweep = f"{sys.executable} -m dtr_ray.sweep /mnt/lan/sweep.yaml"
    first = site.start("one", f"RAY_ADDRESS=10.77.0.2:6379 {sweep}", "first.log")
    site.start("laptop", f"{sys.executable} /mnt/lan/watch.py {site.url}/tiny", "watch.log")

    lost = wait_until(lambda: running_on(site, "two", 2 * INTERVAL), 900, "a checkpoint of a trial on two")
    print(f"\n[{time.monotonic() - start:.0f} s] two is lost, with {lost} at {site.seen()[lost]['steps']}")
    site.network.machines["two"].power_off()
    wait_until(lambda: site.seen()[lost]["attempt"] == 2, 900, "the trial starts again elsewhere")
    print(f"[{time.monotonic() - start:.0f} s] {lost} goes on on three")

    wait_until(lambda: running_on(site, "three", INTERVAL), 900, "a checkpoint of a trial on three")
    site.store().run("kill -STOP $(cat ~/store.pid)")
    print(f"[{time.monotonic() - start:.0f} s] the store is away")
    time.sleep(30)
    assert first.poll() is None, site.text("first.log")
    site.store().run("kill -CONT $(cat ~/store.pid)")
    print(f"[{time.monotonic() - start:.0f} s] the store is back")

    before = site.seen()
    done = sum(max(found["steps"], default=0) for found in before.values())
    wait_until(
        lambda: sum(max(f["steps"], default=0) for f in site.seen().values()) > done + INTERVAL,
        900,
        "goes on",
    )
    wait_until(lambda: running_on(site, "three", INTERVAL), 900, "a trial in its middle")
    print(f"[{time.monotonic() - start:.0f} s] the head is lost")
    site.network.machines["one"].power_off()
    site.run("three", "ray stop --force", timeout=300)
    ray(site, "three", "--head --port=6379 --num-cpus=1 --include-dashboard=false")
    second = site.start("three", f"RAY_ADDRESS=10.77.0.4:6379 {sweep} --resume", "second.log")
    assert second.wait(1500) == 0, site.text("second.log")
    print(f"[{time.monotonic() - start:.0f} s] the sweep has ended on three")
    check(site)


def check(site: Site) -> None:
    time.sleep(2)
    seen = site.seen()
    assert len(seen) == TRIALS, seen
    repeated = {trial: steps_repeated(found["attempts"]) for trial, found in seen.items()}
    hosts = {trial: [a["host"] for a in found["attempts"]] for trial, found in seen.items()}
    print(f"attempts {hosts}\nsteps repeated {repeated}")
    # Records of the last seconds of a machine that is lost are lost with it, so this is a lower bound.
    assert max(repeated.values()) <= INTERVAL
    assert all(max(found["steps"]) == STEPS or len(found["steps"]) <= 2 for found in seen.values())
    fetch = "import sys; from dtr_ray.storage.fetching import fetch_folder; print(fetch_folder(sys.argv[1]))"
    folder = site.run("three", f'{sys.executable} -c "{fetch}" {site.url}/tiny').strip()
    best = json.loads(site.run("three", f"cat {folder}/best.json"))
    assert site.run("three", f"ls {folder}/{best['checkpoint']}").split()[0] == "ema.safetensors"
    site.run("three", f"cp ~/runs/mlflow.db /mnt/lan/mlflow.db && cp {folder}/journal.jsonl /mnt/lan/")
    events = [json.loads(line) for line in site.text("journal.jsonl").splitlines()]
    ends = Counter(event["id"] for event in events if event["event"] == "end")
    assert ends == dict.fromkeys(seen, 1)
    check_records(site.network.scratch / "mlflow.db", seen)


def check_records(database: Path, seen: dict[str, Any]) -> None:
    """Each trial has one run in MLflow, and each step of each metric is there once."""
    connection = sqlite3.connect(database)
    runs = dict(
        connection.execute(
            "select t.value, r.run_uuid from runs r join tags t on r.run_uuid = t.run_uuid"
            " where t.key = 'dtr_ray.run_key' and r.lifecycle_stage = 'active'"
        ).fetchall()
    )
    count = connection.execute("select count(*) from runs where lifecycle_stage = 'active'").fetchone()[0]
    assert count == len(runs) == TRIALS + 1
    for trial in seen:
        rows = connection.execute(
            "select key, step from metrics where run_uuid = ?", (runs[trial],)
        ).fetchall()
        steps = Counter(rows)
        doubled = {row: count for row, count in steps.items() if count > 1}
        assert not doubled, (trial, doubled)
        losses = sorted(step for key, step in steps if key == "train_loss")
        assert losses == list(range(4, STEPS + 1, 4)), (trial, losses)
    connection.close()
    print(f"{len(seen)} trials, {len(runs)} runs, each step of each metric once")


def steps_repeated(lines: list[dict[str, Any]]) -> int:
    attempts = [Attempt(**line) for line in lines]
    pairs = itertools.pairwise(attempts)
    return max(
        ((a.to_step or 0) - (b.from_step or 0) for a, b in pairs if b.from_step is not None), default=0
    )
