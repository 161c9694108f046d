"""How sweeps share a cluster: each gets its fair part of what fits, in whole trials.

Every sweep's driver works this out for itself, and from the same claims and machines all find the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtr_ray.config.sweep import ResourcesConfig
from dtr_ray.service.cluster import Node, TooSmallError, num_concurrent_trials, workers_on

_SLACK = 1e-9
_READ = {
    "workers_per_trial",
    "min_workers_per_trial",
    "cpus_per_worker",
    "gpus_per_worker",
    "max_concurrent",
    "autoscaling",
}


@dataclass(frozen=True)
class Claim:
    """What a sweep wants of the cluster, and has."""

    key: str
    """Unique on the cluster."""
    name: str
    """The sweep's."""
    resources: ResourcesConfig
    """Of one trial."""
    wanted: int
    """Trials that it would run side by side, those that it runs included."""
    running: int
    """Trials that it has started and that have not ended; they are never taken away."""
    turn: int
    """Grows with every trial that any sweep starts: who has the smallest has waited longest."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; of the resources what this module reads."""
        return {**vars(self), "resources": self.resources.model_dump(include=_READ)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Claim":
        """What `to_dict` gave."""
        return cls(**{**values, "resources": ResourcesConfig.from_dict(values["resources"])})


Room = Callable[[Claim], bool]
"""Takes the room of one more trial of a sweep; False, and takes none, where there is not so much."""


def shares(claims: Sequence[Claim], machines: Sequence[Node]) -> dict[str, int]:
    """Trials that each sweep may run side by side, by key, as if none were running yet.

    Trial after trial goes to the sweep that has the smallest part of the cluster, among equals to the one
    that has waited longest, until no further one fits or is wanted.
    """
    wanted = {claim.key: claim.wanted for claim in claims}
    return _fill(claims, machines, dict.fromkeys(wanted, 0), wanted)


def allowances(claims: Sequence[Claim], machines: Sequence[Node]) -> dict[str, int]:
    """Trials that each sweep may run side by side now, by key: its share, as far as it fits beside what runs.

    A sweep that runs more than its share starts no further trial until enough of its own have ended.
    """
    running = {claim.key: claim.running for claim in claims}
    return _fill(claims, machines, running, shares(claims, machines))


def _fill(
    claims: Sequence[Claim], machines: Sequence[Node], counts: dict[str, int], limits: Mapping[str, int]
) -> dict[str, int]:
    """Raises the counts one by one, the most deprived sweep first, up to the limits and what fits."""
    whole = {claim.key: _alone(claim.resources, machines) for claim in claims}
    grows = any(claim.resources.autoscaling for claim in claims)
    room: Room = _Parts(whole).take if grows else _Machines(machines).take
    for claim in claims:
        for _ in range(counts[claim.key]):
            room(claim)
    counts, left = dict(counts), list(claims)
    while left:
        claim = min(left, key=lambda c: (counts[c.key] / whole[c.key], c.turn, c.key))
        if counts[claim.key] < limits[claim.key] and room(claim):
            counts[claim.key] += 1
        else:
            left.remove(claim)
    for claim in claims:
        if claim.resources.autoscaling:
            # What nobody asks for no autoscaler brings.
            counts[claim.key] = max(counts[claim.key], min(1, claim.wanted))
    return counts


def _alone(resources: ResourcesConfig, machines: Sequence[Node]) -> int:
    """Trials that would run side by side with the cluster to themselves; 1 at least."""
    unlimited = resources if resources.autoscaling else resources.model_copy(update={"max_concurrent": None})
    try:
        return num_concurrent_trials(unlimited, machines)
    except TooSmallError:
        return 1


class _Machines:
    """What is left of machines, trial by trial."""

    def __init__(self, machines: Sequence[Node]) -> None:
        # Those without GPUs first: what needs none does not go where they are.
        ordered = sorted(machines, key=lambda machine: (machine.gpus, machine.cpus))
        self._whole = machines
        self._left = [(machine.cpus, [1.0] * int(machine.gpus)) for machine in ordered]

    def take(self, claim: Claim) -> bool:
        """See Room."""
        left, resources = list(self._left), claim.resources
        count = resources.workers_per_trial
        if sum(workers_on(machine, resources) for machine in self._whole) < count:
            count = resources.least_workers
        for _ in range(count):
            for place, offer in enumerate(left):
                rest = _without_worker(offer, resources)
                if rest is not None:
                    left[place] = rest
                    break
            else:
                return False
        self._left = left
        return True


def _without_worker(
    offer: tuple[float, list[float]], resources: ResourcesConfig
) -> tuple[float, list[float]] | None:
    """CPUs and GPUs of a machine after a worker has taken its own; None where it does not fit."""
    cpus, gpus = offer
    need = resources.gpus_per_worker
    each = min(need, 1.0)
    free = [place for place, left in enumerate(gpus) if left >= each - _SLACK] if need else []
    count = max(1, round(need)) if need else 0
    if cpus < resources.cpus_per_worker or len(free) < count:
        return None
    taken = set(free[:count])
    rest = [left - each if place in taken else left for place, left in enumerate(gpus)]
    return cpus - resources.cpus_per_worker, rest


class _Parts:
    """What is left of a cluster that grows: with `max_concurrent` trials a sweep would have all of it."""

    def __init__(self, whole: Mapping[str, int]) -> None:
        self._whole = whole
        self._left = 1.0

    def take(self, claim: Claim) -> bool:
        """See Room."""
        part = 1.0 / self._whole[claim.key]
        if part > self._left + _SLACK:
            return False
        self._left -= part
        return True
