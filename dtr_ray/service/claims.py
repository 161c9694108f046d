"""Claims: how the sweeps of a cluster know of one another.

Each driver keeps a claim in the cluster's own key-value store, where all others read it. A claim counts as
long as its driver is there, of which Ray keeps account; so a sweep that is killed leaves its share at once.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Self

import ray
from ray._private import state as cluster_state
from ray.exceptions import RayError
from ray.experimental import internal_kv as store

from dtr_ray.config import SweepConfig
from dtr_ray.service import cluster
from dtr_ray.service.shares import Claim, allowances, shares

log = logging.getLogger(__name__)

_NAMESPACE = "dtr_ray"
_PREFIX = "claims/1/"
# Another driver may be about to start a trial, and has not seen this one yet.
_SETTLE_S = 1.0
_LOOK_S = 0.5


class Sharing:
    """A sweep's place among the others of its cluster; use as a context manager."""

    def __init__(self, config: SweepConfig, limit: int, say: Callable[[str], None]) -> None:
        """`limit` is how many trials the sweep runs side by side where it is alone; `say` tells of others."""
        self._say = say
        self._limit = limit
        self._claim = Claim(_key(config), config.name, config.resources, limit, 0, 0)
        self._joined = time.monotonic()
        self._refused = -math.inf
        self._told = ""
        self._seen: list[Claim] = []

    def __enter__(self) -> Self:
        self._publish()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(RayError):
            # Without a cluster nobody reads it any more.
            store._internal_kv_del(self._claim.key, namespace=_NAMESPACE)

    def may_start(self, running: int, left: int) -> bool:
        """Whether another trial may start beside the `running`, of those that are `left`; counts it if so."""
        if time.monotonic() - self._refused < _LOOK_S:
            return False
        self.tell(running, left)
        try:
            allowed = self._allowed(running)
        except RayError as error:
            log.warning("the cluster does not say who else is on it: %s", error)
            allowed = running
        if allowed <= running:
            self._refused = time.monotonic()
            return False
        self.tell(running + 1, left - 1)
        return True

    def tell(self, running: int, left: int) -> None:
        """Says how many trials run, and how many are to come."""
        wanted = min(self._limit, running + left)
        turn = self._claim.turn
        if running > self._claim.running:
            turn = 1 + max([turn, *(other.turn for other in self._seen)])
        claim = replace(self._claim, running=running, wanted=max(running, wanted), turn=turn)
        if claim != self._claim:
            self._claim = claim
            # One that ends a trial may start the next at once, in the same processes.
            self._refused = -math.inf
            self._publish()

    def _allowed(self, running: int) -> int:
        self._seen = _others(self._claim.key)
        if not self._seen:
            self._tell_user("")
            return self._limit
        if time.monotonic() - self._joined < _SETTLE_S:
            return running
        claims = sorted([self._claim, *self._seen], key=lambda claim: claim.key)
        machines = cluster.nodes()
        share = shares(claims, machines)[self._claim.key]
        names = ", ".join(sorted(other.name for other in self._seen))
        self._tell_user(f"shares the cluster with {names}: {share} of {self._limit} trials at a time")
        return allowances(claims, machines)[self._claim.key]

    def _publish(self) -> None:
        try:
            value = json.dumps(self._claim.to_dict())
            store._internal_kv_put(self._claim.key, value, overwrite=True, namespace=_NAMESPACE)
        except RayError as error:
            log.warning("the cluster does not take this sweep's claim: %s", error)

    def _tell_user(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._say(text or "has the cluster to itself again")


def waits_for_others(config: SweepConfig, *, begun: bool) -> bool:
    """Whether a sweep has nothing to do but to wait for others, whose trials run.

    `begun`: one of its running trials has given a sign of life, this time or before the sweep was resumed.
    """
    if not ray.is_initialized():
        return False
    own = _key(config)
    try:
        if not any(other.running for other in _others(own)):
            return False
        mine = _read(own)
    except RayError:
        return False
    return not begun or (mine is not None and not mine.running)


def _key(config: SweepConfig) -> str:
    return f"{_PREFIX}{ray.get_runtime_context().get_job_id()}/{config.name}"


def _others(own: str) -> list[Claim]:
    """The claims of all other sweeps that are there; those of dead drivers go."""
    keys = [key.decode() for key in store._internal_kv_list(_PREFIX, namespace=_NAMESPACE)]
    keys = [key for key in keys if key != own]
    if not keys:
        return []
    alive = {job["JobID"] for job in cluster_state.jobs() if not job["IsDead"]}
    found = []
    for key in keys:
        if key.removeprefix(_PREFIX).partition("/")[0] not in alive:
            store._internal_kv_del(key, namespace=_NAMESPACE)
            continue
        claim = _read(key)
        if claim is not None:
            found.append(claim)
    return found


def _read(key: str) -> Claim | None:
    value = store._internal_kv_get(key, namespace=_NAMESPACE)
    return None if value is None else Claim.from_dict(json.loads(value))
