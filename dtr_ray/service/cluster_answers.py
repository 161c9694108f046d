"""How the doctor reaches a cluster: it joins it where there is one, and has every machine look at itself."""

import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private.services import find_bootstrap_address
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dtr_ray.config import SweepConfig
from dtr_ray.service import cluster
from dtr_ray.service.findings import in_a_line
from dtr_ray.service.node_checks import Answer, Order, look, look_there, now
from dtr_ray.service.store_checks import DRIVER_TOKEN, probe_in_store, read_there
from dtr_ray.storage.address import is_url

_CLOCK_ROUNDS = 3
_CLOCK_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Machine:
    """A machine of the cluster, or this one, and what it has found."""

    name: str
    cpus: float
    gpus: float
    object_store_bytes: float
    answer: Answer
    written: str = ""
    """What the driver read in the file that the machine has written."""
    clock_s: tuple[float, float] = (0.0, 0.0)
    """Its clock is ahead of the driver's by between so many seconds."""

    @property
    def runs_trials(self) -> bool:
        """A head without CPUs runs none."""
        return self.cpus > 0


@dataclass
class Case:
    """What the doctor looks at, and, after the machines were asked, what they said."""

    config: SweepConfig | None
    output: Path
    """Absolute: the folder of sweeps, or this machine's own for those in a store."""
    address: str | None
    """Of the cluster; None for this machine alone."""
    limit_s: float
    machines: list[Machine] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    """Machines that did not answer, and why."""
    storage_fault: str = ""
    """Why the driver cannot write in the output folder."""
    store: str | None = None
    """Address of the store that holds the sweeps, where one does."""

    @property
    def place(self) -> str:
        """Where results go, in words."""
        return self.store or str(self.output)

    def facts(self, part: str) -> list[tuple[Machine, Any]]:
        """What each machine that could look at a part of itself has found."""
        return [(m, m.answer.facts[part]) for m in self.machines if part in m.answer.facts]


def find_address(given: str | None) -> str | None:
    """Address of the cluster that a sweep would join; None where it would start one on this machine."""
    address = given or os.environ.get("RAY_ADDRESS") or find_bootstrap_address(None)
    return None if address == "local" else address


def join(address: str) -> None:
    """Joins the cluster; raises ValueError and what Ray raises."""
    os.environ["RAY_ADDRESS"] = address
    cluster.connect(dashboard=False)


def ask_machines(case: Case, *, joined: bool) -> None:
    """Has every machine that is up look at itself, or this process where no cluster was joined."""
    with _probe(case) as (probe, token):
        if joined:
            _ask_nodes(case, probe, token)
        else:
            here = cluster.Node(float(os.cpu_count() or 1), 0.0)
            answer = look(_order(case, "here", probe, token, here.cpus, here.gpus))
            gpus = float(answer.facts.get("gpu", {}).get("count", 0))
            case.machines = [Machine("this machine", here.cpus, gpus, 0.0, answer, _read(probe, "here"))]


def _ask_nodes(case: Case, probe: str, token: str) -> None:
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    names = _names(nodes)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(look_there)
    pending = {}
    for node_id, node in nodes.items():
        order = _order(case, node_id, probe, token, *_offers(node))
        pending[task.options(scheduling_strategy=_there(node_id)).remote(order)] = node_id
    end = time.monotonic() + 2 * case.limit_s
    while pending:
        done, _ = ray.wait(list(pending), timeout=max(0.0, end - time.monotonic()))
        if not done:
            break
        for reference in done:
            node_id = pending.pop(reference)
            try:
                answer: Answer = ray.get(reference)
                case.machines.append(_machine(nodes[node_id], names[node_id], answer, probe))
            except (RayError, ImportError, AttributeError) as error:
                # The last two where what it sent cannot be read here.
                case.silent.append(f"{names[node_id]} cannot run dtr_ray's tasks: {_last_line(error)}")
    case.silent += [f"{names[n]} did not answer within {2 * case.limit_s:g} s" for n in pending.values()]
    case.machines.sort(key=lambda machine: machine.name)


def _machine(node: Mapping[str, Any], name: str, answer: Answer, probe: str) -> Machine:
    cpus, gpus = _offers(node)
    store = node["Resources"].get("object_store_memory", 0.0)
    node_id = node["NodeID"]
    return Machine(name, cpus, gpus, store, answer, _read(probe, node_id), _clock(node_id))


def _clock(node_id: str) -> tuple[float, float]:
    """Bounds of how far the machine's clock is ahead of this one's; the quickest answer gives the closest."""
    task: Any = ray.remote(num_cpus=0, max_retries=0)(now)
    low, high = -float("inf"), float("inf")
    for _ in range(_CLOCK_ROUNDS):
        asked = time.time()
        there: float = ray.get(
            task.options(scheduling_strategy=_there(node_id)).remote(), timeout=_CLOCK_TIMEOUT_S
        )
        heard = time.time()
        low, high = max(low, there - heard), min(high, there - asked)
    return low, high


def _order(case: Case, name: str, probe: str, token: str, cpus: float, gpus: float) -> Order:
    from dtr_ray.weights.finding import required_weights

    trial = case.config.trial if case.config is not None and cpus > 0 else None
    return Order(
        name=name,
        working_folder=str(Path.cwd()),
        probe=probe,
        token=token,
        num_gpus=gpus,
        data=None if trial is None else trial.data.to_dict(),
        weights=() if trial is None else tuple(map(asdict, required_weights(trial.data, trial.evaluation))),
        limit_s=case.limit_s,
    )


@contextmanager
def _probe(case: Case) -> Iterator[tuple[str, str]]:
    """A folder in the output folder for the machines' files, and the driver's token in it; both go again."""
    if case.store is not None:
        with probe_in_store(case.store) as (found, token, case.storage_fault):
            yield found, token
        return
    token, made = secrets.token_hex(8), None
    probe = case.output / f".doctor-{token}"
    try:
        made = next((p for p in (*reversed(case.output.parents), case.output) if not p.exists()), None)
        probe.mkdir(parents=True)
        (probe / DRIVER_TOKEN).write_text(token, encoding="utf-8")
    except OSError as error:
        case.storage_fault = in_a_line(error)
    try:
        yield "" if case.storage_fault else str(probe), token
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        if made is not None:
            _remove_empty(case.output, made)


def _remove_empty(folder: Path, top: Path) -> None:
    """Removes the folders that were made from `top` down to `folder`, unless something is in them now."""
    for path in (folder, *folder.parents):
        try:
            path.rmdir()
        except OSError:
            return
        if path == top:
            return


def _read(probe: str, name: str) -> str:
    """What a machine has written; a file server may show it seconds later."""
    if is_url(probe):
        return read_there(probe, name)
    path = Path(probe) / name
    for _ in range(20 if probe else 0):
        if path.is_file():
            return path.read_text(encoding="utf-8")
        time.sleep(0.1)
    return ""


def _offers(node: Mapping[str, Any]) -> tuple[float, float]:
    return node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)


def _names(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What messages call each node: its host's name, with the beginning of its id where two share one."""
    hosts = {i: str(node.get("NodeManagerHostname") or i[:8]) for i, node in nodes.items()}
    twice = {host for host in hosts.values() if list(hosts.values()).count(host) > 1}
    return {i: f"{host} ({i[:6]})" if host in twice else host for i, host in hosts.items()}


def _there(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _last_line(error: BaseException) -> str:
    """Of an error that holds a traceback the line that says what was wrong."""
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else type(error).__name__
