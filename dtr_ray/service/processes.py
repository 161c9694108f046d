"""Which processes work on a trial, and on which machines: told to the cluster, so that they can be ended.

Kept in the key-value store of the Ray cluster: it lives as long as the processes that it tells of.
"""

import json
import logging
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger(__name__)

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Process:
    """A process on some machine of the cluster."""

    role: str
    """`worker0`, `worker1`, ... train; `trial` looks after those of Ray Train."""
    node: str
    """Ray's id of the machine, in hexadecimal digits."""
    pid: int
    born: int
    """When it began, in the kernel's ticks: a number may have been given to another process since."""
    killed_for_memory: int
    """Processes that the kernel of the machine had ended for want of memory until then."""


def enlist(trial_folder: Path, role: str) -> None:
    """Tells the cluster that this process works on the trial; without Ray there is nobody to tell."""
    if not ray.is_initialized():
        return
    node = ray.get_runtime_context().get_node_id()
    process = Process(role, node, os.getpid(), _born(os.getpid()), killed_for_memory())
    internal_kv._internal_kv_put(_prefix(trial_folder) + role.encode(), json.dumps(asdict(process)).encode())


def enlisted(trial_folder: Path) -> list[Process]:
    """The trial's newest processes; some may be gone. None are known while the cluster does not answer."""
    if not ray.is_initialized():
        return []
    try:
        keys = internal_kv._internal_kv_list(_prefix(trial_folder))
        values = [internal_kv._internal_kv_get(key) for key in keys]
    except RayError as error:
        log.warning("the cluster does not tell of processes: %s", str(error).partition("\n")[0])
        return []
    return [Process(**json.loads(value)) for value in values if value is not None]


def dismiss(trial_folder: Path) -> None:
    """Forgets the trial's processes, once it has ended."""
    internal_kv._internal_kv_del(_prefix(trial_folder), del_by_prefix=True)


def end(processes: list[Process]) -> list[Process]:
    """Ends those that are still there, stopped ones too; returns them.

    A machine that is gone has none; one that does not answer within a minute is left alone.
    """
    return [one for node, pids in _by_node(processes).items() for one in _ask(node, _end, pids) or []]


def kills_since(process: Process) -> int:
    """How many processes the kernel of its machine has ended for want of memory since it was enlisted.

    0 where the machine does not tell.
    """
    now = _ask(process.node, killed_for_memory)
    return 0 if now is None else max(0, now - process.killed_for_memory)


def killed_for_memory() -> int:
    """Processes of this machine that the kernel has ended for want of memory; 0 where it does not tell."""
    try:
        text = Path("/proc/vmstat").read_text(encoding="utf-8")
    except OSError:
        return 0
    counts = dict(line.split() for line in text.splitlines())
    return int(counts.get("oom_kill", 0))


def _prefix(trial_folder: Path) -> bytes:
    return f"dtr_ray/{trial_folder}/".encode()


def _by_node(processes: list[Process]) -> dict[str, list[Process]]:
    found: dict[str, list[Process]] = {}
    for process in processes:
        found.setdefault(process.node, []).append(process)
    return found


def _ask(node: str, question: Any, *arguments: Any) -> Any:
    """What a function says on a machine; None where that is gone or does not answer."""
    if not any(one["Alive"] and one["NodeID"] == node for one in ray.nodes()):
        return None
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task: Any = ray.remote(question).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    reference = task.remote(*arguments)
    try:
        return ray.get(reference, timeout=_TIMEOUT_S)
    except GetTimeoutError:
        ray.cancel(reference, force=True)
        log.warning("machine %s does not answer", node)
    except RayError as error:
        # It may have gone meanwhile.
        log.warning("machine %s cannot be asked: %s", node, str(error).partition("\n")[0])
    return None


def _end(processes: list[Process]) -> list[Process]:
    ended = []
    for process in processes:
        try:
            if _born(process.pid) == process.born:
                os.kill(process.pid, signal.SIGKILL)
                ended.append(process)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return ended


def _born(pid: int) -> int:
    """Raises FileNotFoundError where there is no such process, or it is dead and only not buried yet."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise FileNotFoundError(f"process {pid} is dead")
    return int(fields[19])
