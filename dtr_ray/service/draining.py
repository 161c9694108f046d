"""Machines that are to go: Ray is told so (`ray drain-node`, an autoscaler, `dtr_ray.service.notice`)."""

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import ray
from ray._private.state import state as cluster_state
from ray.exceptions import RayActorError

from dtr_ray.training.leaving import MustLeave, stays

log = logging.getLogger(__name__)

_POLL_S = 1.0


class MachineLeftError(RayActorError):
    """A trial has left a machine that is to go; Tune starts it again elsewhere, and does not count it."""

    def __init__(self, reason: str) -> None:
        super().__init__(error_msg=reason, preempted=True)

    def __reduce__(self) -> tuple[type["MachineLeftError"], tuple[str]]:
        return MachineLeftError, (self.error_msg,)


def own_node() -> str:
    """Ray's id of this machine; "" without Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def draining(nodes: Iterable[str]) -> bool:
    """Whether any of these machines, by Ray's ids, is to go."""
    return not cluster_state.get_draining_nodes().keys().isdisjoint(nodes)


@contextmanager
def leaves_with(nodes: Iterable[str]) -> Iterator[MustLeave]:
    """Watches these machines from a thread: says whether any of them is to go, from then on for good."""
    if not ray.is_initialized():
        yield stays
        return
    nodes, leave, done = frozenset(nodes), threading.Event(), threading.Event()

    def look() -> None:
        try:
            if draining(nodes):
                leave.set()
        except Exception as error:  # Ray's own, of many kinds, where its head is away for a while
            log.debug("Ray does not say which machines are to go: %s", error)

    def watch() -> None:
        while not leave.is_set() and not done.wait(_POLL_S):
            look()

    look()
    thread = threading.Thread(target=watch, name="draining", daemon=True)
    thread.start()
    try:
        yield leave.is_set
    finally:
        done.set()
        thread.join(_POLL_S)
