"""The Ray cluster: connect or start, and how many trials fit on it side by side."""

import importlib
import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.services import find_bootstrap_address

from dtr_ray.config.sweep import ResourcesConfig

_OBJECT_STORE_BYTES = 200_000_000
_CONNECT_TIMEOUT_S = 10.0
_OFFER_S = 20.0
_HOST = re.compile(r"[\w.-]+|\[[0-9a-fA-F:.]+\]")
_MEND = "set RAY_ADDRESS to one that is up, or unset it and type `ray stop` to start one here"


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster offers in all."""

    cpus: float
    gpus: float


class TooSmallError(ValueError):
    """A single trial needs more than the whole cluster has."""


def connect(*, dashboard: bool, needs: ResourcesConfig | None = None) -> None:
    """Joins the Ray cluster of RAY_ADDRESS or of this machine, or starts one here.

    Ray Train's clean-up of lost worker groups asks the dashboard's state server, so a cluster for Ray
    Train is started with it; without it such a clean-up never ends and the next trial waits for ever.

    Raises ValueError where the cluster does not answer, and TooSmallError where this machine, on which one
    would be started, has no room for a trial that `needs` so much.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS") or find_bootstrap_address(None)
    if address in (None, "local"):
        if needs is not None:
            # Ray takes seconds to start.
            num_concurrent_trials(needs, local_nodes())
        # Trials hand over reports of some hundred bytes: a small store fits any machine's /dev/shm.
        settings |= {"include_dashboard": dashboard, "object_store_memory": _OBJECT_STORE_BYTES}
        # Whoever reaches it may submit code.
        settings["dashboard_host"] = "127.0.0.1"
    else:
        check_answers(str(address))
    with _interruptible():
        try:
            ray.init(**settings)
        except ConnectionError as error:
            raise ValueError(f"the Ray cluster cannot be reached: {error}") from error


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets SIGTERM mean what it meant before: Ray puts its own handler there, which ends without a word."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM:
            raise KeyboardInterrupt from error
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def kill_own_processes() -> None:
    """Ends all processes that descend from this one, which are Ray's if it has started any; for its own end.

    Ray's shutdown in good order can hang or crash where it was interrupted in its start, and what is left
    without a parent takes a minute to go.
    """
    # Found where Ray brings it along.
    psutil = importlib.import_module("psutil")
    for descendant in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            descendant.kill()


def check_answers(address: str, name: str = "RAY_ADDRESS", mend: str = _MEND) -> None:
    """Knocks at HOST:PORT; Ray itself would try for minutes, and end the process.

    Raises ValueError, which says where the address is from (`name`) and what to do (`mend`).
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not _HOST.fullmatch(host) or not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(
            f"{name} {address!r:.200} is no address of a cluster: give HOST:PORT, ray://HOST:PORT, "
            "`auto`, or `local` to start one here"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ValueError(f"the Ray cluster at {address} does not answer ({error}): {mend}") from error


def nodes() -> list[Node]:
    """The machines that are up, by what they offer; one that has just come up says it a moment later."""
    end = time.monotonic() + _OFFER_S
    while True:
        offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if all(offers) or time.monotonic() > end:
            return [Node(offer.get("CPU", 0.0), offer.get("GPU", 0.0)) for offer in offers]
        time.sleep(0.1)


def local_nodes() -> list[Node]:
    """This machine alone, as Ray would offer it: for a plan that starts nothing."""
    import torch

    return [Node(float(os.cpu_count() or 1), float(torch.cuda.device_count()))]


def num_concurrent_trials(resources: ResourcesConfig, machines: Sequence[Node]) -> int:
    """How many whole trials fit side by side: every worker fits into one machine, a trial may span several.

    With `autoscaling` it is what the configuration says, for a cluster that is still to grow.
    Raises TooSmallError where not even one trial fits.
    """
    if resources.autoscaling:
        assert resources.max_concurrent is not None
        return resources.max_concurrent
    workers = sum(workers_on(machine, resources) for machine in machines)
    fit = workers // resources.workers_per_trial or int(workers >= resources.least_workers)
    if fit == 0:
        raise TooSmallError(
            f"one trial needs {describe(resources)}, but the cluster has room for {workers} such "
            f"worker{'s' if workers != 1 else ''}: {describe_nodes(machines)}; lower resources, or set "
            "resources.autoscaling and max_concurrent for a cluster that adds machines when asked"
        )
    return min(fit, resources.max_concurrent or fit)


def describe(resources: ResourcesConfig) -> str:
    """A trial's needs in words."""
    gpus = f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else ""
    count = resources.workers_per_trial
    return f"{count} worker{'s' if count > 1 else ''} of {resources.cpus_per_worker} CPU{gpus}"


def describe_nodes(machines: Sequence[Node]) -> str:
    """The cluster in words, like machines together."""
    kinds: dict[Node, int] = {}
    for machine in machines:
        kinds[machine] = kinds.get(machine, 0) + 1
    return ", ".join(f"{n} x ({m.cpus:g} CPU, {m.gpus:g} GPU)" for m, n in kinds.items()) or "no machine"


def workers_on(machine: Node, resources: ResourcesConfig) -> int:
    """How many workers of a trial a machine has room for."""
    need_cpus, need_gpus = resources.cpus_per_worker, resources.gpus_per_worker
    by_gpu = math.inf
    if need_gpus >= 1:
        by_gpu = machine.gpus // need_gpus
    elif need_gpus:
        # A share is of one GPU, and what is left of one does not add to the next's. A small slack, since
        # fractions do not add up exactly in binary.
        by_gpu = machine.gpus // 1 * math.floor(1 / need_gpus + 1e-9)
    return int(min(machine.cpus // need_cpus, by_gpu))
